"""A Format is how the elements of a cache row are stored: packed into one or more tensors, unpacked to compute with.

A row is the latent (C elements, kv_lora_rank) and then the rotary key (R elements, qk_rope_head_dim): 512 + 64 in V2.
The two are packed apart, because they differ: the latent has outlying channels, and an error in the rotary key moves
the score of every head. What was tried for the 6-bit default, and lost, is in kernels/results and the notebook on the
cache.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from workbench.codec import Codec, Codes, Float, Groups, Layout, Parts, Tiles
from workbench.errors import RequestError


class Row(NamedTuple):
    """The widths of a cache row."""

    latent: int
    rope: int

    @property
    def width(self) -> int:
        return self.latent + self.rope


@dataclass(frozen=True)
class Format:
    """How a cache row is stored. `recent` tokens at the end of a sequence are kept in bf16 beside their packed rows."""

    name: str
    doc: str = field(default="", kw_only=True)
    recent: int = field(default=0, kw_only=True)

    def layout(self, row: Row) -> Layout:
        """Type and width of each tensor a row is packed into."""
        raise NotImplementedError

    def pack(self, rows: torch.Tensor, row: Row) -> Parts:
        """[..., W] to one tensor [..., part width] per part."""
        raise NotImplementedError

    def unpack(self, parts: Parts, row: Row, dtype: torch.dtype) -> torch.Tensor:
        """The rows again, [..., W] in `dtype`."""
        raise NotImplementedError

    def nbytes(self, row: Row) -> int:
        """Of one row: codes, scales and padding."""
        return sum(dtype.itemsize * width for dtype, width in self.layout(row))

    def bits(self, row: Row) -> float:
        """Of one element on average, scales and padding included."""
        return 8 * self.nbytes(row) / row.width


@dataclass(frozen=True)
class Plain(Format):
    """The row as it is, in one tensor: no copy where nothing has to be computed."""

    dtype: torch.dtype

    def layout(self, row: Row) -> Layout:
        return ((self.dtype, row.width),)

    def pack(self, rows: torch.Tensor, row: Row) -> Parts:
        return (rows.to(self.dtype),)

    def unpack(self, parts: Parts, row: Row, dtype: torch.dtype) -> torch.Tensor:
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Packed(Format):
    """The latent by one codec, the rotary key by another."""

    latent: Codec
    rope: Codec

    def layout(self, row: Row) -> Layout:
        return self.latent.layout(row.latent) + self.rope.layout(row.rope)

    def pack(self, rows: torch.Tensor, row: Row) -> Parts:
        latent, rope = rows.split([row.latent, row.rope], -1)
        return self.latent.pack(latent) + self.rope.pack(rope)

    def unpack(self, parts: Parts, row: Row, dtype: torch.dtype) -> torch.Tensor:
        count = len(self.latent.layout(row.latent))
        latent = self.latent.unpack(parts[:count], row.latent)
        rope = self.rope.unpack(parts[count:], row.rope)
        return torch.cat([latent.to(dtype), rope.to(dtype)], -1)


BF16 = Float(torch.bfloat16)
FORMATS = (
    Plain("fp32", torch.float32, doc="as a model in fp32 computes it"),
    Plain("bf16", torch.bfloat16, doc="as the published models compute it"),
    Packed("fp8", Tiles(128), BF16, doc="e4m3 in tiles of 128 with an fp32 scale, rotary key bf16: FlashMLA's layout"),
    Packed("int8", Codes(8), Codes(8), doc="8 bits, one scale for the latent and one for the rotary key"),
    Packed("q6", Groups(5, 16), Codes(10), doc="6 bits on average: 5-bit latent in groups of 16, 10-bit rotary key"),
    Packed("int6", Codes(6), Codes(6), doc="6 bits throughout with two scales: the plain way"),
    Packed("int4", Groups(4, 16), Codes(8), doc="4-bit latent in groups of 16, 8-bit rotary key"),
)
CACHE_FORMATS = {format.name: format for format in FORMATS}


def cache_format(name: str | Format) -> Format:
    """The cache format of that name; "q6+128" keeps the last 128 tokens in bf16 too. RequestError lists the known ones.

    A window is for packed formats: beside bf16 it would say the same twice, beside fp32 say it worse.
    """
    if isinstance(name, Format):
        return name
    base, plus, recent = str(name).partition("+")
    format = CACHE_FORMATS.get(base)
    if format is None or (plus and not (isinstance(format, Packed) and recent.isdecimal() and int(recent))):
        raise RequestError(
            f"no cache format called {name!r}; there are {', '.join(CACHE_FORMATS)}, "
            'and such as "q6+128" of the packed ones, which keeps the last 128 tokens in bf16.'
        )
    return replace(format, name=f"{base}+{int(recent)}", recent=int(recent)) if plus else format
