"""The check of notebook 13 passes what is right, however it is written, and names each typical mistake."""

from decimal import Decimal
from math import isclose

import pytest

from workbench.exercises import check_supports


def places(claim):
    return len(claim.partition(".")[2])


def by_printing(claim, measured):
    return f"{measured:.{places(claim)}f}" == claim


@pytest.mark.parametrize(
    "attempt",
    [
        by_printing,
        lambda claim, measured: round(measured, places(claim)) == float(claim),
        lambda claim, measured: abs(Decimal(str(measured)) - Decimal(claim)) <= Decimal(5).scaleb(-places(claim) - 1),
    ],
    ids=["print", "round", "decimal"],
)
def test_a_right_judge_is_solved(attempt):
    feedback = check_supports(attempt)
    assert feedback.passed, feedback


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda claim, measured: None, "returned nothing"),
        (lambda claim, measured: 1, "True or False is expected"),
        (lambda claim, measured: measured == float(claim), "more digits were not claimed"),
        (lambda claim, measured: str(measured).startswith(claim), "it prints as 93.3"),
        (lambda claim, measured: isclose(measured, float(claim), rel_tol=0.01), "it prints as 93.0"),
        (lambda claim, measured: measured >= float(claim) - 0.05, "it prints as 93.4"),
        (lambda claim, measured: True, "Right so far: 1 of"),
        (lambda claim, measured: f"{measured:.1f}" == f"{float(claim):.1f}", "it prints as 236"),
        (lambda claim, measured: round(measured) == round(float(claim)), "it prints as 93.0"),
        (
            lambda claim, measured: by_printing(claim, measured) or ("." not in claim and int(measured) == int(claim)),
            "Cut off instead of rounded",
        ),
        (lambda claim, measured: by_printing(claim.removesuffix(".0"), measured), "it prints as 80.4"),
    ],
)
def test_a_wrong_judge_is_told_why(attempt, says):
    feedback = check_supports(attempt)
    assert not feedback.passed and says in feedback.text, feedback
