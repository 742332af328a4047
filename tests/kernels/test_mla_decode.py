"""mla_decode where the general gate does not look: lengths, pieces, strides, Hopper's shape, refusals."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from poison import poisoned  # noqa: E402
from workbench_kernels import mla_decode  # noqa: E402

from workbench.benchmarks.cases import mla_decode as case  # noqa: E402
from workbench.codec import Codes, Groups  # noqa: E402
from workbench.formats import CACHE_FORMATS, Packed, cache_format  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def made(*example, seed: int = 0) -> tuple:
    return case.arguments(example, DEVICE, torch.Generator(DEVICE).manual_seed(seed))


def right(arguments: tuple) -> torch.Tensor:
    """What `launch` gives, compared with the truth."""
    assert mla_decode.refuses(*arguments) is None
    with torch.inference_mode():
        with poisoned():
            out = mla_decode.launch(*arguments)
        case.check(out, case.reference(*arguments), case.truth(*arguments))
    return out


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("length", [3, 15, 16, 17, 64, 65, 128, 129, 193])
def test_every_length(new, length):
    right(made("q6", FP32, 64, 16, 4, new, (length,)))


@pytest.mark.parametrize("processors", [1, 3, 8])
def test_sequences_are_cut_in_any_number_of_pieces(processors, monkeypatch):
    """What one, three and eight programs at a time read is the same; some find nothing to do."""
    monkeypatch.setattr(mla_decode, "device_of", lambda index: (processors, 0))
    arguments = made("bf16", FP32, 64, 16, 4, 2, (2, 700, 64, 129))
    right(arguments)


def test_a_row_may_see_nothing_of_the_last_piece(monkeypatch):
    """Three new tokens at 257: the first two see none of the rows from 256 on, which one program reads."""
    monkeypatch.setattr(mla_decode, "LEAST", 16)
    right(made("fp32", FP32, 64, 16, 3, 3, (33,)))


@pytest.mark.parametrize("name", ["bf16", "fp8", "q6"])
def test_hoppers_shape(name, monkeypatch):
    monkeypatch.setattr(mla_decode, "device_of", lambda index: (132, 90))
    right(made(name, BF16, 64, 16, 40, 2, (70,)))


HOPPER = """
import sys, torch, kernel_compiler
from workbench_kernels import mla_decode
from workbench.benchmarks.cases import mla_decode as case
mla_decode.device_of = lambda index: (132, 90)
mla_decode.EXAMPLES = tuple((name, torch.bfloat16, 512, 64, 128, 1, (70,)) for name in ("bf16", "q6"))
kernel_compiler.CHIPS = {90: kernel_compiler.CHIPS[90]}
kernel_compiler.compile_all("mla_decode")
"""


def test_hoppers_shape_compiles(tmp_path):
    """It is chosen only where there is one: no spill, its shared memory, its products of 64 rows."""
    tests = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(tests)}
    done = subprocess.run([sys.executable, "-c", HOPPER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in map(json_of, done.stdout.splitlines()) if line["kernel"] == "mla_decode_kernel"]
    assert len(lines) == 2
    for line in lines:
        assert not line["spills"] and line["shared"] <= line["limit"] and "HGMMA" in line["products"], line
