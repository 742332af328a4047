"""Exercises about the router."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.exercises.feedback import Feedback


class Case(NamedTuple):
    """Probabilities are `parts` over their sum; no two are equal, so that no answer hangs on the way of sorting."""

    parts: tuple[int, ...]
    n_group: int
    topk_group: int
    k: int
    why: str

    @property
    def probs(self) -> Tensor:
        return torch.tensor(self.parts) / sum(self.parts)

    @property
    def groups(self) -> Tensor:
        return self.probs.view(self.n_group, -1)


CHOOSE = (
    Case((8, 6, 16, 2, 10, 9, 12, 1), 4, 2, 3, "groups 1 and 3 have the best experts, 16 and 12; the rest is out"),
    Case((6, 8, 9, 10, 1, 12, 2, 16), 4, 1, 2, "only the last group is kept, weak as its other expert is"),
    Case((8, 6, 16, 2, 10, 9, 12, 1), 1, 1, 3, "one group is no limit"),
    Case((7, 3, 19, 11, 2, 17, 5, 13), 4, 4, 3, "when all groups are kept there is no limit"),
    Case(tuple((n * 13 + 5) % 32 + 1 for n in range(32)), 8, 3, 4, "this is pocket's own: 32 experts in 8 groups of 4"),
)


def check_choose(choose: Callable[[Tensor, int, int, int], tuple[Sequence[int], Sequence[float]]]) -> Feedback:
    """For `choose(probs, n_group, topk_group, k)`: ids of one token's experts, strongest first, and their gates."""
    for number, case in enumerate(CHOOSE, 1):
        call = f"choose(probs, {case.n_group}, {case.topk_group}, {case.k})"
        answer = choose(case.probs, *case[1:4])
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return ids, gates`.")
        if not isinstance(answer, Sequence) or len(answer) != 2:
            return Feedback(False, f"{call} must return two things, `return ids, gates`; it returned {_short(answer)}.")
        ids, gates = (values.tolist() if isinstance(values, Tensor) else values for values in answer)
        if not _whole(ids, len(case.parts)):
            return Feedback(
                False, f"{call}: ids must be numbers of experts, 0 to {len(case.parts) - 1}; they are {_short(ids)}."
            )
        if not isinstance(gates, Sequence) or not all(isinstance(gate, int | float | Tensor) for gate in gates):
            return Feedback(False, f"{call}: gates must be numbers, one for each expert; they are {_short(gates)}.")
        hint = _hint([int(n) for n in ids], [float(gate) for gate in gates], case)
        if hint:
            done = f" Right so far: {number - 1} of {len(CHOOSE)} cases." if number > 1 else ""
            return Feedback(False, f"{call} with probs of {_listed(case)}: {hint}.{done}")
    return Feedback(True, f"All {len(CHOOSE)} cases are right. The model does the same, in workbench/ops.py: `route`.")


def _hint(ids: list[int], gates: list[float], case: Case) -> str | None:
    """What to do about the first thing that is wrong; None if nothing is."""
    probs = case.probs
    expected = _chosen(case, case.groups.amax(1))
    if len(set(ids)) < len(ids):
        return f"an expert is there twice, {ids}"
    if len(ids) != case.k:
        return f"{case.k} experts are wanted and {len(ids)} were returned"
    if ids != expected:
        return f"ids {ids}, expected {expected}: {_why(ids, expected, case)}"
    if len(gates) != case.k:
        return f"the ids are right; {case.k} gates are wanted and {len(gates)} were returned"
    right = probs[expected]
    if torch.allclose(torch.tensor(gates), right, atol=1e-6):
        return None
    among = case.groups[case.groups.amax(1).topk(case.topk_group).indices].sum()
    for wrong, words in (
        (right / right.sum(), "they were made to sum to 1, which V2 does not do (norm_topk_prob is false)"),
        (right.softmax(-1), "a softmax over the chosen; the softmax over all experts was taken already"),
        (right / among, "they are shares of the kept groups; V2 takes the softmax over all experts"),
        (right.flip(0), "they are in another order than the ids"),
        (probs[: case.k], "these belong to the first experts in the list, not to the chosen"),
    ):
        if torch.allclose(torch.tensor(gates), wrong, atol=1e-6):
            return f"the ids are right, the gates are not: {words}"
    said, wanted = ([round(gate, 4) for gate in values] for values in (gates, right.tolist()))
    return f"the ids are right; the gates are {said}, expected their probabilities, {wanted}"


def _why(ids: list[int], expected: list[int], case: Case) -> str:
    if sorted(ids) == sorted(expected):
        return "the right experts in another order; put the strongest first"
    groups, each = case.groups, case.groups.shape[1]
    best = groups.amax(1)
    kept = best.topk(case.topk_group).indices
    inside = groups[kept.sort().values].flatten()
    two_best = groups.topk(min(2, each), 1).values.sum(1)
    for wrong, words in (
        (
            case.probs.topk(case.k).indices.tolist(),
            f"the limit on groups is missing; first drop all groups but {case.topk_group}",
        ),
        (_chosen(case, groups.sum(1)), "a group counts as its best expert, not as the sum or mean of its experts"),
        (_chosen(case, two_best), "a group counts as its best expert alone (the sum of the best two is V3's way)"),
        (_chosen(case, -best), "the weakest groups were kept"),
        (_chosen(case, torch.arange(case.n_group, 0.0, -1)), "these are the first groups, not the best"),
        (inside.topk(case.k).indices.tolist(), "these count within the kept groups; number experts as in probs"),
        (case.probs.topk(case.k, largest=False).indices.tolist(), "these are the weakest experts"),
    ):
        if ids == wrong:
            return words
    return case.why


def _chosen(case: Case, scores: Tensor) -> list[int]:
    """The k best experts of the groups whose scores [n_group] are highest."""
    kept = scores.topk(case.topk_group).indices
    allowed = torch.full_like(case.groups, -1.0)
    allowed[kept] = case.groups[kept]
    return allowed.flatten().topk(case.k).indices.tolist()


def _whole(ids: object, experts: int) -> bool:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        return False
    return all(isinstance(n, int | Tensor) and 0 <= int(n) < experts and int(n) == n for n in ids)


def _listed(case: Case) -> str:
    return f"{', '.join(map(str, case.parts))} over {sum(case.parts)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
