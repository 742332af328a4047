"""The residual sum and its root mean square norm: one program per row, each number read and written once. D columns."""

import torch
import triton
import triton.language as tl

LIMIT = 16384  # columns a program keeps in registers
TYPES = (torch.float32, torch.bfloat16)


@triton.jit
def add_norm_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, normed_ptr, columns, eps, BLOCK_D: tl.constexpr):
    offsets = tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * columns + offsets
    inside = offsets < columns
    # all three asked for before the sum over the row makes threads wait for each other
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # rounded where the reference rounds: delta, the sum, the normed row before the weight
    delta = delta.to(x_ptr.dtype.element_ty).to(tl.float32)
    total = (x.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, total, mask=inside)
    total = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / columns + eps)
    normed = (total * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(normed_ptr + at, (normed * weight).to(x_ptr.dtype.element_ty), mask=inside)


def refuses(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if x.shape != delta.shape or weight.shape != x.shape[-1:]:
        return f"shapes {list(x.shape)}, {list(delta.shape)} and {list(weight.shape)} are not of the same rows"
    if not x.numel():
        return "there are no rows"
    if x.shape[-1] > LIMIT:
        return f"{x.shape[-1]} columns are more than {LIMIT}"
    if x.dtype not in TYPES or weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}; both must be float32 or both bfloat16"
    if delta.dtype not in TYPES:
        return f"delta is {delta.dtype}, not float32 or bfloat16"
    if not (x.is_contiguous() and delta.is_contiguous() and weight.is_contiguous()):
        return "rows do not follow each other"
    return None


def launch(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta [..., D] in x's type, and its norm, in one launch."""
    columns = x.shape[-1]
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(columns)
    add_norm_kernel[(x.numel() // columns,)](
        x_ptr=x,
        delta_ptr=delta,
        weight_ptr=weight,
        sum_ptr=total,
        normed_ptr=normed,
        columns=columns,
        eps=eps,
        BLOCK_D=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return total, normed


def work(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[int, int]:
    """The least bytes moved and operations done."""
    return 3 * x.nbytes + delta.nbytes + weight.nbytes, 5 * x.numel()


# shape, type of x, type of delta: a token of V2, a batch of V2-Lite, odd ones
_FP32, _BF16 = torch.float32, torch.bfloat16
EXAMPLES = (
    ((1, 1, 5120), _BF16, _BF16),
    ((1, 1, 5120), _BF16, _FP32),
    ((1, 1, 5120), _FP32, _FP32),
    ((16, 2048), _BF16, _BF16),
    ((16, 2048), _BF16, _FP32),
    ((3, 7, 193), _BF16, _FP32),
    ((3, 7, 193), _FP32, _FP32),
    ((2, 1), _BF16, _BF16),
)
