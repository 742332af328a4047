"""add_norm: the residual sum and its norm."""

import torch
import torch.nn.functional as F

from workbench import steps
from workbench.benchmarks.cases.compare import close

TENSOR_CORES = ()  # kernels that must use them
EPS = 1e-6
MEASURED = {
    f"{model}, {tokens} {'token' if tokens == 1 else 'tokens'}, delta {str(kind).removeprefix('torch.')}": (
        (tokens, width),
        torch.bfloat16,
        kind,
    )
    for model, width in (("V2-Lite", 2048), ("V2", 5120))
    for tokens in (1, 4096)
    for kind in (torch.bfloat16, torch.float32)
}


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES."""
    shape, kind, delta_kind = example
    x, delta = (torch.randn(shape, device=device, generator=generator) * scale for scale in (3, 1))
    weight = torch.randn(shape[-1], device=device, generator=generator)
    return x.to(kind), delta.to(delta_kind), weight.to(kind), EPS


def reference(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float):
    return steps.add_norm.__wrapped__(x, delta, weight, eps)


def truth(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float):
    """The norm is that of the sum as it goes on through the model: rounded."""
    total = x.double() + delta.to(x.dtype).double()
    rounded = total.float().to(x.dtype).double()
    return rounded, weight.double() * rounded / (rounded.square().mean(-1, keepdim=True) + eps).sqrt()


def check(made: tuple, reference: tuple, truth: tuple) -> None:
    assert made[0].dtype == reference[0].dtype and torch.equal(made[0].double(), truth[0]), "the sum is not exact"
    close(made[1], reference[1], truth[1])


def peer(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float):
    """torch's own two operations, to be timed beside the kernel."""

    def both():
        total = x + delta.to(x.dtype)
        return total, F.rms_norm(total, weight.shape, weight, eps)

    return both
