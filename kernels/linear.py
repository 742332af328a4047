"""Rows of x by a packed matrix, whose weights are unpacked in registers: x [..., in] by [out, in].

One row is multiplied a vector at a time; up to 16 read the weights once, in tiles; more are a product of tiles.
"""

import torch
import triton
import triton.language as tl
from workbench_kernels._product import product
from workbench_kernels._unpack import arguments, rows_of, unread, vector, weighed, wholes

MOST = 1 << 24  # rows of x in a launch
ROWS = 4  # of weights that a program multiplies one row of x with


@triton.jit
def vector_kernel(
    x_ptr,  # [in]
    values_ptr,  # [out, in]
    part_ptr,
    whole_ptr,
    out_ptr,  # [out]
    outputs,
    units,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    total = tl.zeros([ROWS, BLOCK // CHUNK], tl.float32)
    for step in range(0, (units * UNIT + BLOCK - 1) // BLOCK):
        total += weighed(
            vector(x_ptr, step, units, UNIT, BLOCK), values_ptr, part_ptr, 0, 0, row, inside, step, units,
            UNIT, BITS, GROUP, ROWS, BLOCK, CHUNK,
        )  # fmt: skip
    out = tl.sum(total, 1)
    if whole_ptr is not None:
        out *= wholes(whole_ptr, 0, row, inside, GROUP)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=inside)


def refuses(x: torch.Tensor, weight) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if isinstance(weight, torch.Tensor) or hasattr(weight.codec, "dtype"):
        return "the weight is not packed"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, not float32 or bfloat16"
    if len(weight.shape) != 2 or x.shape[-1] != weight.width:
        return f"x is {list(x.shape)} and the weight {list(weight.shape)}"
    if x.stride(-1) != 1:
        return "columns are not next to each other"
    count = x.numel() // x.shape[-1]
    if not 0 < count <= MOST:
        return f"{count} rows, not 1 to {MOST}"
    return unread(weight, x)


def launch(x: torch.Tensor, weight) -> torch.Tensor:
    """[..., out] in x's type, in one launch."""
    flat, (outputs, width), rows = x.reshape(-1, x.shape[-1]), weight.shape, rows_of(weight)
    out = torch.empty(len(flat), outputs, dtype=x.dtype, device=x.device)
    if len(flat) > 1:
        product(flat, weight, out, False)
    else:
        parts = {name: value for name, value in arguments(weight).items() if not name.endswith("_stride")}
        vector_kernel[(triton.cdiv(outputs, ROWS),)](
            x_ptr=flat,
            **parts,
            out_ptr=out,
            outputs=outputs,
            units=width // rows.unit,
            UNIT=rows.unit,
            ROWS=ROWS,
            BLOCK=2048 if width > 1024 and 32 % max(rows.bits, 1) == 0 else 1024 if width > 512 else 512,
            CHUNK=rows.chunk,
            num_warps=4,
        )
    return out.view(*x.shape[:-1], outputs)


def work(x: torch.Tensor, weight) -> tuple[int, int]:
    """The least bytes moved and operations done."""
    outputs, count = weight.shape[0], x.numel() // x.shape[-1]
    return x.nbytes + weight.nbytes + count * outputs * x.itemsize, 2 * x.numel() * outputs


# format, type of x, shape of x without its columns, columns, rows of the weight
_FP32, _BF16 = torch.float32, torch.bfloat16
EXAMPLES = (
    *((format, _BF16, (), 2048, 17) for format in ("fp8", "int8", "int6", "int4", "int3")),
    *((format, _BF16, (1, 5), 192, 50) for format in ("fp8", "int8", "int6", "int4", "int3")),
    *((format, _BF16, (67,), 192, 50) for format in ("fp8", "int8", "int6", "int4", "int3")),
    ("int4", _BF16, (1, 1), 1536, 5),
    ("int8", _BF16, (2,), 64, 8200),
    ("int4", _FP32, (1,), 72, 9),
    ("int3", _FP32, (3, 7), 96, 9),
    ("fp8", _FP32, (49,), 136, 33),
)
