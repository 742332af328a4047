"""Exercises about rotary positions."""

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.exercises.feedback import Feedback
from workbench.rope import rotate

ANGLES = (0.3, 1.1, 2.0)  # one a pair, all different, so that an exchange of pairs shows
BATCH = 5


def check_rotate_pairs(rotate_pairs: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """For `rotate_pairs(x, angles)`: neighbouring pairs of x [..., 2 P] turned by angles [P], counterclockwise."""
    angles = torch.tensor(ANGLES, dtype=torch.float64)
    whole = torch.randn(BATCH, 2 * len(ANGLES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for x in (whole[0], whole):
        given = x.clone()
        answer = rotate_pairs(given, angles)
        call = f"rotate_pairs of x {list(x.shape)} and {len(ANGLES)} angles"
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and the turned tensor.")
        if not isinstance(answer, Tensor):
            return Feedback(False, f"{call} returned {type(answer).__name__}. A tensor is expected.")
        if not torch.equal(given, x):
            return Feedback(
                False, f"{call} changed x itself. The second of a pair then meets a first that was already turned."
            )
        if answer.shape != x.shape:
            return Feedback(False, _misshapen(call, answer, x))
        turned = rotate(x, torch.polar(torch.ones_like(angles), angles))
        if not torch.allclose(answer.double(), turned, atol=1e-4):
            return Feedback(False, f"{call}: {_misturned(answer.double(), x, angles)}.")
    return Feedback(True, "Right, for one vector and for many. The model does the same, in workbench/rope.py.")


def _misshapen(call: str, answer: Tensor, x: Tensor) -> str:
    said = f"{call} has the shape {list(answer.shape)}; that of x is expected."
    if answer.shape[-2:] == (x.shape[-1] // 2, 2):
        return f"{said} The pairs stand in an axis of their own: flatten the last two."
    if answer.is_complex():
        return f"{said} It is complex: view it as real, and flatten the last two axes."
    return said


def _misturned(answer: Tensor, x: Tensor, angles: Tensor) -> str:
    first, second, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
    right, up = first * cos - second * sin, first * sin + second * cos

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], -1).flatten(-2)

    one, two = x.chunk(2, -1)
    halves = torch.cat([one * cos - two * sin, one * sin + two * cos], -1)
    causes = [
        (halves, "it pairs element i with element i + half (the layout of GPT-NeoX and Llama). In DeepSeek's "
         "checkpoints the pairs are neighbours, (0, 1), (2, 3) and so on"),
        (torch.cat([right, up], -1), "the pairs are turned rightly, but the result is in another layout: all firsts, "
         "then all seconds. Put each pair back where it was"),
        (pairs(first * cos + second * sin, second * cos - first * sin), "it turns the other way round. The first "
         "element is first * cos - second * sin; mind the sign"),
        (pairs(right, second), "the second element of each pair is as it was. It turns too: "
         "first * sin + second * cos"),
        (pairs(right, second * cos), "the second element has lost first * sin"),
        (pairs(right, first * sin), "the second element has lost second * cos"),
        (pairs(right, second * cos - first * sin), "the second element has the wrong sign: first * sin + second * cos"),
        (pairs(right, right * sin + second * cos), "the second element was computed from the turned first one. It "
         "needs the first as it was"),
        (pairs(first, up), "the first element of each pair is as it was. It turns too: first * cos - second * sin"),
        (pairs(first * cos, second * sin), "cosine for the first and sine for the second is not a turn: each element "
         "needs both"),
        (pairs(first * cos, second * cos), "the sine is missing: each element needs some of the other"),
        (pairs(first * sin - second * cos, first * cos + second * sin), "cosine and sine have changed places"),
        (x, "nothing is turned"),
    ]  # fmt: skip
    for wrong, cause in causes:
        if torch.allclose(answer, wrong, atol=1e-4):
            return cause
    degrees = torch.deg2rad(angles)
    if torch.allclose(answer, rotate(x, torch.polar(torch.ones_like(degrees), degrees)), atol=1e-4):
        return "the angles were taken for degrees; they are radians"
    if not torch.allclose(answer.norm(dim=-1), x.norm(dim=-1), atol=1e-4):
        return "the length of the vector changed, so this is no turn. Check both lines against the formula"
    return "these are not the turned pairs. Try one pair first: (1, 0) turned by a is (cos a, sin a)"
