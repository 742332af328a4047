"""How fast bytes move on this machine: from main memory, from a disk, to a GPU and inside it. Measured, and kept.

A token of a large model reads billions of bytes once, so these rates bound its speed. All readings are kept and none is
thrown away: a cloud disk bursts and is throttled, and a neighbour on the machine is part of what there is.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from workbench import __version__, machine
from workbench.diskspeed import read_blocks
from workbench.errors import RequestError

VERSION = 1  # of the file
MIB, GB = 2**20, 1e9
BLOCK = 4 * MIB  # about an expert of V2-Lite at 4 bits
READERS = (1, 4)
LARGE = 1024 * MIB  # larger than any processor's caches
ROUNDS = 7


@dataclass(frozen=True)
class Rate:
    """Bytes per second, with `at` threads, readers or copies at a time: every reading, in order."""

    at: int
    readings: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.readings)

    def __str__(self) -> str:
        low, high = min(self.readings) / GB, max(self.readings) / GB
        return f"{self.median / GB:.3g} GB/s, {low:.3g} to {high:.3g} in {len(self.readings)} readings"


def fastest(rates: tuple[Rate, ...]) -> Rate | None:
    """The one with the highest median; None of none."""
    return max(rates, key=lambda rate: rate.median, default=None)


@dataclass(frozen=True)
class Measured:
    """Rates of one machine, and what it was.

    memory         read from main memory: with one thread, and with as many as torch uses
    disk           blocks read at random offsets, by some numbers of readers; empty where it could not be measured
    link           host to device: pinned memory, one copy a block; None without a GPU
    device_memory  read from the GPU's memory; None without a GPU
    block, file    bytes of a block, and of the file they were read from
    past_cache     how the page cache was kept out of it
    load           processes that wanted to run in the minute before
    """

    memory: tuple[Rate, ...]
    disk: tuple[Rate, ...]
    link: Rate | None
    device_memory: Rate | None
    block: int
    file: int
    past_cache: str
    file_system: str
    when: str
    load: float
    cpu: str
    cores: int
    threads: int
    device: str
    torch: str
    package: str

    def reading(self, device: str) -> Rate | None:
        """Of the memory of "cpu" or "cuda"; None where it was not measured."""
        return fastest(self.memory) if device == "cpu" else self.device_memory

    def lines(self) -> list[tuple[str, str]]:
        """Name and finding of each rate."""
        found = [(f"memory, {_count(rate.at, 'thread')}", str(rate)) for rate in self.memory]
        found += [(f"disk, {_count(rate.at, 'reader')}", str(rate)) for rate in self.disk]
        named = (("host to GPU", self.link), ("GPU memory", self.device_memory))
        return found + [(name, str(rate)) for name, rate in named if rate]

    @property
    def how(self) -> str:
        disk = self.past_cache
        if self.disk:
            disk = f"blocks of {self.block / MIB:.3g} MiB of a file of {self.file / MIB:.0f} MiB on {self.file_system}"
            disk += f", {self.past_cache}"
        return f"{self.when}, at a load of {self.load:.1f}; disk: {disk}"

    def __str__(self) -> str:
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        gpu = "" if self.link is None else f", {self.device}"
        head = f"{self.cpu}, {self.cores} cores{gpu}; torch {self.torch}, workbench {self.package}"
        return "\n".join([head, *(f"  {name:{width}}  {found}" for name, found in lines), f"measured {self.how}"])

    def to_dict(self) -> dict:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict) -> "Measured":
        """RequestError if it is of another version, or something is missing."""
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise RequestError(
                f"a measurement of version {version}; this package reads {VERSION}: run `workbench doctor --measure`."
            )
        try:
            known = {field.name: data[field.name] for field in fields(cls)}
            for name in ("memory", "disk"):
                known[name] = tuple(map(_rate, known[name]))
            for name in ("link", "device_memory"):
                known[name] = None if known[name] is None else _rate(known[name])
            if not known["memory"]:
                raise ValueError("no rate of memory")
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"a damaged measurement ({error!r}): run `workbench doctor --measure`.") from error
        return cls(**known)

    def save(self) -> Path:
        """Replaces what `saved` gives, in one step. RequestError where the folder cannot be written."""
        path = place()
        draft = _made(path.parent) / f".{os.getpid()}.json"
        try:
            draft.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(draft, path)
        except OSError as error:
            raise RequestError(f"cannot keep the measurement in {path.parent}: {error.strerror}.") from error
        finally:
            draft.unlink(missing_ok=True)
        return path


def place() -> Path:
    """Where the measurement of this user is kept."""
    return _cache_folder() / "machine.json"


def saved() -> Measured | None:
    """What was measured here before, or None.

    RequestError if the file cannot be used: of another version, damaged, or of another machine that shares this home.
    """
    path = place()
    try:
        measured = Measured.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}): run `workbench doctor --measure`.") from error
    except RequestError as error:
        raise RequestError(f"{path} is {error}") from error
    if (measured.cpu, measured.cores) != (machine.cpu_name(), machine.cores()):
        raise RequestError(
            f"{path} was measured with {measured.cores} cores of {measured.cpu}; this machine gives "
            f"{machine.cores()} of {machine.cpu_name()}: run `workbench doctor --measure`."
        )
    return measured


def measure(
    folder: Path | None = None,
    device: str = "auto",
    progress: Callable[[str], None] = lambda stage: None,
    *,
    block: int = BLOCK,
    readers: tuple[int, ...] = READERS,
) -> Measured:
    """Takes half a minute and, for that long, up to 1 GiB on the file system of `folder` (default: the user's cache).

    BudgetError where too little is free; RequestError for a folder that cannot be written, a device that is not here,
    or blocks of no whole pages.
    """
    gpu = _gpu(device)
    load = psutil.getloadavg()[0]
    disk = read_blocks(_made(_cache_folder()) if folder is None else Path(folder), block, readers, progress)
    progress("reading main memory")
    memory = _memory()
    link = device_memory = None
    if gpu is not None:
        progress("copying to the GPU")
        link = Rate(1, tuple(_copies(gpu, block)))
        progress("reading the GPU's memory")
        room = min(LARGE, torch.cuda.mem_get_info(gpu)[0] // 8)
        device_memory = Rate(1, tuple(_reads(torch.ones(room // 4, device=gpu), ROUNDS, times=8)))
    return Measured(
        memory=memory, disk=tuple(Rate(count, tuple(readings)) for count, readings in disk.rates.items()),
        link=link, device_memory=device_memory,
        block=block, file=disk.file, past_cache=disk.past_cache, file_system=disk.file_system,
        when=datetime.now(UTC).isoformat(timespec="seconds"), load=load,
        cpu=machine.cpu_name(), cores=machine.cores(), threads=torch.get_num_threads(),
        device="cpu" if gpu is None else torch.cuda.get_device_name(gpu),
        torch=torch.__version__, package=__version__,
    )  # fmt: skip


def glance(device: str) -> float:
    """Bytes per second, the best of three reads of 256 MB: for a first idea, in a moment."""
    return max(_reads(torch.ones(64 * MIB, device=device), 3))


def _gpu(device: str) -> torch.device | None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"no device is called {device!r}; say auto, cpu, cuda or cuda:1.") from error
    if found.type != "cuda":
        return None
    if (found.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"{device} is not here: torch sees {_count(torch.cuda.device_count(), 'GPU')}.")
    return found


def reads() -> Rate:
    """From main memory, with as many threads as torch uses."""
    block = torch.ones(min(LARGE, psutil.virtual_memory().available // 8) // 4)  # larger than the processor's caches
    return Rate(torch.get_num_threads(), tuple(_reads(block, ROUNDS)))


def _memory() -> tuple[Rate, ...]:
    threads = torch.get_num_threads()
    try:
        rates = []
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            rates.append(reads())
    finally:
        torch.set_num_threads(threads)
    return tuple(rates)


def _reads(block: torch.Tensor, rounds: int, times: int = 1) -> Iterator[float]:
    """A sum reads every element once and computes next to nothing."""
    block.sum().item()
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            total = block.sum()
        total.item()  # waits for a GPU
        yield times * block.nbytes / (time.perf_counter() - start)


def _copies(gpu: torch.device, block: int) -> Iterator[float]:
    count = max(1, 256 * MIB // block)
    host = torch.zeros(count, block, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros_like(host, device=gpu)
    torch.cuda.synchronize(gpu)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for source, target in zip(host, there, strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(gpu)
        yield host.nbytes / (time.perf_counter() - start)


def _cache_folder() -> Path:
    """A relative XDG_CACHE_HOME is ignored, as the XDG specification asks."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "deepseek-workbench"


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"cannot make {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours."
        ) from error
    return folder


def _rate(data: dict) -> Rate:
    readings = tuple(map(float, data["readings"]))
    if not readings or min(readings) <= 0:
        raise ValueError("a rate without readings")
    return Rate(int(data["at"]), readings)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
