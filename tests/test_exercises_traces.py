"""The check of notebook 08 passes what is right, however it is written, and names each typical mistake."""

import numpy as np
import pytest

from workbench.exercises import check_overlap


def as_sets(a, b):
    """[T, L]; a list of lists would do too."""
    out = np.full(a.shape[:2], np.nan)
    for place in np.ndindex(*out.shape):
        one, other = set(a[place].tolist()) - {-1}, set(b[place].tolist()) - {-1}
        if one and other:
            out[place] = len(one & other) / len(one | other)
    return out


def as_lists(a, b):
    return as_sets(a, b).tolist()


def as_pairs(a, b):
    both = ((a[..., :, None] == b[..., None, :]) & (a >= 0)[..., None]).sum((-1, -2))
    size_a, size_b = (a >= 0).sum(-1), (b >= 0).sum(-1)
    with np.errstate(invalid="ignore"):
        return np.where((size_a > 0) & (size_b > 0), both / (size_a + size_b - both), np.nan)


@pytest.mark.parametrize("attempt", [as_sets, as_lists, as_pairs])
def test_what_is_right_is_solved(attempt):
    feedback = check_overlap(attempt)
    assert feedback.passed and "lens/difference.py" in feedback.text


def each(function):
    """An attempt of one token and layer, made one of all."""

    def attempt(a, b):
        out = np.full(a.shape[:2], np.nan)
        for place in np.ndindex(*out.shape):
            out[place] = function(a[place].tolist(), b[place].tolist())
        return out

    return attempt


def used(ids):
    return set(ids) - {-1}


def union_by_size(a, b):
    return len(used(a) & used(b)) / max(1, len(used(a)) + len(used(b)))


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda a, b: None, "returned nothing"),
        (lambda a, b: ..., "returned nothing"),
        (lambda a, b: "all", "An array of numbers is expected"),
        (lambda a, b: [[1], [1, 2]], "An array of numbers is expected"),
        (lambda a, b: as_sets(a, b).mean(), "one number for all"),
        (lambda a, b: as_sets(a, b).mean(1), "one number a token. Each layer"),
        (lambda a, b: as_sets(a, b).mean(0), "one number a layer. Each token"),
        (lambda a, b: as_sets(a, b).T, "layers come first"),
        (lambda a, b: as_sets(a, b)[..., None].repeat(4, -1), "one number a slot"),
        (lambda a, b: as_sets(a, b)[..., None], "leave the last axis away"),
        (lambda a, b: as_sets(a, b)[:, :, None, None], "[2 tokens, 3 layers] is expected"),
        (each(lambda a, b: sum(x == y for x, y in zip(a, b)) / len(a)), "compared slot by slot"),
        (each(lambda a, b: sum(x == y >= 0 for x, y in zip(a, b)) / len(a)), "compared slot by slot"),
        (each(lambda a, b: len(used(a) & used(b)) / len(a)), "the size of one list"),
        (each(lambda a, b: len(used(a) & used(b))), "that is how many are in both"),
        (each(lambda a, b: 1 - len(used(a) & used(b)) / max(1, len(used(a) | used(b)))), "that is the distance"),
        (each(union_by_size), "counted twice below the line"),
        (each(lambda a, b: len(set(a) & set(b)) / len(set(a) | set(b))), "-1 was counted as an expert. It marks"),
        (each(lambda a, b: len(used(a) & used(b)) / max(1, len(used(a) | used(b)))), "That is NaN, not 0"),
        (lambda a, b: as_sets(a, b) * 0 + 0.3, "in both are 1, 3, 5, 7, in either 1, 3, 5, 7"),
        (lambda a, b: np.nan_to_num(as_sets(a, b), nan=1.0), "That is NaN, not 1"),
        (
            each(lambda a, b: len(used(a) & used(b)) / len(used(a) | used(b)) if used(a) | used(b) else np.nan),
            "where only one of the two has read the token",
        ),
    ],
)
def test_a_mistake_is_named(attempt, says):
    feedback = check_overlap(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_dice_is_no_jaccard():
    assert "(Dice's measure)" in check_overlap(each(lambda a, b: 2 * union_by_size(a, b))).text


def test_the_place_is_shown_and_what_was_right_is_counted():
    feedback = check_overlap(each(lambda a, b: len(set(a) & set(b)) / len(set(a) | set(b))))
    assert "overlap of [3, 7, -1, -1] and [7, 2, -1, -1] is 0.5, expected 0.3333" in feedback.text
    assert "Right so far: 2 of 4 cases." in feedback.text


def test_pairs_of_unused_slots_are_no_experts():
    def attempt(a, b):
        common = (a[..., :, None] == b[..., None, :]).sum((-1, -2))
        return common / (a.shape[2] + b.shape[2] - common)

    assert "once for every pair of unused slots" in check_overlap(attempt).text


def test_the_arrays_cannot_be_written_into_as_those_of_a_trace_cannot():
    with pytest.raises(ValueError, match="read-only"):
        check_overlap(lambda a, b: a.sort(-1))
