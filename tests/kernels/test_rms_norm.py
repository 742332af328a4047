"""The kernel gives what the reference gives, in the interpreter; and compiles for the chips we name, without one.

Both need their own process: Triton decides when a kernel is defined whether it is interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from workbench_kernels import rms_norm
torch.manual_seed(torch.seed())
for shape in rms_norm.EXAMPLES:
    x = torch.randn(shape) * 3
    weight = torch.randn(shape[-1])
    wide = x.double()
    truth = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert rms_norm.refuses(x, weight, 1e-6) is None
    real, torch.empty = torch.empty, lambda *a, **k: real(*a, **k).fill_(float("nan"))
    out = rms_norm.launch(x, weight, 1e-6)
    torch.empty = real
    worst = (out.double() - truth).abs().max().item()
    assert worst <= 1e-5 * truth.abs().max().item(), (shape, worst)
wide = torch.randn(4, 64)[:, ::2]
assert "next to each other" in rms_norm.refuses(wide, torch.ones(32), 1e-6)
assert "float16" in rms_norm.refuses(wide.half(), torch.ones(32), 1e-6)
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workbench_kernels.rms_norm import EXAMPLES, rms_norm_kernel
pointers = {"x_ptr": 0, "weight_ptr": 0, "out_ptr": 0}
for chip in (80, 90, 100):
    for kind in ("*fp32", "*bf16"):
        for shape in EXAMPLES:
            signature = {name: kind for name in pointers}
            signature |= {"stride_n": "i64", "columns": "i32", "eps": "fp32", "BLOCK_D": "constexpr"}
            source = ASTSource(rms_norm_kernel, signature, {(6,): triton.next_power_of_2(shape[-1])})
            assert triton.compile(source, target=GPUTarget("cuda", chip, 32)).asm["cubin"]
print("compiled")
"""


@pytest.mark.parametrize(("program", "interpret", "said"), [(INTERPRETED, "1", "equal"), (COMPILED, "0", "compiled")])
def test_rms_norm(program: str, interpret: str, said: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == said, done.stderr
