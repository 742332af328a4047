"""Compiled: the C files of kernels/, each built once on a machine, kept in the user's cache, loaded.

Without a compiler, or where what it built does not load, there is a reason instead.
"""

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from workbench.machine import cpu_flags

FLAGS = ("-O3", "-march=native", "-fPIC", "-fno-math-errno")
PATIENCE = 120  # seconds for the compiler
DIGEST = 32  # bytes after the library: SHA-256 of what comes before


class MissingError(Exception):
    """There is no such library; the message, one line, says why."""


def library(name: str, *flags: str) -> ctypes.CDLL:
    """That of kernels/`name`.c, compiled with these flags besides the usual. MissingError where it cannot be had."""
    try:
        built = _built(name, flags)
        _share_openmp()
        return ctypes.CDLL(str(built))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise MissingError(" ".join(str(error).split())) from error


def _built(name: str, flags: tuple[str, ...]) -> Path:
    home = find_spec("workbench_kernels")
    sources = [Path(folder) / f"{name}.c" for folder in (home.submodule_search_locations or [] if home else [])]
    source = next((path for path in sources if path.is_file()), None)
    if source is None:
        raise MissingError(f"{name}.c of the kernels is not installed")
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next((words for name in names if (words := shlex.split(name)) and shutil.which(words[0])), None)
    if compiler is None:
        raise MissingError(f"no C compiler: looked for {', '.join(names)}; install gcc, or set CC")
    return _library(compiler, source, (*FLAGS, *flags))


def _library(compiler: list[str], source: Path, flags: tuple[str, ...]) -> Path:
    """Where the library is, compiled now if it was not before for this source, compiler, processor and flags."""
    version = _run([*compiler, "--version"])
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, version, *flags, *sorted(cpu_flags())])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-workbench"
    path = home / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if path.is_file() and _is_whole(path.read_bytes()):
        return path
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        code, built = Path(folder, "code.o"), Path(folder, "built.so")
        _run([*compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(code)])
        # without -fopenmp: a second OpenMP library beside torch's would have threads of its own
        _run([*compiler, "-shared", str(code), "-lm", "-lpthread", "-o", str(built)])
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(path)  # at once: another process finds all of it or nothing
    return path


def _is_whole(content: bytes) -> bool:
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise MissingError(f"{' '.join(command[:2])} ... failed: {said[:400]}")
    return done.stdout


def _share_openmp() -> None:
    """Lets the library find the OpenMP runtime that torch has loaded, under whatever name its build gave it."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(errors="replace") if maps.is_file() else ""
    for path in sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp|omp)[^/\s]*)", text))):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
