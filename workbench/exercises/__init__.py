"""Checks for the exercises in the notebooks: they try what was written and say where it differs."""

from workbench.exercises.attention import check_absorbed_scores, check_cached_elements
from workbench.exercises.cache import check_held_bytes, check_pack_five, check_quantise, check_row_bytes
from workbench.exercises.claims import check_supports
from workbench.exercises.edits import check_without_group
from workbench.exercises.feedback import Feedback
from workbench.exercises.kernels import check_merge
from workbench.exercises.mixture import MIX, check_mix
from workbench.exercises.offloading import check_hits_needed, check_packed_bytes
from workbench.exercises.positions import check_rotate_pairs
from workbench.exercises.probes import check_zero_head
from workbench.exercises.routing import CHOOSE, check_choose
from workbench.exercises.sampling import TOP_P, check_top_p
from workbench.exercises.statistics import check_permutation_p
from workbench.exercises.traces import check_overlap

__all__ = [
    "CHOOSE",
    "MIX",
    "TOP_P",
    "Feedback",
    "check_absorbed_scores",
    "check_cached_elements",
    "check_choose",
    "check_held_bytes",
    "check_hits_needed",
    "check_merge",
    "check_mix",
    "check_overlap",
    "check_packed_bytes",
    "check_pack_five",
    "check_permutation_p",
    "check_quantise",
    "check_rotate_pairs",
    "check_row_bytes",
    "check_supports",
    "check_top_p",
    "check_without_group",
    "check_zero_head",
]
