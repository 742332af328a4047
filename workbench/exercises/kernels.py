"""Exercise about kernels: a softmax over keys that come in parts, which have to be put together in any order."""

from collections.abc import Callable
from functools import reduce
from random import shuffle
from typing import NamedTuple

import torch

from workbench.exercises.feedback import Feedback

HEADS, WIDTH = 5, 7


class Part(NamedTuple):
    """What one part of the keys adds to attention, for H heads. Where it has no keys: -inf, 0 and zeros."""

    largest: torch.Tensor  # [H], the largest score
    total: torch.Tensor  # [H], the sum of weights, a weight being exp(score - largest)
    out: torch.Tensor  # [H, V], the weighted sum of values, not divided by anything


def part_of(scores: torch.Tensor, values: torch.Tensor) -> Part:
    """Of scores [H, S] and values [S, V]."""
    if not scores.shape[1]:
        none = scores.new_zeros(len(scores))
        return Part(none - torch.inf, none, values.new_zeros(len(scores), values.shape[1]))
    largest = scores.amax(1)
    weights = (scores - largest[:, None]).exp()
    return Part(largest, weights.sum(1), weights @ values)


SWAYED = (2.0, -2.0, 2.0, -2.0, 2.0)
# how many keys the parts have, and what is added to their scores: one thing to get wrong at a time
PAIRS = {
    "6 keys in a, 4 in b, some heads with their largest score in a, some in b": ((6, SWAYED), (4, 0.0)),
    "scores around 5,000 in a and 4,995 in b": ((5, 5000.0), (5, 4995.0)),
    "scores around -3,000 in a and 3,000 in b": ((3, -3000.0), (3, 3000.0)),
    "no keys in b": ((5, 0.0), (0, 0.0)),
    "no keys in a": ((0, 0.0), (5, 0.0)),
    "no keys in either": ((0, 0.0), (0, 0.0)),
}
SIZES = (9, 0, 1, 40, 3, 0, 17)  # of parts that are put together in an order by chance


def check_merge(merge: Callable[[Part, Part], tuple]) -> Feedback:
    """For `merge(a, b)`: the part that has the keys of both, as (largest, total, out). Inputs are new each time."""
    cases = len(PAIRS) + 1
    for done, (name, sizes) in enumerate(PAIRS.items()):
        scores, values = zip(*(_drawn(*size) for size in sizes), strict=True)
        a, b = map(part_of, scores, values)
        before = [x.clone() for x in (*a, *b)]
        answer = merge(a, b)
        wrong = _form(answer, a)
        if not wrong and not all(map(torch.equal, before, (*a, *b))):
            wrong = "changed a or b in place, and the next who asks for them finds something else. Make new tensors"
        if not wrong:
            right = part_of(torch.cat(scores, 1), torch.cat(values))
            wrong = _mismerged(Part(*answer), right, a, b)
        if wrong:
            return Feedback(False, f"{name[0].upper()}{name[1:]}: merge(a, b) {wrong}.{_so_far(done, cases)}")
    if wrong := _many(merge):
        return Feedback(False, f"{wrong}.{_so_far(len(PAIRS), cases)}")
    return Feedback(
        True, f"All {cases} are right, in any order. `combine_kernel` in kernels/mla_decode.py does the same."
    )


def _drawn(keys: int, level: float | tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(HEADS, keys, dtype=torch.float64) + torch.tensor(level).expand(HEADS)[:, None]
    return scores, torch.randn(keys, WIDTH, dtype=torch.float64)


def _many(merge: Callable[[Part, Part], tuple]) -> str:
    """What is wrong where many parts are put together; nothing if all is right."""
    drawn = [_drawn(keys, 0.0) for keys in SIZES]
    scores, values = (torch.cat(each, dim) for each, dim in zip(zip(*drawn, strict=True), (1, 0), strict=True))
    shuffle(drawn)
    parts = [part_of(*one) for one in drawn]
    _, total, out = reduce(lambda a, b: Part(*merge(a, b)), parts)
    if _same(out / total[:, None], scores.softmax(1) @ values):
        return ""
    return f"{len(SIZES)} parts, put together one after the other, are not the softmax over all keys"


def _form(answer: object, a: Part) -> str:
    if answer is None or answer is ...:
        return "returned nothing. End the function with `return largest, total, out`"
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        return "did not return three things: largest, total, out"
    for name, made, given in zip(Part._fields, answer, a, strict=True):
        if not isinstance(made, torch.Tensor):
            return f"returned {type(made).__name__} for {name}, where a tensor is expected"
        if made.shape != given.shape:
            shapes = f"{name} of shape {list(made.shape)}, and both parts have {list(given.shape)}"
            return f"returned {shapes}: a head's number scales its row of out, `number[:, None] * out`"
    return ""


def _mismerged(answer: Part, right: Part, a: Part, b: Part) -> str:
    """What is wrong with the numbers; nothing if all are right."""
    if not _same(answer.largest, right.largest):
        causes = (
            (torch.minimum(a.largest, b.largest), "that is the smaller of the two"),
            (a.largest, "that is the one of a alone"),
            (b.largest, "that is the one of b alone"),
            (a.largest + b.largest, "that is their sum"),
        )
        return f"gave a wrong largest: {_cause(answer.largest, causes, 'for each head the larger of the two')}"
    if answer.total.isnan().any() or answer.out.isnan().any():
        if right.largest.isinf().all():
            return "gave NaN: -inf less -inf is no number. Where neither has keys, subtract 0 instead"
        return "gave NaN. Where does an infinite number meet 0, or another one? Subtract before exp, not after"
    if answer.total.isinf().any() or answer.out.isinf().any():
        return "gave infinity: exp of a large score is too large for any type. exp(largest of a part - largest of "\
               "both) is at most 1"  # fmt: skip
    now = right.largest.nan_to_num(neginf=0.0)
    keep_a, keep_b = (a.largest - now).exp(), (b.largest - now).exp()
    told = "each part's own, times exp(its largest - the largest of both), added up"
    if not _same(answer.total, right.total):
        causes = (
            (
                a.total + b.total,
                "added as they are, but their weights were made with different largest scores",
            ),
            (a.total * keep_a + b.total, "b's is not rescaled"),
            (a.total + b.total * keep_b, "a's is not rescaled"),
            (a.total / keep_a + b.total / keep_b, "the sign in exp is turned: its own largest less that of both"),
            (a.total * keep_b + b.total * keep_a, "each is rescaled by what the other should be"),
            ((a.total + b.total) * keep_a * keep_b, "both are rescaled by both"),
        )
        return f"gave a wrong total: {_cause(answer.total, causes, told)}"
    if not _same(answer.out, right.out):
        wide = [x[:, None] for x in (keep_a, keep_b, right.total)]
        causes = (
            (a.out + b.out, "they are added as they are; what is done to the total has to be done to out"),
            (a.out * wide[0] + b.out, "b's is not rescaled"),
            (a.out + b.out * wide[1], "a's is not rescaled"),
            (a.out * wide[1] + b.out * wide[0], "each is rescaled by what the other should be"),
            (right.out / wide[2], "it is divided by the total already, and is to be merged again: divide at the end"),
        )
        return f"gave a wrong out: {_cause(answer.out, causes, told)}"
    return ""


def _cause(answer: torch.Tensor, causes: tuple, otherwise: str) -> str:
    return next((cause for wrong, cause in causes if _same(answer, wrong)), otherwise)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-9)


def _so_far(done: int, of: int) -> str:
    return f" Right so far: {done} of {of}." if done else ""
