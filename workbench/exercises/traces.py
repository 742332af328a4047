"""Exercises about traces: how much of their routing two of them share."""

from collections.abc import Callable

import numpy as np

from workbench.exercises.feedback import Feedback

# [T, L, K] of a and of b. -1 is no expert, and a token without any was not read
FULL = [[[3, 7, 1, 5], [1, 2, 3, 4], [9, 8, 7, 6]], [[0, 5, 2, 7], [4, 6, 8, 2], [5, 3, 1, 0]]]
OVERLAP = (
    (FULL, [[[5, 1, 7, 3], [2, 1, 9, 8], [9, 8, 7, 1]], [[1, 3, 4, 6], [4, 2, 7, 6], [6, 5, 9, 8]]]),
    (FULL, [[[7, 3], [1, 9], [5, 4]], [[2, 0], [8, 3], [3, 5]]]),
    (
        [[[3, 7, -1, -1], [1, 2, 3, -1]], [[9, -1, -1, -1], [4, 6, -1, -1]]],
        [[[7, 2, -1, -1], [2, 1, 3, -1]], [[8, 9, 5, -1], [0, 1, -1, -1]]],
    ),
    (
        [[[3, 7, 1, 5]], [[-1, -1, -1, -1]], [[4, 6, 8, 2]], [[-1, -1, -1, -1]]],
        [[[7, 2, 3, 0]], [[3, 7, 1, 5]], [[-1, -1, -1, -1]], [[-1, -1, -1, -1]]],
    ),
)


def check_overlap(overlap: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Feedback:
    """For `overlap(experts_a, experts_b)` of int arrays [T, L, K], -1 for unused: experts in both over those in either.

    [T, L], NaN where one of the two has no expert at all. The two may have different K.
    """
    met: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # a, b, what was answered
    for number, case in enumerate(OVERLAP, 1):
        a, b = (np.array(each, np.int16) for each in case)
        a.flags.writeable = b.flags.writeable = False  # as in a Trace
        answer = overlap(a, b)
        call = f"overlap of {list(a.shape)} and {list(b.shape)} experts"
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and an array.")
        try:
            given = np.asarray(answer, float)
        except (TypeError, ValueError):
            return Feedback(False, f"{call} returned {type(answer).__name__}. An array of numbers is expected.")
        if given.shape != a.shape[:2]:
            return Feedback(False, f"{call} has the shape {list(given.shape)}{_misshapen(given, a)}.")
        met.append((a, b, given))
        wrong = ~np.isclose(given, _jaccard(a, b), atol=1e-6, equal_nan=True)
        if wrong.any():
            done = f" Right so far: {number - 1} of {len(OVERLAP)} cases." if number > 1 else ""
            return Feedback(False, f"{_first(wrong, a, b, given)}: {_mistake(met) or _counted(wrong, a, b)}.{done}")
    return Feedback(
        True, f"All {len(OVERLAP)} cases are right. wb.diff does the same, in workbench/lens/difference.py."
    )


def _misshapen(given: np.ndarray, a: np.ndarray) -> str:
    tokens, layers, slots = a.shape
    causes = {
        (): ": one number for all. Each token has one in each layer",
        (tokens,): ": one number a token. Each layer has its own",
        (layers,): ": one number a layer. Each token has its own",
        (layers, tokens): ": layers come first. Tokens should",
        (tokens, layers, slots): ": one number a slot. Bring the slots of a token and layer together",
        (tokens, layers, 1): ": leave the last axis away",
    }
    return causes.get(given.shape, "") + f"; [{tokens} tokens, {layers} layers] is expected"


def _first(wrong: np.ndarray, a: np.ndarray, b: np.ndarray, given: np.ndarray) -> str:
    """The first place that is wrong, with what is there."""
    place = tuple(np.argwhere(wrong)[0])
    said, right = (f"{values[place]:.4g}" for values in (given, _jaccard(a, b)))
    return f"overlap of {a[place].tolist()} and {b[place].tolist()} is {said}, expected {right}"


def _counted(wrong: np.ndarray, a: np.ndarray, b: np.ndarray) -> str:
    place = tuple(np.argwhere(wrong)[0])
    one, other = (set(each[place].tolist()) - {-1} for each in (a, b))
    both, either = (", ".join(map(str, sorted(s))) or "none" for s in (one & other, one | other))
    return f"in both are {both}, in either {either}"


def _mistake(met: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> str | None:
    """Words for the first mistake that would have given every answer so far."""
    for mistake, words in MISTAKES:
        if all(np.allclose(given, mistake(a, b), atol=1e-6, equal_nan=True) for a, b, given in met):
            return words
    return None


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a[..., :, None] == b[..., None, :]) & (a >= 0)[..., None]).sum((-1, -2))


def _sizes(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (a >= 0).sum(-1), (b >= 0).sum(-1)


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and NaN over 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sum(_sizes(a, b)) - _common(a, b)


def _jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size_a, size_b = _sizes(a, b)
    return np.where((size_a > 0) & (size_b > 0), _over(_common(a, b), _union(a, b)), np.nan)


def _slots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b).mean(-1) if a.shape == b.shape else np.full(a.shape[:2], np.nan)


def _with_unused(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As sets, -1 in them."""
    shared, any_a, any_b = _common(a, b), (a < 0).any(-1), (b < 0).any(-1)
    return (shared + (any_a & any_b)) / (_union(a, b) + (any_a | any_b))


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As pairs of equal slots, -1 among them."""
    common = (a[..., :, None] == b[..., None, :]).sum((-1, -2))
    return _over(common, a.shape[2] + b.shape[2] - common)


# a function of a and b, and what it does wrong
MISTAKES = [
    (_slots, "the lists were compared slot by slot. Which experts there are counts, not in what order"),
    (_common, "that is how many are in both; divide by how many are in either"),
    (lambda a, b: _common(a, b) / a.shape[2], "that divides by the size of one list, or by the mean of the two (Dice's "
     "measure). Divide by the experts in either"),
    (lambda a, b: _over(_common(a, b), sum(_sizes(a, b))), "those in both were counted twice below the line. Each "
     "expert counts once in the union"),
    (lambda a, b: 1 - _jaccard(a, b), "that is the distance, 1 - overlap"),
    (_with_unused, "-1 was counted as an expert. It marks a slot that is not used"),
    (_pairs, "-1 was counted as an expert, once for every pair of unused slots"),
    (lambda a, b: np.nan_to_num(_jaccard(a, b)), "where one of the two has no expert there is nothing to compare. That "
     "is NaN, not 0"),
    (lambda a, b: _over(_common(a, b), _union(a, b)), "where only one of the two has read the token there is nothing "
     "to compare. That is NaN, not 0"),
    (lambda a, b: np.nan_to_num(_jaccard(a, b), nan=1.0), "where one of the two has no expert there is nothing to "
     "compare. That is NaN, not 1"),
]  # fmt: skip
