"""Compiles what a kernel file launches, for GPUs that are not here, and looks at the result.

    python kernel_compiler.py NAME    every example of kernels/NAME.py, on every chip: a line of JSON for each

Launches are caught, not carried out: their own arguments give types, constants and options, so what is compiled is what
would run.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CHIPS = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory a program may have
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    torch.float64: "fp64",
}  # fmt: skip
PRODUCTS = re.compile(r"\b(HMMA|HGMMA|QGMMA|IMMA|UTCHMMA|UTCQMMA|UTCMMA)\b")


def caught(launch: Callable, arguments: tuple) -> list[tuple[JITFunction, dict, dict]]:
    """(function, arguments by name, options) of each kernel that `launch(*arguments)` would start."""
    found, real = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        found.append((self, bound.arguments, options))

    JITFunction.run = run
    try:
        launch(*arguments)
    finally:
        JITFunction.run = real
    return found


def source(function: JITFunction, arguments: dict) -> ASTSource:
    """As the real launch specialises: None and 1 are constants, what 16 divides is known to be so."""
    signature, constants, hints = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value, where = arguments[parameter.name], (place,)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[where] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], known = f"*{TYPES[value.dtype]}", value.data_ptr()
        elif isinstance(value, bool):
            signature[parameter.name], known = "i1", 1
        elif isinstance(value, int):
            signature[parameter.name], known = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
        else:
            signature[parameter.name], known = "fp32", 1
        if known % 16 == 0:
            hints[where] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, hints)


def report(compiled, chip: int) -> dict:
    """Registers, accesses to local memory, shared memory and tensor-core instructions of one compilation."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        used, code = (
            subprocess.run([str(tools / tool), flag, str(cubin)], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    registers = max(map(int, re.findall(r"REG:(\d+)", used)))
    products: dict[str, int] = {}
    for found in PRODUCTS.findall(code):
        products[found] = products.get(found, 0) + 1
    return {
        "registers": registers, "spills": spills, "shared": compiled.metadata.shared, "limit": CHIPS[chip],
        "products": products,
    }  # fmt: skip


def compile_all(name: str) -> None:
    file = import_module(f"workbench_kernels.{name}")
    case = import_module(f"workbench.benchmarks.cases.{name}")
    done = set()
    for number, example in enumerate(file.EXAMPLES):
        arguments = case.arguments(example, torch.device("cpu"), torch.Generator().manual_seed(0))
        for function, bound, options in caught(file.launch, arguments):
            made = source(function, bound)
            key = (function.fn.__name__, str(made.signature), str(made.constants), str(made.attrs), str(options))
            if key in done:
                continue
            done.add(key)
            for chip in CHIPS:
                said = {"kernel": function.fn.__name__, "example": number, "chip": chip} | options
                if chip < 89 and any("fp8" in kind for kind in made.signature.values()):
                    print(json.dumps(said | {"skipped": "this chip has no fp8"}), flush=True)
                    continue
                compiled = triton.compile(made, target=GPUTarget("cuda", chip, 32), options=options)
                print(json.dumps(said | report(compiled, chip)), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    compile_all(sys.argv[1])
