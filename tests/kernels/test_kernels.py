"""Every file in kernels/: right in the interpreter, or on the GPU where there is one; and compiled for three chips.

Numbers are compared with the reference in float64: the kernel may be at most twice as far from it as the reference
body is in the type it computes in. Nothing that a launch leaves unwritten goes unnoticed: memory is poisoned.
"""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from poison import poisoned

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def examples():
    for name in NAMES:
        file = import_module(f"workbench_kernels.{name}")
        yield from ((name, number) for number in range(len(getattr(file, "EXAMPLES", ()))))


@pytest.mark.parametrize(("name", "number"), list(examples()))
def test_a_kernel_is_as_right_as_its_reference(name, number):
    file = import_module(f"workbench_kernels.{name}")
    case = import_module(f"workbench.benchmarks.cases.{name}")
    generator = torch.Generator(DEVICE).manual_seed(torch.seed() % 2**63)
    arguments = case.arguments(file.EXAMPLES[number], DEVICE, generator)
    assert file.refuses(*arguments) is None
    with torch.inference_mode():
        truth = case.truth(*arguments)
        reference = case.reference(*arguments)
        with poisoned():
            made = file.launch(*arguments)
    case.check(made, reference, truth)


@pytest.mark.parametrize("compiled", NAMES)
def test_a_kernel_compiles_for_every_chip(compiled, compilations):
    """Without a GPU: no spill, shared memory within the chip's, tensor cores used where the case says so."""
    done, name = compilations[compiled].result(), compiled
    assert done.returncode == 0, done.stderr[-4000:]
    case = import_module(f"workbench.benchmarks.cases.{name}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["chip"] for line in lines} == {80, 90, 100}
    for line in lines:
        if "skipped" in line:
            continue
        assert not line["spills"], line
        assert line["shared"] <= line["limit"], line
        if line["kernel"] in case.TENSOR_CORES:
            assert line["products"], f"no tensor-core instruction: {line}"
