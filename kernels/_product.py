"""Products of matrices on tensor cores: runs of rows, each by a plain or packed matrix of its own.

M rows in the order of their experts, E experts.
"""

import torch
import triton
import triton.language as tl
from workbench_kernels._unpack import arguments, rows_of, tile, wholes


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
    if block_m == 16 and bounds_ptr is None and outputs <= 8192:
        block_n = 16  # few programs, if they were wider, for a device's multiprocessors
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
        BLOCK_K=32 if exact else 128 if block_m == 16 and 32 % max(rows.bits, 1) == 0 else 64,
        STAGES=3,
        PRECISION="tf32x3" if exact else "tf32",
        num_warps=8 if block_m == 128 else 4,
    )
