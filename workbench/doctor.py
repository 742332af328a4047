"""What this machine has, what is missing, and what that means for speed. Every finding carries its remedy."""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from workbench import __version__, machine
from workbench.config import Config
from workbench.errors import WorkbenchError

OK, WARN, FAIL = STATES = ("ok", "warn", "fail")
GB = 1e9
WIDTHS = {"bf16": 16, "4.13 bits": 4.13}  # of a weight; the second is int4 with its scales
MEASURE = "workbench doctor --measure, once: it takes half a minute and is kept"


class Check(NamedTuple):
    section: str
    name: str
    state: str  # "ok" | "warn" | "fail": as it should be | works, but worse | does not work
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    checks: tuple[Check, ...]

    @property
    def state(self) -> str:
        """The worst of all checks."""
        return max((check.state for check in self.checks), key=STATES.index)

    def to_dict(self) -> dict:
        return {"version": __version__, "state": self.state, "checks": [check._asdict() for check in self.checks]}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines, section = [f"workbench {__version__}"], None
        for check in self.checks:
            if check.section != section:
                section = check.section
                lines += ["", section]
            lines.append(f"  {check.state:4}  {check.name:{width}}  {check.found}")
            if check.remedy:
                lines.append(f"        {'':{width}}  -> {check.remedy}")
        return "\n".join(lines)


class Package(NamedTuple):
    name: str
    minimum: str  # as in pyproject.toml
    extra: str = ""  # the extra that brings it; "" where nothing works without it
    without: str = ""  # what is missing without it


PACKAGES = (
    Package("torch", "2.10"),
    Package("triton", "3.5", without="kernels: every op runs its reference body"),
    Package("safetensors", "0.5"),
    Package("tokenizers", "0.21"),
    Package("pyarrow", "17"),
    Package("jupyterlab", "4.4", "notebooks", "the notebooks"),
    Package("ipykernel", "6.30", "notebooks", "the notebooks"),
    Package("ipywidgets", "8.1.5", "notebooks", "the chat panel"),
    Package("anywidget", "0.9.18", "notebooks", "the chat panel"),
    Package("plotly", "6.0", "notebooks", "plots"),
    Package("pillow", "11", "notebooks", "the chat panel"),
    Package("huggingface_hub", "0.34", "hub", "models by their hub name; directories work"),
    Package("transformers", "5.23", "test", "the parity tests and `workbench bench cpu`"),
)


def examine() -> Report:
    """Looks at everything; takes seconds, changes nothing, contacts nothing."""
    parts = (_software(), _front_end(), _machine(), _gpu(), _kernels(), _pocket(), _expectations())
    return Report(tuple(check for part in parts for check in part))


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0); enough to compare releases."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def _software() -> Iterator[Check]:
    section = "Software"
    found = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Check(section, "python", OK if supported else FAIL, found, "" if supported else "use Python 3.11 to 3.13")
    for package in PACKAGES:
        if package.name == "triton" and sys.platform != "linux":
            continue
        yield _judge(section, package)


def _judge(section: str, package: Package) -> Check:
    found = installed(package.name)
    name, source = package.name, f"pip install -e '.[{package.extra}]' in the checkout"
    if found is None and package.without:
        remedy = source if package.extra else f"pip install '{name}>={package.minimum}'"
        return Check(section, name, WARN, f"not installed; without it: no {package.without}", remedy)
    if found is None:
        return Check(section, name, FAIL, "not installed", "make setup, or pip install -e . in the checkout")
    if numbers(found) < numbers(package.minimum):
        state = WARN if package.without else FAIL
        return Check(section, name, state, f"{found} is too old", f"pip install '{name}>={package.minimum}'")
    if name == "torch" and _broken("torch"):
        return Check(section, name, FAIL, f"{found} does not import: {_broken('torch')}", "reinstall torch")
    if name == "ipykernel" and (7, 0) <= numbers(found) < (7, 4):
        found += " calls button handlers on a second thread: callbacks of your own must lock what they share"
        return Check(section, name, WARN, found, "pip install 'ipykernel>=7.4'")
    if name == "triton" and numbers(found) < (3, 7) and numbers(installed("numpy") or "0") >= (2, 4):
        found += " with numpy 2.4 cannot interpret kernels on a CPU (TRITON_INTERPRET=1); on a GPU it is fine"
        return Check(section, name, WARN, found, "pip install 'triton>=3.7', or 'numpy<2.4' where torch pins triton")
    return Check(section, name, OK, found)


def _broken(name: str) -> str:
    try:
        import_module(name)
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return ""


