"""rms_norm: rows of a hidden state."""

import torch
import torch.nn.functional as F

from workbench import ops
from workbench.benchmarks.cases.compare import close

TENSOR_CORES = ()  # kernels that must use them
EPS = 1e-6


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES."""
    shape, dtype = example
    x = torch.randn(shape, device=device, generator=generator) * 3
    weight = torch.randn(shape[-1], device=device, generator=generator)
    return x.to(dtype), weight.to(dtype), EPS


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return ops.rms_norm.__wrapped__(x, weight, eps)


def truth(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


check = close


def peer(x: torch.Tensor, weight: torch.Tensor, eps: float):
    """torch's own, to be timed beside the kernel."""
    return lambda: F.rms_norm(x, weight.shape, weight, eps)
