"""The checks of notebook 14 pass what is right, however it is written, and name each typical mistake."""

import math

import numpy as np
import pytest
import torch

from workbench.exercises import check_hits_needed, check_packed_bytes
from workbench.matrix import Matrix
from workbench.recipe import WEIGHT_FORMATS


def up(a, b):
    return -(-a // b)


def by_packing(rows, width):
    """Packs one really."""
    return Matrix.pack(WEIGHT_FORMATS["int4"], torch.randn(rows, width)).nbytes


@pytest.mark.parametrize(
    "attempt",
    [
        lambda rows, width: rows * (up(width, 2) + up(width, 64) + 2),
        lambda rows, width: np.int64(rows * (math.ceil(4 * width / 8) + math.ceil(width / 64) + 2)),
        by_packing,
    ],
    ids=["up", "ceil", "packed"],
)
def test_right_bytes_are_solved(attempt):
    feedback = check_packed_bytes(attempt)
    assert feedback.passed, feedback


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda rows, width: None, "returned nothing"),
        (lambda rows, width: rows * width / 2, "whole numbers"),
        (lambda rows, width: True, "whole numbers"),
        (lambda rows, width: rows * up(width, 2), "the scales are missing"),
        (lambda rows, width: rows * (up(width, 2) + up(width, 64)), "scale of 2 bytes is missing"),
        (lambda rows, width: rows * (up(width, 2) + 2), "scales of the groups are missing"),
        (lambda rows, width: up(width, 2) + up(width, 64) + 2, "that is one row"),
        (lambda rows, width: rows * (up(width, 2) + up(width, 64)) + 2, "every row has its scale"),
        (lambda rows, width: rows * (up(width, 2) + 2 * up(width, 64)), "one byte, and the 2 bytes"),
        (lambda rows, width: rows * (up(width, 2) + 3 * up(width, 64)), "not for each group"),
        (lambda rows, width: rows * (up(width, 2) + 2 * up(width, 64) + 2), "scale of a group has one byte"),
        (lambda rows, width: rows * (up(width, 2) + width // 64 + 2), "last group that is not full"),
        (lambda rows, width: rows * (width // 2 + up(width, 64) + 2), "fills whole bytes in the end"),
        (lambda rows, width: up(rows * width, 2) + rows * (up(width, 64) + 2), "each row is packed by itself"),
        (lambda rows, width: up(rows * width, 2) + up(rows * width, 64) + 2 * rows, "groups end with their row"),
        (lambda rows, width: rows * (width + up(width, 64) + 2), "a byte of its own"),
        (lambda rows, width: 2 * rows * width, "in bf16"),
        (lambda rows, width: 8 * rows * (up(width, 2) + up(width, 64) + 2), "those are bits"),
        (lambda rows, width: 17, "a row has 2,560 bytes of codes, 80 of group scales, and 2"),
    ],
)
def test_wrong_bytes_are_told_why(attempt, says):
    feedback = check_packed_bytes(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_what_is_right_already_is_counted():
    assert "Right so far: 4 of 6." in check_packed_bytes(lambda rows, w: rows * (w // 2 + up(w, 64) + 2)).text


def unbounded(speed, nbytes, bandwidth):
    return 1 - bandwidth / (speed * nbytes)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda *case: max(0, unbounded(*case)),
        lambda speed, nbytes, bandwidth: np.float64(max(0.0, speed * nbytes - bandwidth)) / (speed * nbytes),
    ],
    ids=["share", "bytes"],
)
def test_right_hits_are_solved(attempt):
    feedback = check_hits_needed(attempt)
    assert feedback.passed, feedback


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda *case: None, "returned nothing"),
        (lambda *case: "half", "A share from 0 to 1"),
        (unbounded, "never less than 0"),
        (lambda *case: 1 - unbounded(*case), "the share that may miss"),
        (lambda speed, nbytes, bandwidth: speed * nbytes / bandwidth, "one over that"),
        (lambda *case: 100 * unbounded(*case), "in percent"),
        (lambda speed, nbytes, bandwidth: 1 - speed * nbytes / bandwidth, "upside down"),
        (lambda *case: 0, "some must hit"),
        (lambda *case: 1, "some may miss"),
        (lambda *case: abs(unbounded(*case)), "0 is needed"),
        (lambda *case: 0.123, "solve it for the hit rate"),
        (lambda *case: math.nan, "solve it for the hit rate"),
    ],
)
def test_wrong_hits_are_told_why(attempt, says):
    feedback = check_hits_needed(attempt)
    assert not feedback.passed and says in feedback.text, feedback
