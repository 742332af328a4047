"""Exercises about nulls."""

from collections.abc import Callable
from itertools import combinations
from math import isfinite, sqrt
from numbers import Real
from typing import NamedTuple

import numpy as np

from workbench.exercises.feedback import Feedback

LENGTH = 20  # tokens of every text


class Case(NamedTuple):
    reads: tuple[int, ...]  # of the tokens of each text, how many the expert reads
    label: tuple[int, ...]  # of each text
    rounds: int
    why: str

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        own = [[1] * count + [0] * (LENGTH - count) for count in self.reads]
        return np.array(own).ravel(), np.repeat(np.arange(len(self.reads)), LENGTH), np.array(self.label), self.rounds

    def difference(self, chosen: tuple[int, ...]) -> float:
        """Of the shares where the texts `chosen` have label 1."""
        inside = sum(self.reads[n] for n in chosen)
        return inside / len(chosen) - (sum(self.reads) - inside) / (len(self.reads) - len(chosen))

    def exact(self) -> dict[str, float]:
        """Over all ways to deal the labels out: share of those as far apart, and what typical mistakes would give."""
        observed = self.difference(tuple(n for n, label in enumerate(self.label) if label))
        null = [self.difference(chosen) for chosen in combinations(range(len(self.reads)), sum(self.label))]
        return {
            "right": _share(abs(value) > abs(observed) - 1e-9 for value in null),
            "above": _share(value > observed - 1e-9 for value in null),
            "below": _share(value < observed + 1e-9 for value in null),
        }


# tokens of one text behave alike: shuffled one by one they would make any difference look certain
PERMUTATION = (
    Case((7, 7, 7, 7, 7), (0, 1, 0, 1, 1), 99, "all texts are alike, so every shuffle reaches the observed difference"),
    Case((18, 17, 16, 3, 2, 4), (1, 1, 1, 0, 0, 0), 1999, "2 of the 20 ways to label three of six texts"),
    Case((3, 2, 4, 18, 17, 16), (1, 1, 1, 0, 0, 0), 1999, "the same with the labels exchanged, so p is the same"),
    Case((12, 3, 9, 6, 15, 8, 11, 5), (1, 0, 0, 1, 1, 0, 0, 1), 1999, "no more than the labels of eight texts give"),
    Case((15, 16, 17, 18, 16, 17, 15, 18, 2, 3, 4, 5, 3, 2, 5, 4), (1,) * 8 + (0,) * 8, 19, "none of 19 shuffles"),
)


def check_permutation_p(permutation_p: Callable[[np.ndarray, np.ndarray, np.ndarray, int], float]) -> Feedback:
    """For `permutation_p(reads, text, label, rounds)`: the two-sided p of a difference in shares between two labels.

    reads (0 or 1) and text (a number) of each token, label (0 or 1) of each text.
    """
    for number, case in enumerate(PERMUTATION, 1):
        given = f"case {number} ({len(case.reads)} texts of {LENGTH} tokens, rounds = {case.rounds})"
        p = permutation_p(*case.arguments())
        if p is None or p is ...:
            return Feedback(False, "permutation_p returned nothing. End the function with `return`, and a number.")
        if not isinstance(p, Real) or isinstance(p, bool | np.bool_) or not isfinite(p) or not 0 <= p <= 1:
            return Feedback(
                False, f"In {given} it returned {p}; expected is a number from 0 to 1, as (1 + hits) / (1 + rounds) is."
            )
        hint = _hint(float(p), case)
        if hint:
            done = f" Right so far: {number - 1} of {len(PERMUTATION)} cases." if number > 1 else ""
            return Feedback(False, f"In {given} p is {p:.4g}: {hint}.{done}")
    return Feedback(
        True, f"All {len(PERMUTATION)} cases are right. This is what `specialisation` does for every expert."
    )


def _hint(p: float, case: Case) -> str:
    """What is wrong with p; nothing if it may be right."""
    hits, exact = p * (case.rounds + 1) - 1, case.exact()
    if p == 0:
        return "nothing has a chance of 0. The labels as they are count as one more shuffle: (1 + hits) / (1 + rounds)"
    if abs(hits - round(hits)) > 1e-6:
        return "it should be (1 + hits) / (1 + rounds), where hits are whole shuffles and rounds is what you are given"
    if _near(hits, exact["right"], case.rounds):
        return ""
    about = f"about {exact['right']:.3f} is expected: {case.why}"
    if len(set(case.reads)) == 1:
        return f"a shuffle that only equals the observed difference has reached it too: >= instead of >; {about}"
    if _near(hits, exact["above"], case.rounds) or _near(hits, exact["below"], case.rounds):
        return f"this is one-sided. Take the absolute value of every difference, the observed one too; {about}"
    if round(hits) == 0:
        return f"so small a p comes of shuffling tokens. Shuffle the labels of the texts, `label`, not `reads`; {about}"
    return about


def _near(hits: float, share: float, rounds: int) -> bool:
    """Whether so many of `rounds` shuffles may have hit, at five standard deviations and one hit more."""
    return abs(hits - rounds * share) <= 5 * sqrt(rounds * share * (1 - share)) + 1


def _share(which) -> float:
    which = list(which)
    return sum(which) / len(which)
