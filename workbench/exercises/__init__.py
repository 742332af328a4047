"""Checks for the exercises in the notebooks: they try what was written and say where it differs."""

from workbench.exercises.feedback import Feedback
from workbench.exercises.sampling import TOP_P, check_top_p

__all__ = ["TOP_P", "Feedback", "check_top_p"]
