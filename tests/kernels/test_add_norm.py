"""The residual sum and its norm: where the sum is rounded, and what the kernel refuses."""

import pytest
import torch
from poison import poisoned

pytest.importorskip("triton")
kernel = pytest.importorskip("workbench_kernels.add_norm")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6


def made(x, delta, weight):
    with torch.inference_mode(), poisoned():
        return kernel.launch(x, delta, weight, EPS)


def test_a_wide_delta_is_rounded_before_it_is_added():
    step = 2.0**-8  # half of what bf16 tells apart at 1
    x, delta = (torch.full((1, 4), value, device=DEVICE) for value in (1.0, step * (1 + 2.0**-10)))
    x = x.bfloat16()
    total, _ = made(x, delta, torch.ones(4, device=DEVICE, dtype=torch.bfloat16))
    assert torch.equal(total, x + delta.bfloat16()) and not torch.equal(total, (x + delta).bfloat16())


def test_the_norm_is_that_of_the_rounded_sum():
    x = torch.tensor([[256.0, 1.0]], device=DEVICE).bfloat16()
    delta = torch.tensor([[1.0, 0.0]], device=DEVICE).bfloat16()  # 257 is 256 in bf16
    weight = torch.ones(2, device=DEVICE).bfloat16()
    total, normed = made(x, delta, weight)
    same, again = made(x, torch.zeros_like(delta), weight)
    assert torch.equal(total, same) and torch.equal(normed, again)


def test_arguments_stay_as_they_are_and_rows_of_zeros_are_zeros():
    x, delta, weight = (
        torch.randn(3, 40, device=DEVICE),
        torch.randn(3, 40, device=DEVICE),
        torch.ones(40, device=DEVICE),
    )
    delta[1] = -x[1]
    before = x.clone(), delta.clone()
    total, normed = made(x, delta, weight)
    assert torch.equal(x, before[0]) and torch.equal(delta, before[1])
    assert not total[1].any() and not normed[1].any()


def test_what_is_refused():
    x, weight = torch.zeros(2, 3, 8), torch.zeros(8)

    def why(x=x, delta=x, weight=weight):
        return kernel.refuses(x, delta, weight, EPS)

    assert why() is None and why(x.bfloat16(), x, weight.bfloat16()) is None
    assert "shapes" in why(delta=x[:1]) and "shapes" in why(weight=weight[:7])
    assert "float16" in why(x.half(), x, weight.half()) and "float64" in why(delta=x.double())
    assert "both" in why(weight=weight.bfloat16())
    assert "do not follow" in why(x=torch.zeros(3, 2, 8).transpose(0, 1))
    assert "do not follow" in why(delta=torch.zeros(2, 3, 16)[..., :8])
    assert "no rows" in why(x[:0], x[:0])
    wide = torch.zeros(1, 20000)
    assert "more than" in why(wide, wide, torch.zeros(20000))
