"""Exercises about probes: a function that a Hook can carry out."""

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.exercises.feedback import Feedback

BATCH, TOKENS, HEADS, WIDTH = 4, 6, 4, 8  # a head's number is a place in every axis, so that a wrong axis shows
TRIED = (1, 3, 0)
ALL = slice(None)


def check_zero_head(zero_head: Callable[[Tensor, int], Tensor]) -> Feedback:
    """For `zero_head(z, head)`: z [B, T, H, V], the output of each head, with 0 for that one; z stays as it is."""
    draw = torch.Generator().manual_seed(0)
    for number, head in enumerate(TRIED):
        z = torch.rand(BATCH, TOKENS, HEADS, WIDTH, generator=draw) + 0.5  # nothing is 0 before
        before = z.clone()
        answer = zero_head(z, head)
        call = f"zero_head of z {list(z.shape)} and head {head}"
        written = not torch.equal(z, before)
        if answer is None or answer is ...:
            where = " It wrote into z instead, which others may hold." if written else ""
            return Feedback(
                False, f"{call} returned nothing.{where} Return the tensor that should take the place of z."
            )
        if not isinstance(answer, Tensor):
            return Feedback(False, f"{call} returned {type(answer).__name__}. A tensor is expected.")
        if answer.shape != z.shape:
            return Feedback(False, _misshapen(call, answer, z))
        if not torch.equal(answer, _zeroed(before, ALL, ALL, head)):
            done = f" (It was right for head {TRIED[0]}.)" if number else ""
            return Feedback(False, f"{call}: {_mistake(answer, before, head)}.{done}")
        if written:
            return Feedback(
                False,
                f"{call} gives the right numbers, but z itself was changed. A recorder before this probe holds the "
                "same tensor, and would now show zeros that the model never computed. Work on a copy, z.clone().",
            )
        if answer.dtype != z.dtype:
            return Feedback(False, f"{call} is {answer.dtype}; {z.dtype} is expected, as z is.")
    return Feedback(True, 'Right for every head. As an edit it is Scale("attn.z", 0, layer=..., index=head).')


def _misshapen(call: str, answer: Tensor, z: Tensor) -> str:
    said = f"{call} has the shape {list(answer.shape)}; that of z is expected."
    if answer.shape == (BATCH, TOKENS, HEADS - 1, WIDTH):
        return f"{said} The head was taken out. Leave it in, with zeros: the next matrix expects all heads."
    if answer.shape in ((BATCH, TOKENS, WIDTH), (BATCH, TOKENS, 1, WIDTH)):
        return f"{said} That is one head alone."
    if answer.shape == (BATCH, TOKENS, HEADS * WIDTH):
        return f"{said} Leave the heads in an axis of their own."
    if sorted(answer.shape) == sorted(z.shape):
        return f"{said} The axes are in another order."
    return said


def _mistake(answer: Tensor, z: Tensor, head: int) -> str:
    axes = "Heads are the third axis, z[:, :, head]"
    causes = [
        (z, "z came back as it was"),
        (torch.zeros_like(z), "all heads are 0; only one should be"),
        (z - _zeroed(z, ALL, ALL, head), "that head was kept and all others are 0; it is the other way round"),
        (_zeroed(z, head), f"row {head} of the batch is 0. {axes}"),
        (_zeroed(z, ALL, head), f"token {head} is 0, with all its heads. {axes}"),
        (_zeroed(z, ALL, ALL, ALL, head), f"number {head} of every head is 0. {axes}"),
        (_zeroed(z, ALL, -1, head), "only the last token has lost the head; all tokens should"),
        (_zeroed(z, 0, ALL, head), "only the first row of the batch has lost the head; all rows should"),
    ]
    causes += [
        (_zeroed(z, ALL, ALL, n), f"head {n} is 0 in its place. Use `head`, counted from 0") for n in range(HEADS)
    ]
    for wrong, words in causes:
        if torch.equal(answer.to(z.dtype), wrong):
            return words
    others = torch.arange(HEADS) != head
    if not torch.equal(answer[:, :, others].to(z.dtype), z[:, :, others]):
        return "the other heads have changed too; they should come through as they are"
    return f"head {head} is not 0 everywhere"


def _zeroed(z: Tensor, *index: slice | int) -> Tensor:
    z = z.clone()
    z[index] = 0
    return z
