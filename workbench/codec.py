"""A Codec is how a vector of numbers is stored: packed into one or more tensors, unpacked to compute with.

The rows of a weight matrix and the two halves of a cache row are stored by the same ones.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from workbench.errors import RequestError

Parts = tuple[torch.Tensor, ...]
Layout = tuple[tuple[torch.dtype, int], ...]  # type and width of each tensor that a vector is packed into

FP8 = torch.float8_e4m3fn
STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale that holds the largest element: smaller ones clip it


class Codec(Protocol):
    """How a vector of any width is stored.

    One with a NaN or an infinity in it, or with an element too large for its scale, comes back with NaN (in full, or in
    that tile), never as other numbers: sampling refuses what the model makes of it.
    """

    def layout(self, width: int) -> Layout: ...

    def pack(self, x: torch.Tensor) -> Parts: ...

    def unpack(self, parts: Parts, width: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Float:
    """As it is, in a floating-point type."""

    dtype: torch.dtype

    def layout(self, width: int) -> Layout:
        return ((self.dtype, width),)

    def pack(self, x: torch.Tensor) -> Parts:
        return (x.to(self.dtype),)

    def unpack(self, parts: Parts, width: int) -> torch.Tensor:
        return parts[0]


@dataclass(frozen=True)
class Tiles:
    """8-bit floats (e4m3) with one fp32 scale for each tile of elements, as FlashMLA stores the latent."""

    tile: int = 128

    def layout(self, width: int) -> Layout:
        return (FP8, width), (torch.float32, -(-width // self.tile))

    def pack(self, x: torch.Tensor) -> Parts:
        groups = _grouped(x.float(), self.tile)
        scale = (groups.abs().amax(-1) / torch.finfo(FP8).max).clamp(min=1e-12)
        return (groups / scale[..., None]).flatten(-2)[..., : x.shape[-1]].to(FP8), scale

    def unpack(self, parts: Parts, width: int) -> torch.Tensor:
        values, scale = parts
        return (_grouped(values.float(), self.tile) * scale[..., None]).flatten(-2)[..., :width]


def _check_bits(bits: int) -> None:
    if bits not in (2, 3, 4, 5, 6, 7, 8, 10, 12):
        raise RequestError(f"codes have 2 to 8, 10 or 12 bits; got {bits}.")


@dataclass(frozen=True)
class Codes:
    """Whole numbers of `bits` bits, packed without gaps, times one fp16 scale for each vector."""

    bits: int

    def __post_init__(self):
        _check_bits(self.bits)

    def layout(self, width: int) -> Layout:
        return (torch.uint8, packed_width(width, self.bits)), (torch.float16, 1)

    def pack(self, x: torch.Tensor) -> Parts:
        x = x.float()
        most = 2 ** (self.bits - 1) - 1
        scale = _half(x.abs().amax(-1, keepdim=True) / most)
        return pack_bits((x / scale.float()).round().clamp(-most, most).long() + most, self.bits), scale

    def unpack(self, parts: Parts, width: int) -> torch.Tensor:
        codes, scale = parts
        most = 2 ** (self.bits - 1) - 1
        return (unpack_bits(codes, self.bits, width) - most) * scale.float()


@dataclass(frozen=True)
class Groups:
    """Whole numbers of `bits` bits in groups, each with a scale of 8 bits: parts of one fp16 scale of the vector.

    The scale of a group is the one of STEPS with the least squared error: clipping its largest element by a little can
    serve the others more.
    """

    bits: int
    group: int = 16

    def __post_init__(self):
        _check_bits(self.bits)

    def layout(self, width: int) -> Layout:
        groups = -(-width // self.group)
        return (torch.uint8, packed_width(width, self.bits)), (torch.uint8, groups), (torch.float16, 1)

    def pack(self, x: torch.Tensor) -> Parts:
        groups = _grouped(x.float(), self.group)  # [..., n, group]
        most = 2 ** (self.bits - 1) - 1
        largest = groups.abs().amax(-1, keepdim=True) / most
        whole = _half(largest.amax(-2)).float()[..., None]
        best, scale, codes = None, None, None
        for step in STEPS:
            part = (largest * step / whole * 255).ceil().clamp(1, 255)
            unit = part / 255 * whole
            rounded = (groups / unit).round().clamp(-most, most)
            error = (rounded * unit - groups).square().sum(-1, keepdim=True)
            if best is None:
                best, scale, codes = error, part, rounded
            else:
                better = error < best
                best, scale = torch.where(better, error, best), torch.where(better, part, scale)
                codes = torch.where(better, rounded, codes)
        flat = codes.flatten(-2)[..., : x.shape[-1]].long() + most
        return pack_bits(flat, self.bits), scale[..., 0].to(torch.uint8), whole[..., 0].to(torch.float16)

    def unpack(self, parts: Parts, width: int) -> torch.Tensor:
        codes, scale, whole = parts
        most = 2 ** (self.bits - 1) - 1
        unit = scale.float() / 255 * whole.float()
        values = _grouped((unpack_bits(codes, self.bits, width) - most).float(), self.group)
        return (values * unit[..., None]).flatten(-2)[..., :width]


def packed_width(count: int, bits: int) -> int:
    """Bytes that hold `count` codes of `bits` bits."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] of 0 to 2^bits - 1 as bytes [..., ceil(n bits / 8)]: a stream of bits, lowest bit first."""
    count, per = codes.shape[-1], _codes_a_word(bits)
    words = F.pad(codes.long(), (0, -count % per)).unflatten(-1, (-1, per))
    word = (words << (bits * torch.arange(per, device=codes.device))).sum(-1, keepdim=True)
    shifts = 8 * torch.arange(per * bits // 8, device=codes.device)
    return ((word >> shifts) & 255).flatten(-2)[..., : packed_width(count, bits)].to(torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes [..., count] that `pack_bits` packed, int64."""
    per = _codes_a_word(bits)
    size = per * bits // 8
    padded = F.pad(packed, (0, -packed.shape[-1] % size)).long().unflatten(-1, (-1, size))
    word = (padded << (8 * torch.arange(size, device=packed.device))).sum(-1, keepdim=True)
    codes = (word >> (bits * torch.arange(per, device=packed.device))) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _codes_a_word(bits: int) -> int:
    """How many codes fill whole bytes together, in a word that int64 can hold."""
    per = 8 // math.gcd(bits, 8)
    if per * bits > 63:
        raise RequestError(f"codes of {bits} bits cannot be packed: {per} of them fill whole bytes, more than 7.")
    return per


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., width] as [..., n, size], filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _half(scale: torch.Tensor) -> torch.Tensor:
    """A scale as fp16, rounded up so that nothing is clipped, and never 0; NaN where fp16 cannot hold it."""
    half = scale.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next number above a positive one
    half = torch.where(half.float() < scale, above, half).clamp(min=6e-8)
    return half.masked_fill(half.isinf(), float("nan"))