def _torch() -> ModuleType | None:
    return None if installed("torch") is None or _broken("torch") else import_module("torch")


def _front_end() -> Iterator[Check]:
    section = "Front end"
    if installed("jupyterlab") is None:
        yield Check(section, "jupyterlab", WARN, "not installed", "pip install -e '.[notebooks]' in the checkout")
        return
    paths = import_module("jupyter_core.paths")
    application = [Path(folder, "lab", "static") for folder in paths.jupyter_path()]
    extensions = [Path(folder) for folder in paths.jupyter_path("labextensions")]
    yield _asset(section, "application", application, "index.html", "jupyterlab")
    yield _asset(
        section, "controls", extensions, "@jupyter-widgets/jupyterlab-manager/package.json", "jupyterlab_widgets"
    )
    yield _asset(section, "live views", extensions, "anywidget/package.json", "anywidget")
    yield _asset(section, "plots", extensions, "jupyterlab-plotly/package.json", "plotly")
    ours = sorted(path.name for path in (Path(__file__).parent / "widgets").glob("*.js"))
    if ours:
        yield Check(section, "our widgets", OK, ", ".join(ours))
    else:
        yield Check(
            section, "our widgets", FAIL, "no .js file beside workbench/widgets", "reinstall deepseek-workbench"
        )


def _asset(section: str, name: str, folders: list[Path], file: str, package: str) -> Check:
    for folder in folders:
        if (folder / file).is_file():
            return Check(section, name, OK, f"{package}: found")
    return Check(
        section, name, WARN, f"{package}: {file} is in none of Jupyter's folders",
        f"pip install --force-reinstall {package}, in the environment JupyterLab runs from",
    )  # fmt: skip


def _machine() -> Iterator[Check]:
    section = "Machine"
    cores, flags = machine.cores(), machine.cpu_flags()
    torch = _torch()
    threads = f", torch uses {torch.get_num_threads()}" if torch else ""
    yield Check(section, "cpu", OK, f"{machine.cpu_name()}, {cores} cores{threads}")
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags]
    bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    found = (
        f"{', '.join(wide) or 'no x86 vector extensions seen'}; bf16 arithmetic is {'native' if bf16 else 'emulated'}"
    )
    yield Check(section, "vector units", OK if bf16 else WARN, found, "" if bf16 else 'load with dtype="float32"')
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        yield Check(section, "C compiler", OK, version[0] if version else compiler)
    else:
        remedy = "install gcc or clang; Triton and torch.compile build their launchers with it"
        yield Check(section, "C compiler", WARN, "none", remedy)
    psutil = import_module("psutil")
    memory = psutil.virtual_memory()
    enough = memory.available > 1 * GB
    found = f"{memory.available / GB:.1f} GB free of {memory.total / GB:.1f} GB"
    yield Check(
        section, "memory", OK if enough else WARN, found, "" if enough else "close something: pocket wants 1 GB"
    )
    disk = shutil.disk_usage(Path.cwd())
    enough = disk.free > 2 * GB
    found = f"{disk.free / GB:.0f} GB free of {disk.total / GB:.0f} GB here"
    yield Check(section, "disk", OK if enough else WARN, found, "" if enough else "checkpoints need room: make some")


def _gpu() -> Iterator[Check]:
    section, torch = "GPU", _torch()
    if torch is None:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = f"{device.major}.{device.minor}"
            found = f"{device.name}, {free / GB:.1f} GB free of {total / GB:.1f} GB, capability {capability}"
            new = device.major >= 8
            remedy = "" if new else 'no bf16 before capability 8.0: load with dtype="float32"; fp16 overflows in V2'
            yield Check(section, f"cuda:{index}", OK if new else WARN, found, remedy)
    elif shutil.which("nvidia-smi"):
        found = f"an NVIDIA driver is here, but torch {torch.__version__} does not use it"
        remedy = "install a CUDA build of torch" if torch.version.cuda is None else "update the driver"
        yield Check(section, "cuda", WARN, found, remedy)
    else:
        yield Check(section, "cuda", OK, "none: the CPU does everything")


