"""Rows of weights as programs hold them: floats, or codes of 3, 4, 6 or 8 bits, widened in registers.

A matrix [out, in] is values, parts of a scale and whole scales, of which some may be None; an element is their product.
values: floats, or codes less their middle: a stream of bits, lowest first, read as 32-bit words. part: a scale for each
GROUP of a row. whole: one for the row; with parts of 8 bits, part / 255 of it counts. Rows follow each other without
gaps. Their width is given as units of UNIT columns: so the compiler knows what divides it, and loads 16 bytes at once.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

EXACT = tl.constexpr(0x4B000000)  # 2^23 as fp32: a code in its lowest bits is added to it, cheaper than a conversion


@triton.jit
def widened(words, MOST: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Codes in pieces of SIZE bits [..., n], less their middle: fp32 [..., n 2^LEVELS], those of a piece in a thread."""
    for level in tl.static_range(LEVELS):
        words = tl.join(words, words >> (SIZE >> (level + 1)))
    return ((words & (2**BITS - 1)) | EXACT).to(tl.float32, bitcast=True) - (8388608.0 + MOST)


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
        MOST: tl.constexpr = 2 ** (BITS - 1) - 1
        WORDS: tl.constexpr = 1 if 32 % BITS == 0 else 3  # in which whole codes lie
        RUNS: tl.constexpr = BLOCK * BITS // (32 * WORDS)
        LEVELS: tl.constexpr = 2 if BITS >= 6 else 3
        words = (step * RUNS + tl.arange(0, RUNS)) * WORDS
        mask = inside[:, None] & (words < units * (UNIT * BITS // 32))[None, :]
        from_ptr = values_ptr + at[:, None] + words[None, :]
        first = tl.load(from_ptr, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if WORDS == 1:
            pieces = widened(first, MOST, BITS, 32, LEVELS)
        else:  # 96 bits are four pieces of 24
            second = tl.load(from_ptr + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
            third = tl.load(from_ptr + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
            even = tl.join(first, (second >> 16) | (third << 16))
            odd = tl.join((first >> 24) | (second << 8), third >> 8)
            pieces = widened(tl.join(even, odd), MOST, BITS, 24, LEVELS)
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


@triton.jit
def silu(gate):
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def product_kernel(
    x_ptr,  # [M, in]
    values_ptr,
    part_ptr,
    whole_ptr,
    values_stride,
    part_stride,
    whole_stride,
    bounds_ptr,  # [E + 1]: rows of expert e are those from bounds e to e + 1; None: all rows are of one matrix
    order_ptr,  # [M]: which choice a row is; None: a row is itself
    out_ptr,  # [M, out]
    rows,
    stride_x,
    choices,
    experts,
    units,
    outputs,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    SWIGLU: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Runs of rows, each by its own matrix, on tensor cores: x by gate_up with SwiGLU, or what that made by down.

    Of gate_up, rows of x are read where tokens are and written one after the other; of down, the other way round.
    """
    blocks = (outputs + BLOCK_N - 1) // BLOCK_N
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if bounds_ptr is None:
        expert, first, end = 0, number * BLOCK_M, rows
    else:
        each = tl.arange(0, EXPERTS)
        begins = tl.load(bounds_ptr + each, mask=each < experts, other=0).to(tl.int32)
        ends = tl.load(bounds_ptr + 1 + each, mask=each < experts, other=0).to(tl.int32)
        tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
        after = tl.cumsum(tiles, 0)
        expert = tl.sum((after <= number).to(tl.int32), 0)
        if expert >= EXPERTS:
            return
        mine = each == expert
        first = tl.sum(tl.where(mine, begins + (number - after + tiles) * BLOCK_M, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
    row = first + tl.arange(0, BLOCK_M)
    there = row < end
    plain = row.to(tl.int64)
    choice = plain if order_ptr is None else tl.load(order_ptr + plain, mask=there, other=0)
    source = choice // choices if SWIGLU else plain
    ROWS: tl.constexpr = 2 * BLOCK_N if SWIGLU else BLOCK_N
    each = tl.arange(0, ROWS)
    if SWIGLU:  # rows of gate and up in turns
        column = block * BLOCK_N + each // 2
        weight, real = column + each % 2 * outputs, column < outputs
    else:
        weight = block * BLOCK_N + each
        real = weight < outputs
    wide = tl.cast(expert, tl.int64)
    kind = x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, ROWS], tl.float32)
    for step in tl.range(0, (units * UNIT + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = there[:, None] & (columns < units * UNIT)[None, :]
        x = tl.load(x_ptr + source[:, None] * stride_x + columns[None, :], mask=mask, other=0.0)
        weights = tile(
            values_ptr, part_ptr, wide * values_stride, wide * part_stride, weight, real, step, units,
            UNIT, BITS, GROUP, ROWS, BLOCK_K, CHUNK,
        )  # fmt: skip
        total = tl.dot(x, tl.trans(weights.to(kind)), total, input_precision=PRECISION)
    if whole_ptr is not None:
        total *= wholes(whole_ptr, wide * whole_stride, weight, real, GROUP)[None, :]
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = there[:, None] & (columns < outputs)[None, :]
    if SWIGLU:
        gate, up = tl.split(total.reshape(BLOCK_M, BLOCK_N, 2))
        total, choice = silu(gate) * up, plain
    tl.store(out_ptr + choice[:, None] * outputs + columns[None, :], total.to(kind), mask=mask)


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


def product(
    x: torch.Tensor,
    weight,
    out: torch.Tensor,
    swiglu: bool,
    bounds_ptr: torch.Tensor | None = None,
    order_ptr: torch.Tensor | None = None,
    choices: int = 1,
    experts: int = 1,
) -> None:
    """Launches `product_kernel`, with tiles as high as runs of rows are on average."""
    (count, outputs), rows, exact = out.shape, rows_of(weight), x.dtype == torch.float32
    average = count / experts
    if rows.bits or rows.group:  # unpacked once for as many rows as there may be
        block_m = 16 if average <= 32 else 64 if exact else 128
    else:
        block_m = 16 if average <= 16 else 64 if average <= 96 or exact else 128
    block_n = (32 if exact or block_m == 16 else 64) * (1 if swiglu else 2)
    tiles = triton.cdiv(count, block_m) + (min(experts, count) if bounds_ptr is not None else 0)
    product_kernel[(tiles * triton.cdiv(outputs, block_n),)](
        x_ptr=x,
        **arguments(weight),
        bounds_ptr=bounds_ptr,
        order_ptr=order_ptr,
        out_ptr=out,
        rows=count,
        stride_x=x.stride(0),
        choices=choices,
        experts=experts,
        units=rows.width // rows.unit,
        outputs=outputs,
        UNIT=rows.unit,
        CHUNK=rows.chunk,
        SWIGLU=swiglu,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=32 if exact else 128 if block_m == 16 else 64,
        STAGES=3,
        PRECISION="tf32x3" if exact else "tf32",
        num_warps=8 if block_m == 128 else 4,
    )


def unread(weight, x: torch.Tensor, has_fp8: bool) -> str | None:
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
    if values.dtype == torch.float8_e4m3fn and not has_fp8:
        return "this GPU has no 8-bit floats"
    if rows.width % WHOLE[rows.bits]:
        return f"rows of {rows.width} codes of {rows.bits} bits are not whole 32-bit words"
    if any(part.stride(-1) != 1 or part.stride(-2) != part.shape[-1] for part in parts):
        return "rows do not follow each other"
    if rows.bits and (values.storage_offset() % 4 or (values.dim() > 2 and values.stride(0) % 4)):
        return "codes do not begin at whole 32-bit words"
    return None
