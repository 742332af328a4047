"""What `bench decode`, `prefill` and `batch` share: a model on a device, limits measured in the same run, and rows.

A limit is bytes over the bandwidth, or operations over the rate of products, both measured here and now.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from workbench import bandwidth
from workbench.benchmarks.measure import (
    DTYPES,
    RELEASED,
    RESULTS,
    about,
    checkpoint_of,
    computing_with,
    keep,
    load_average,
    scatter,
)
from workbench.benchmarks.rivals import Transformers
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.errors import RequestError
from workbench.matrix import Matrix
from workbench.model import Model
from workbench.opening import open_model

GIB = 2**30
SQUARE = {"cuda": 8192, "cpu": 2048}  # width of the product that measures the rate of operations


@dataclass(frozen=True)
class Rates:
    """Of the device, measured in this run. `bandwidth` in bytes a second: copies on a GPU, reads on a CPU."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Row:
    """Tokens a second in every round, the sides taken in turns."""

    name: str
    sides: dict[str, tuple[float, ...]]  # the first is ours, and what the others are compared with
    bound: float  # tokens a second
    binds: str  # what the bound counts

    @property
    def medians(self) -> dict[str, float]:
        return {side: statistics.median(speeds) for side, speeds in self.sides.items()}

    @property
    def share(self) -> float:
        """Of the bound that our side reaches."""
        return next(iter(self.medians.values())) / self.bound

    def to_dict(self) -> dict:
        return asdict(self) | {"medians": self.medians, "share": self.share}

    def __str__(self) -> str:
        first = next(iter(self.medians.values()))
        lines = [f"{self.name}: at most {self.bound:,.0f} by {self.binds}; {self.share:.0%} of that"]
        for side, median in self.medians.items():
            low, high = min(self.sides[side]), max(self.sides[side])
            lines.append(f"  {side:34}{median:12,.1f}{first / median:8.2f}x   {low:,.1f} to {high:,.1f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """One run: where it was, its limits, its rows. Speeds are tokens a second, ratios ours over the side."""

    kind: str
    about: dict
    rates: Rates
    rows: tuple[Row, ...]

    def to_dict(self) -> dict:
        return {"about": self.about, "rates": asdict(self.rates), "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        a = self.about
        head = (
            f"{a['model']}: {a['parameters'] / 1e6:,.1f}M parameters, {a['active'] / 1e6:,.1f}M active; {a['dtype']}\n"
            f"{a['device']}; torch {a['torch']}, threads: {a['threads']}\n{scatter(a['load'])}"
            f"bandwidth {self.rates.bandwidth / 1e9:,.1f} GB/s, products {self.rates.operations / 1e12:,.2f} TFLOP/s, "
            "in this run\n"
        )
        return head + "\n" + "\n".join(map(str, self.rows))

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, self.kind, self.to_dict())


@dataclass(frozen=True)
class Bench:
    """A model to measure, and its rival where there is one."""

    model: Model
    rival: Transformers | None
    path: Path | None
    shape: str | None
    rates: Rates
    load: float
    dtype: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tokens(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def seconds(self, work: Callable[[], object]) -> float:
        """Of what `work` does, on the device too."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def result(self, kind: str, rows: Sequence[Row]) -> Result:
        facts = about(self.model.config, self.path or Path(self.shape or "."), self.shape)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else facts["cpu"]
        facts |= {"dtype": self.dtype, "device": name, "load": self.load}
        facts["transformers"] = self.rival.version if self.rival else None
        return Result(kind, facts, self.rates, tuple(rows))


@contextmanager
def opened(
    checkpoint: Path | None, shape: str | None, dtype: str, threads: int | None, device: str, rival: bool = True
) -> Iterator[Bench]:
    """The model of a checkpoint, of a shape with random weights made on the device, or pocket."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("there is no GPU here: give --device cpu, or run this where one is.")
    load, kind = load_average(), DTYPES[dtype]
    with computing_with(threads), torch.inference_mode():
        rates = rates_of(torch.device(device), kind)
        if shape in RELEASED:
            config = Config.preset(shape)
            model = Model(config, Random(config, dtype=kind, device=device))
            fits = 1.2 * config.parameters().total * kind.itemsize < _free()
            other = _drawn(config, kind, device) if rival and fits else None
            yield Bench(model, other, None, shape, rates, load, dtype)
            return
        with checkpoint_of(checkpoint, shape) as path:
            model = open_model(path, dtype=kind, device=device)
            other = Transformers(path, kind, device) if rival else None
            yield Bench(model, other, path, shape, rates, load, dtype)


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _drawn(config: Config, dtype: torch.dtype, device: str) -> Transformers:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
        return Transformers(Path(folder), dtype, device, random=True)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Medians of a few repeats; on a GPU of copies of a gigabyte, on a CPU of reads with torch's threads."""
    a = torch.randn(SQUARE[device.type], SQUARE[device.type], device=device).to(dtype)
    operations = 2 * len(a) ** 3 / _median(lambda: a @ a, device)
    if device.type == "cpu":
        return Rates(bandwidth.reads().median, operations)
    source = torch.ones(GIB // 4, device=device)
    target = torch.empty_like(source)
    return Rates(2 * GIB / _median(lambda: target.copy_(source), device), operations)


def _median(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    seconds = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def weight_bytes(model: Model, tokens: int = 1) -> float:
    """Bytes of weights that a pass of so many tokens reads: of routed experts the distinct ones that as many draws at
    random would choose, of the embedding only their rows."""
    config, total = model.config, 0.0
    chosen = 1.0
    if config.n_routed_experts:
        chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    for name, weight in model.tensors.items():
        size = weight.nbytes
        if ".experts." in name:
            size *= chosen
        elif name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            size *= min(1.0, tokens / config.vocab_size)
        total += size
    return total


def operations(model: Model, tokens: int, context: int = 0) -> float:
    """Multiplications and additions of a pass over so many tokens of one sequence, in the cheaper form of attention."""
    config, total = model.config, 0.0
    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 1
    for name, weight in model.tensors.items():
        if weight.shape[-1:] and len(weight.shape) == 2 and name != "model.embed_tokens.weight":
            count = weight.shape.numel() if isinstance(weight, Matrix) else weight.numel()
            total += 2 * tokens * count * (share if ".experts." in name else 1)
    pairs = tokens * context + tokens * (tokens + 1) / 2
    widths = config.qk_head_dim + config.v_head_dim
    return total + 2 * pairs * config.num_attention_heads * widths * config.num_hidden_layers
