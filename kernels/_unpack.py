"""Rows of weights as programs hold them: floats, or codes of 3, 4, 6 or 8 bits, widened in registers.

A matrix [out, in] is values, parts of a scale and whole scales, of which some may be None; an element is their product.
values: floats, or codes less their middle: a stream of bits, lowest first, read as 32-bit words. part: a scale for each
GROUP of a row. whole: one for the row; with parts of 8 bits, part / 255 of it counts. Rows follow each other without
gaps. Their width is given as units of UNIT columns: so the compiler knows what divides it, and loads 16 bytes at once.
"""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

EXACT = tl.constexpr(0x4B000000)  # 2^23 as fp32: what is put into its lowest bits is added to it, without a conversion


@triton.jit
def code(pieces, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """One of the codes of pieces, less the middle: fp32, exact, by one bitwise operation and one multiply-add."""
    SHIFT: tl.constexpr = NUMBER * BITS
    values = (pieces & (EXACT | ((2**BITS - 1) << SHIFT))).to(tl.float32, bitcast=True)
    return values * (1 / 2**SHIFT) - (8388608.0 / 2**SHIFT + 2 ** (BITS - 1) - 1)


@triton.jit
def widened(words, SIZE: tl.constexpr, BITS: tl.constexpr):
    """All codes of words of SIZE bits [..., n], in order; those of a word stay in one thread."""
    pieces = (tl.join(words, words >> (SIZE // 2)) & (2 ** (SIZE // 2) - 1)) | EXACT
    if SIZE == 4 * BITS:
        return tl.join(code(pieces, 0, BITS), code(pieces, 1, BITS))
    else:
        even = tl.join(code(pieces, 0, BITS), code(pieces, 2, BITS))
        return tl.join(even, tl.join(code(pieces, 1, BITS), code(pieces, 3, BITS)))


@triton.jit
def numbers(
    values_ptr,
    at,  # [ROWS] int64: where rows begin
    inside,  # [ROWS]: which there are
    step,  # blocks of columns before these
    units,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,  # 0: floats
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, BLOCK] without their scales: fp32 of codes, else as stored. Beyond the matrix: finite, of no meaning."""
    if BITS == 0:
        columns = step * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (columns < units * UNIT)[None, :]
        return tl.load(values_ptr + at[:, None] + columns[None, :], mask=mask, other=0.0)
    else:
        WORDS: tl.constexpr = 1 if 32 % BITS == 0 else 3  # in which whole codes lie
        RUNS: tl.constexpr = BLOCK * BITS // (32 * WORDS)
        words = (step * RUNS + tl.arange(0, RUNS)) * WORDS
        mask = inside[:, None] & (words < units * (UNIT * BITS // 32))[None, :]
        from_ptr = values_ptr + at[:, None] + words[None, :]
        first = tl.load(from_ptr, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if WORDS == 1:
            pieces = widened(first, 32, BITS)
        else:  # 96 bits are four pieces of 24
            second = tl.load(from_ptr + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
            third = tl.load(from_ptr + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
            even = tl.join(first, (second >> 16) | (third << 16))
            odd = tl.join((first >> 24) | (second << 8), third >> 8)
            pieces = widened(tl.join(even, odd), 24, BITS)
        return pieces.reshape(ROWS, BLOCK)


@triton.jit
def parts(
    part_ptr, at, inside, step, units, UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """The scale of each CHUNK of a block of columns: fp32 [ROWS, BLOCK / CHUNK]."""
    first = (step * (BLOCK // CHUNK) + tl.arange(0, BLOCK // CHUNK)) * CHUNK
    mask = inside[:, None] & (first < units * UNIT)[None, :]
    return tl.load(part_ptr + at[:, None] + (first // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def wholes(whole_ptr, at, row, inside, GROUP: tl.constexpr):
    """The scale of each row: fp32 [ROWS]."""
    scale = tl.load(whole_ptr + at + row, mask=inside, other=0.0).to(tl.float32)
    return scale / 255 if GROUP > 0 else scale


@triton.jit
def weighed(
    x,  # fp32 [1, BLOCK], 0 beyond the matrix
    values_ptr,
    part_ptr,
    values_at,  # where the first row of the matrix begins
    part_at,
    row,  # [ROWS]
    inside,
    step,
    units,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of columns by a vector: fp32 [ROWS, BLOCK / CHUNK], to be summed up and scaled by whole."""
    row = row.to(tl.int64)
    PITCH: tl.constexpr = UNIT * BITS // 32 if BITS > 0 else UNIT
    values = numbers(values_ptr, values_at + row * (units * PITCH), inside, step, units, UNIT, BITS, ROWS, BLOCK)
    products = values.to(tl.float32) * x
    sums = tl.sum(products.reshape(ROWS, BLOCK // CHUNK, CHUNK), 2)
    if part_ptr is not None:
        groups = (units * UNIT + GROUP - 1) // GROUP
        sums *= parts(part_ptr, part_at + row * groups, inside, step, units, UNIT, GROUP, BLOCK, CHUNK)
    return sums


@triton.jit
def vector(x_ptr, step, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a vector: fp32 [1, BLOCK], zeros beyond its end."""
    columns = step * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < units * UNIT, other=0.0)
    return x.to(tl.float32)[None, :]


@triton.jit
def tile(
    values_ptr,
    part_ptr,
    values_at,
    part_at,
    row,
    inside,
    step,
    units,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of columns [ROWS, BLOCK], to be scaled by whole: as stored, or fp32 where something was to be done."""
    row = row.to(tl.int64)
    PITCH: tl.constexpr = UNIT * BITS // 32 if BITS > 0 else UNIT
    values = numbers(values_ptr, values_at + row * (units * PITCH), inside, step, units, UNIT, BITS, ROWS, BLOCK)
    if part_ptr is not None:
        groups = (units * UNIT + GROUP - 1) // GROUP
        scale = parts(part_ptr, part_at + row * groups, inside, step, units, UNIT, GROUP, BLOCK, CHUNK)
        values = values.to(tl.float32).reshape(ROWS, BLOCK // CHUNK, CHUNK) * scale[:, :, None]
        values = values.reshape(ROWS, BLOCK)
    return values


class Rows(NamedTuple):
    """How a matrix is stored."""

    width: int
    bits: int = 0  # of a code; 0: floats
    group: int = 0  # elements with a scale of their own

    @property
    def unit(self) -> int:
        return gcd(self.width, 32)

    @property
    def chunk(self) -> int:
        """Columns that a thread loads at once."""
        return {(0, 0): 8, (3, 64): 32, (4, 64): 32}.get(self[1:], 16)


KNOWN = ((0, 128), (8, 0), (6, 64), (4, 64), (3, 64))
WHOLE = {0: 1, 8: 4, 6: 16, 4: 8, 3: 32}  # codes that fill 32-bit words


def rows_of(weight) -> Rows:
    if isinstance(weight, torch.Tensor):
        return Rows(weight.shape[-1])
    codec = weight.codec
    return Rows(weight.width, getattr(codec, "bits", 0), getattr(codec, "group", getattr(codec, "tile", 0)))


def tensors_of(weight) -> dict[str, torch.Tensor | None]:
    """values, part and whole, codes as 32-bit words."""
    if isinstance(weight, torch.Tensor):
        return {"values": weight, "part": None, "whole": None}
    rows, (values, *scales) = rows_of(weight), weight.parts
    part = scales.pop(0) if rows.group else None
    return {"values": values.view(torch.int32) if rows.bits else values, "part": part, "whole": (*scales, None)[0]}


def arguments(weight) -> dict:
    """A bank [E, out, in], or one matrix, as arguments of a kernel."""
    rows, parts = rows_of(weight), tensors_of(weight)
    made = {f"{name}_ptr": part for name, part in parts.items()}
    made |= {f"{name}_stride": 0 if part is None or part.dim() < 3 else part.stride(0) for name, part in parts.items()}
    return made | {"BITS": rows.bits, "GROUP": rows.group}


def arguments_of_shared(weight) -> dict:
    """A matrix beside a bank, or None."""
    made = arguments(weight) if weight is not None else dict.fromkeys(("values_ptr", "part_ptr", "whole_ptr"))
    made = {name: value for name, value in made.items() if not name.endswith("_stride")}
    made = {"BITS": 0, "GROUP": 0} | made
    return {f"{'SHARED_' if name.isupper() else 'shared_'}{name}": value for name, value in made.items()}


def columns(weight) -> int:
    """That a warp reads of a row at once: 512 bytes of floats, or 512 codes."""
    values = tensors_of(weight)["values"]
    return 512 if values.itemsize == 1 or rows_of(weight).bits else 512 // values.itemsize


@cache
def has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def unread(weight, x: torch.Tensor) -> str | None:
    """Why kernels do not read a weight [..., out, in] to multiply x with it; None if they do."""
    if isinstance(weight, torch.Tensor):
        if weight.dtype != x.dtype:
            return f"weights are {weight.dtype} and x {x.dtype}"
        parts = [weight]
    else:
        if rows_of(weight)[1:] not in KNOWN and not hasattr(weight.codec, "dtype"):
            return f"weights packed by {weight.codec} are not read"
        parts = weight.parts
    rows, values = rows_of(weight), parts[0]
    if values.dtype == torch.float8_e4m3fn and not has_fp8(x.device):
        return "this GPU has no 8-bit floats"
    if rows.width % WHOLE[rows.bits]:
        return f"rows of {rows.width} codes of {rows.bits} bits are not whole 32-bit words"
    if any(part.stride(-1) != 1 or part.stride(-2) != part.shape[-1] for part in parts):
        return "rows do not follow each other"
    if rows.bits and (values.storage_offset() % 4 or (values.dim() > 2 and values.stride(0) % 4)):
        return "codes do not begin at whole 32-bit words"
    return None
