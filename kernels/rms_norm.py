"""Root mean square norm: one program per row, one read and one write of it. N rows, D columns."""

import torch
import triton
import triton.language as tl

LIMIT = 16384  # columns a program keeps in registers


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride_n, columns, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_D)
    inside = offsets < columns
    x = tl.load(x_ptr + row * stride_n + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / columns + eps)
    # rounded to the output's type before the weight, as the reference does
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + offsets, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


def refuses(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if x.shape[-1] > LIMIT:
        return f"{x.shape[-1]} columns are more than {LIMIT}"
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}; both must be float32 or both bfloat16"
    if x.stride(-1) != 1 or not weight.is_contiguous():
        return "columns are not next to each other"
    return None


def launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] in one launch."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(rows.shape[1])
    warps = min(max(block // 256, 1), 16)
    rms_norm_kernel[(rows.shape[0],)](
        x_ptr=rows,
        weight_ptr=weight,
        out_ptr=out,
        stride_n=rows.stride(0),
        columns=rows.shape[1],
        eps=eps,
        BLOCK_D=block,
        num_warps=warps,
    )
    return out


def work(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[int, int]:
    """The least bytes moved and operations done."""
    return 2 * x.nbytes + weight.nbytes, 4 * x.numel()


# shape and type of x, to test, compile and measure: a token of V2, a batch of V2-Lite, odd ones
EXAMPLES = tuple(
    (shape, dtype)
    for shape in ((1, 5120), (64, 2048), (3, 7, 193), (2, 1))
    for dtype in (torch.float32, torch.bfloat16)
)
