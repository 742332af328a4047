"""Ways to store a vector with few bits, as what they give back and what they take: the candidates of `schemes`.

The ones that were chosen are codecs of formats.py, which really pack. Here a vector is only rounded as if it had been.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F

from workbench.codec import STEPS, Codec, packed_width
from workbench.errors import RequestError

LEVELS = ("mid-tread", "mid-rise", "asymmetric", "Lloyd-Max")
SCALES = ("fp16", "8 bit")


class Rounding(Protocol):
    def nbytes(self, width: int) -> int:
        """Of a vector of that width: codes and scales."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors [..., width] as they come back, fp32."""


@dataclass(frozen=True)
class Stored:
    """What a codec of formats.py gives back."""

    codec: Codec

    def nbytes(self, width: int) -> int:
        return sum(dtype.itemsize * count for dtype, count in self.codec.layout(width))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.codec.unpack(self.codec.pack(x), x.shape[-1]).float()


@dataclass(frozen=True)
class Exact:
    """Nothing is lost; counted as bf16. To see the other part of a row alone."""

    def nbytes(self, width: int) -> int:
        return 2 * width

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


@dataclass(frozen=True)
class Rounded:
    """Codes of `bits` bits.

    group   elements that share a scale; None: all of the vector scale   "fp16", or "8 bit": a part of one fp16 scale of
    the vector search  of several scales the one with the least squared error, instead of the one that clips nothing
    levels  "mid-tread": whole numbers, 0 among them; "mid-rise": halves, one level more and no 0; "asymmetric": from
    the
            smallest to the largest element, with an fp16 offset; "Lloyd-Max": the levels that lose least on a normal
            distribution, times the root mean square
    turned  rounded after an orthogonal (Hadamard) rotation and turned back: spreads outlying elements over all others
    """

    bits: int
    group: int | None = None
    scale: str = "fp16"
    search: bool = False
    levels: str = "mid-tread"
    turned: bool = False

    def __post_init__(self):
        if self.levels not in LEVELS or self.scale not in SCALES:
            raise RequestError(f"levels are {', '.join(LEVELS)} and scales {', '.join(SCALES)}; got {self}.")
        if (self.search or self.scale == "8 bit") and self.levels != "mid-tread":
            raise RequestError(f"only mid-tread levels are searched for or have 8-bit scales; got {self}.")

    def nbytes(self, width: int) -> int:
        groups = -(-width // (self.group or width))
        scales = groups + 2 if self.scale == "8 bit" else 2 * groups
        return packed_width(width, self.bits) + scales + (2 * groups if self.levels == "asymmetric" else 0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        x = x.float()
        turn = hadamard(width).to(x.device) if self.turned else None
        y = x if turn is None else x @ turn
        size = self.group or width
        groups = F.pad(y, (0, -width % size)).unflatten(-1, (-1, size))
        back = self._rounded(groups).flatten(-2)[..., :width]
        return back if turn is None else back @ turn.mT

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Groups [..., n, size], each on its own."""
        if self.levels == "Lloyd-Max":
            unit = _fp16(x.square().mean(-1, keepdim=True).sqrt())
            levels = lloyd_max(self.bits).to(x.device)
            return levels[torch.bucketize((x / unit).contiguous(), (levels[1:] + levels[:-1]) / 2)] * unit
        if self.levels == "asymmetric":
            low, high = x.aminmax(dim=-1, keepdim=True)
            low, most = low.half().float(), 2**self.bits - 1
            unit = _fp16((high - low) / most)
            return ((x - low) / unit).round().clamp(0, most) * unit + low
        largest = x.abs().amax(-1, keepdim=True)
        if self.levels == "mid-rise":
            half = 2 ** (self.bits - 1)
            unit = _fp16(largest / half)
            return ((x / unit).floor().clamp(-half, half - 1) + 0.5) * unit
        most = 2 ** (self.bits - 1) - 1
        whole = _fp16(largest.amax(-2, keepdim=True) / most)
        best, least = None, None
        for step in STEPS if self.search else STEPS[:1]:
            unit = largest * step / most
            unit = (unit / whole * 255).ceil().clamp(1, 255) / 255 * whole if self.scale == "8 bit" else _fp16(unit)
            back = (x / unit).round().clamp(-most, most) * unit
            error = (back - x).square().sum(-1, keepdim=True)
            if best is None:
                best, least = back, error
            else:
                best, least = torch.where(error < least, back, best), torch.minimum(error, least)
        return best


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """The 2^bits levels with the least squared error on a standard normal distribution, ascending, on the CPU."""
    x = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    weight = (-x.square() / 2).exp()
    # a start that is right for many levels: as dense as the third root of the distribution, a normal one that is wider
    levels = math.sqrt(6) * torch.erfinv(2 * (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits - 1)
    for _ in range(300):
        where = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add(0, where, weight)
        levels = torch.zeros_like(levels).index_add(0, where, weight * x) / mass.clamp(min=1e-300)
    return levels.float()


@cache
def hadamard(width: int) -> torch.Tensor:
    """[width, width], orthogonal, all entries of one size. RequestError unless the width is a power of two."""
    if width & (width - 1):
        raise RequestError(f"a Hadamard rotation wants a power of two; got {width}.")
    turn = torch.ones(1, 1)
    while turn.shape[0] < width:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn / math.sqrt(width)


def _fp16(scale: torch.Tensor) -> torch.Tensor:
    """As codec.py keeps a scale: fp16, rounded up, never 0."""
    half = scale.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < scale, above, half).clamp(min=6e-8).float()
