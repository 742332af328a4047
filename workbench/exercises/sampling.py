"""Exercises about sampling."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

from workbench.exercises.feedback import Feedback


class Case(NamedTuple):
    probabilities: tuple[float, ...]
    p: float
    kept: tuple[int, ...]
    why: str


# exact in binary and without ties among what is kept, so that no answer hangs on rounding or on the way of sorting
TOP_P = (
    Case((0.5, 0.25, 0.125, 0.125), 0.6, (0, 1), "0.5 is below 0.6, so the second is needed too: 0.75"),
    Case((0.5, 0.25, 0.125, 0.125), 0.5, (0,), "the first alone already reaches 0.5, and reaching p is enough"),
    Case((0.125, 0.25, 0.5, 0.125), 0.7, (2, 1), "the likeliest come first, wherever they stand in the list"),
    Case((0.5, 0.25, 0.25), 0.01, (0,), "the likeliest token is always kept, or nothing could be drawn"),
    Case((0.125, 0.5, 0.375), 1.0, (1, 2, 0), "p = 1 keeps everything"),
)


def check_top_p(top_p: Callable[[Sequence[float], float], Sequence[int]]) -> Feedback:
    """For `top_p(probabilities, p)`: the indices kept, likeliest first, until their probabilities reach p."""
    for number, case in enumerate(TOP_P, 1):
        call = f"top_p({list(case.probabilities)}, {case.p})"
        answer = top_p(list(case.probabilities), case.p)
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and a list of indices.")
        if not isinstance(answer, Sequence) or not all(isinstance(index, Integral) for index in answer):
            return Feedback(False, f"{call} returned {answer!r}. A list of indices is expected, such as [0, 1].")
        kept = tuple(answer)
        if kept != case.kept:
            hint = _hint(kept, case)
            done = f" Right so far: {number - 1} of {len(TOP_P)} cases." if number > 1 else ""
            return Feedback(False, f"{call} returned {list(kept)}; expected {list(case.kept)}: {hint}.{done}")
    return Feedback(True, f"All {len(TOP_P)} cases are right. The engine does the same, in workbench/sampling.py.")


def _hint(kept: tuple[int, ...], case: Case) -> str:
    if any(not 0 <= index < len(case.probabilities) for index in kept):
        return f"these are not all places in the list; indices run from 0 to {len(case.probabilities) - 1}"
    if sorted(kept) == sorted(case.kept):
        return "the right tokens in another order; put the likeliest first"
    if kept == case.kept[:-1]:
        return f"stop after the token that reaches p, not before it; {case.why}"
    if kept[: len(case.kept)] == case.kept:
        return f"too many, stop as soon as p is reached; {case.why}"
    return case.why