def _kernels() -> Iterator[Check]:
    section, torch = "Kernels", _torch()
    home = util.find_spec("workbench_kernels")
    if home is None:
        remedy = "pip install -e . (the folder kernels/ is imported under this name only where it was installed)"
        yield Check(section, "workbench_kernels", WARN, "not importable: every op runs its reference body", remedy)
        return
    names = sorted(path.stem for folder in home.submodule_search_locations or () for path in Path(folder).glob("*.py"))
    if not names:
        yield Check(section, "workbench_kernels", OK, "this version has none yet: every op runs its reference body")
    elif torch is None or not torch.cuda.is_available():
        yield Check(
            section, "workbench_kernels", OK, f"{', '.join(names)}: need a GPU, so every op runs its reference body"
        )
    elif installed("triton") is None:
        yield Check(section, "workbench_kernels", WARN, f"{', '.join(names)}: need triton", "pip install triton")
    else:
        yield Check(section, "workbench_kernels", OK, ", ".join(names))


def _pocket() -> Iterator[Check]:
    section = "Pocket model"
    home = Path(__file__).parent / "pocket"
    if not (home / "config.json").is_file():
        remedy = "workbench train pocket, or reinstall deepseek-workbench"
        yield Check(section, "files", FAIL, "not there: load() has no default model", remedy)
        return
    size = sum(path.stat().st_size for path in home.iterdir())
    yield Check(section, "files", OK, f"{size / 1e6:.1f} MB")
    if _torch() is None:
        return
    try:
        bench = import_module("workbench.workbench").load("pocket", device="cpu")
        stats = bench.generate("Hello", import_module("workbench.sampling").Sampling(max_tokens=32, seed=0)).stats
    except (WorkbenchError, ImportError, OSError) as error:
        yield Check(section, "answers", FAIL, f"{type(error).__name__}: {error}", "reinstall deepseek-workbench")
        return
    found = f"{stats.tokens_per_second:.0f} tokens/s on the CPU, measured just now over {stats.tokens} tokens"
    yield Check(section, "answers", OK, found)


def _expectations() -> Iterator[Check]:
    """A token reads every active weight once, so bandwidth bounds the speed of a model larger than the caches."""
    section, torch = "What will run fast here, and why not", _torch()
    if torch is None:
        return
    where, room = "memory", float(import_module("psutil").virtual_memory().available)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        where, room = "GPU memory", float(torch.cuda.mem_get_info()[0])
    bandwidth, measured = import_module("workbench.bandwidth"), None
    try:
        measured = bandwidth.saved()
    except WorkbenchError as error:
        yield Check(section, "measurement", WARN, str(error), MEASURE)
    reading = disk = None
    if measured is not None:
        reading, disk = measured.reading(device), bandwidth.fastest(measured.disk)
        yield from (Check(section, name, OK, found) for name, found in measured.lines())
        busy = measured.load > measured.cores / 2
        remedy = "workbench doctor --measure again when less is running" if busy else ""
        yield Check(section, "measured", WARN if busy else OK, measured.how, remedy)
    speed = bandwidth.glance(device) if reading is None else reading.median
    if reading is None:
        yield Check(section, "bandwidth", OK, f"{speed / GB:.0f} GB/s read from {where}, measured just now", MEASURE)
    means = Means(where, room, speed, None if disk is None else disk.median)
    for name, title in (("pocket", "pocket"), ("v2-lite", "V2-Lite, 16B"), ("v2", "V2, 236B")):
        config = Config.preset(name)
        total, active = config.parameters()
        active -= config.vocab_size * config.hidden_size  # of the embedding, one row is read
        if 2 * total < 0.1 * GB:
            found = f"yes: {2 * total / GB:.2f} GB of weights in bf16"
            yield Check(section, title, OK, f"{found}; bound by the overhead of each step, not by bandwidth")
            continue
        for width, bits in WIDTHS.items():
            name = title if width == "bf16" else f"{title.split(',')[0]}, {width}"
            yield _expectation(section, name, total * bits / 8, active * bits / 8, width, means)


class Means(NamedTuple):
    """Where weights go: the bytes free there, and bytes per second from there and from the disk (None: unknown)."""

    where: str
    room: float
    speed: float
    disk: float | None


def _expectation(section: str, title: str, size: float, read: float, width: str, means: Means) -> Check:
    """Of a model of `size` bytes, `read` of them a token."""
    needs = f"{size / GB:.2f} GB of weights in {width}"
    if size <= means.room:
        speed = means.speed / read
        found = f"{needs}, {read / GB:.1f} GB read a token: at most {speed:.1f} tokens/s"
        return Check(section, title, OK, f"{'yes' if speed > 10 else 'slowly'}: {found}")
    found = f"no: {needs}, {means.room / GB:.0f} GB of {means.where} free"
    if means.disk is not None:
        found += f"; {read / means.disk:.1f} s a token if all {read / GB:.1f} GB of it are read from disk"
    return Check(section, title, WARN, found, f"a machine with {size * 1.1 / GB:.0f} GB")
