"""linear: rows of x by a packed matrix."""

import torch
import torch.nn.functional as F

from workbench.benchmarks.cases.compare import close
from workbench.matrix import Matrix
from workbench.recipe import WEIGHT_FORMATS

TENSOR_CORES = ("product_kernel",)


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES: rows of x do not follow each other."""
    format, dtype, shape, width, outputs = example
    x = torch.randn(*shape, width + 16, device=device, generator=generator)[..., :width].to(dtype)
    weight = torch.randn(outputs, width, device=device, generator=generator) / width**0.5
    return x, Matrix.pack(WEIGHT_FORMATS[format], weight)


def reference(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    return F.linear(x, weight.dense(x.dtype))


def truth(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    return x.double() @ weight.dense(torch.float32).double().T


check = close


def peer(x: torch.Tensor, weight: Matrix):
    """torch's own, on weights unpacked beforehand."""
    dense = weight.dense(x.dtype)
    return lambda: F.linear(x, dense)


# shapes to be timed: a token and a prompt of V2-Lite and V2 by the head, the output of attention, a dense layer
MEASURED = {
    f"{model} {format} {rows} rows {name}": (format, torch.bfloat16, (rows,), width, outputs)
    for format in ("int8", "int4")
    for model, name, width, outputs in (
        ("v2-lite", "head", 2048, 102400),
        ("v2-lite", "attention out", 2048, 2048),
        ("v2", "query up", 1536, 24576),
        ("v2", "attention out", 16384, 5120),
    )
    for rows in (1, 8, 512)
}
