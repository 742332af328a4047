"""Every file in kernels/ on a GPU: right here and now, then timed on real shapes beside its limit and torch's own."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import torch

from workbench import door
from workbench.benchmarks.measure import DTYPES, RESULTS, about, computing_with, keep, load_average
from workbench.benchmarks.speeds import Rates, rates_of
from workbench.config import Config
from workbench.errors import RequestError

NAMES = ("mla_decode", "mla_prefill", "experts", "linear", "route", "append", "add_norm", "rms_norm")
FLUSHED = 256 * 2**20  # bytes written before each launch, more than any second-level cache holds


@dataclass(frozen=True)
class Row:
    """One shape of a kernel: microseconds of every launch, ours and torch's in turns. `wrong`: why it was not timed."""

    kernel: str
    shape: str
    bytes: int
    operations: int
    ours: tuple[float, ...] = ()
    peer: tuple[float, ...] = ()
    wrong: str = ""

    def least(self, rates: Rates) -> tuple[float, str]:
        """Microseconds that the shape takes at these rates, and what binds it."""
        moving, computing = self.bytes / rates.bandwidth, self.operations / rates.operations
        return 1e6 * max(moving, computing), "bytes" if moving >= computing else "operations"

    def to_dict(self) -> dict:
        found = {"median": statistics.median(self.ours) if self.ours else None}
        return asdict(self) | found | {"peer_median": statistics.median(self.peer) if self.peer else None}


@dataclass(frozen=True)
class Result:
    """One run: the device, its rates, measured in the same run, and a row for each shape."""

    about: dict
    rates: Rates
    rows: tuple[Row, ...]

    def to_dict(self) -> dict:
        rows = [row.to_dict() | dict(zip(("least", "binds"), row.least(self.rates))) for row in self.rows]
        for row in rows:
            row["share"] = row["least"] / row["median"] if row["median"] else None
        return {"about": self.about, "rates": asdict(self.rates), "rows": rows}

    def __str__(self) -> str:
        rates = f"{self.rates.bandwidth / 1e12:.2f} TB/s, {self.rates.operations / 1e12:,.0f} TFLOP/s"
        head = f"{self.about['device']}: {rates}, measured in this run; medians in microseconds"
        lines = [head, "", f"{'kernel':13}{'shape':62}{'least':>9} {'by':11}{'median':>9}{'share':>7}{'torch':>9}"]
        for row in self.rows:
            least, binds = row.least(self.rates)
            line = f"{row.kernel:13}{row.shape:62}{least:9.1f} {binds:11}"
            if row.ours:
                median = statistics.median(row.ours)
                line += f"{median:9.1f}{least / median:7.0%}"
                line += f"{statistics.median(row.peer):9.1f}" if row.peer else f"{'-':>9}"
            lines.append(line + (f"  {row.wrong}" if row.wrong else ""))
        return "\n".join(lines)

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, "kernels", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    dtype: str = "bfloat16",
    threads: int | None = None,
    device: str = "cuda",
    rounds: int = 30,
    only: list[str] | None = None,
) -> Result:
    """Of all kernels, or of those named; `checkpoint` is not used, shapes are those of V2-Lite and V2."""
    wrong = set(only or ()) - set(NAMES)
    if wrong or rounds < 1:
        raise RequestError(f"there are {', '.join(NAMES)}, and rounds must be at least 1; got {only}, {rounds}.")
    where = torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        raise RequestError(
            "kernels are timed on a GPU, and there is none here. Whether they are right is tested without one: "
            "python -m pytest tests/kernels. What bounds them: kernels/README.md."
        )
    with computing_with(threads), torch.inference_mode():
        rates = rates_of(where, DTYPES["bfloat16"])
        rows = [row for name in NAMES if only is None or name in only for row in _rows(name, where, rounds)]
        facts = about(Config.preset("v2-lite"), Path("kernels"), None)
        facts |= {"dtype": "bfloat16", "device": torch.cuda.get_device_name(where), "load": load_average()}
    return Result(facts, rates, tuple(rows))


def _rows(name: str, device: torch.device, rounds: int) -> Iterator[Row]:
    file, case = door.kernel(name), import_module(f"workbench.benchmarks.cases.{name}")
    if file is None:
        raise RequestError("Triton is not installed, and kernels are written in it: pip install triton.")
    for shape, example in case.MEASURED.items():
        arguments = case.arguments(example, device, torch.Generator(device).manual_seed(0))
        row = Row(name, shape, *file.work(*arguments))
        if why := file.refuses(*arguments):
            yield replace(row, wrong=f"refused: {why}")
            continue
        try:
            case.check(file.launch(*arguments), case.reference(*arguments), case.truth(*arguments))
        except AssertionError as error:
            yield replace(row, wrong=f"WRONG: {error}")
            continue
        sides = [lambda arguments=arguments: file.launch(*arguments), case.peer(*arguments)]
        times = _timed([side for side in sides if side is not None], device, rounds)
        yield replace(row, ours=tuple(times[0]), peer=tuple(times[1]) if len(times) > 1 else ())


def _timed(sides: list[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    """Microseconds of each launch of each side, taken in turns, with nothing of it in the caches."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    for side in sides:
        for _ in range(3):
            side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, kept in zip(sides, times, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side()
            end.record()
            torch.cuda.synchronize(device)
            kept.append(1e3 * start.elapsed_time(end))
    return times
