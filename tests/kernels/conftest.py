"""Kernels are interpreted where there is no GPU, and compiled in processes of their own while others are tested."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    from kernel_interpreter import install

    install()

ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))


@pytest.fixture(scope="session", autouse=True)
def compilations(request, tmp_path_factory):
    """What tests/kernel_compiler.py says of each kernel file, as futures: begun at once, asked for at the end."""
    wanted = {item.callspec.params.get("compiled") for item in request.session.items if hasattr(item, "callspec")}
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def compile_one(name):
        program = [sys.executable, str(ROOT / "tests" / "kernel_compiler.py"), name]
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(compile_one, name) for name in NAMES if name in wanted}
