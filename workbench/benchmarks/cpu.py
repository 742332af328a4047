"""This machine's speed against transformers: prefill and decode on one checkpoint, taken in turns in one process."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from workbench import machine
from workbench.benchmarks.rivals import CACHE, Ours, Rival, Setting, Transformers
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.engine import Engine
from workbench.errors import CheckpointError, RequestError
from workbench.model import Model
from workbench.sampling import Sampling
from workbench.tokenizer import Tokenizer

POCKET = Path(__file__).parent.parent / "pocket"
RESULTS = Path(__file__).parent.parent.parent / "kernels" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECKED = 96  # positions whose logits must agree before anything is timed
STEPS = 32  # tokens of one decode measurement
TRIED = 8  # of them, to choose among the settings of transformers
BUSY = 0.5  # load average before the start beyond which figures are disturbed
LONG_ENOUGH = 0.25  # seconds; shorter passes are repeated within a measurement

SHAPES = {
    "28m": replace(
        Config.preset("pocket"),
        hidden_size=320,
        intermediate_size=832,
        num_hidden_layers=8,
        n_routed_experts=48,
        name="random 28m",
    ),
    "200m": replace(
        Config.preset("pocket"),
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=12,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=64,
        name="random 200m",
    ),
}


class Workload(NamedTuple):
    name: str
    context: int  # tokens in the cache before the clock starts
    new: int  # tokens of one pass
    passes: int
    target: float  # how many times faster than transformers we mean to be


WORKLOADS = (
    Workload("prefill 128", 0, 128, 1, 1.0),
    Workload("prefill 512", 0, 512, 1, 1.0),
    Workload("decode at 0", 0, 1, STEPS, 1.2),
    Workload("decode at 1,024", 1024, 1, STEPS, 1.5),
)


@dataclass(frozen=True)
class Row:
    """Tokens per second in every round, ours and theirs taken in turns."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    target: float | None = None
    setting: str = ""

    @property
    def ratio(self) -> float | None:
        """Of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else None

    @property
    def met(self) -> bool | None:
        return self.ratio >= self.target if self.theirs else None

    def to_dict(self) -> dict:
        summary = {"median_ours": statistics.median(self.ours), "ratio": self.ratio, "met": self.met}
        if self.theirs:
            summary["median_theirs"] = statistics.median(self.theirs)
        return asdict(self) | summary

    def __str__(self) -> str:
        line = f"{self.name:24}{statistics.median(self.ours):10,.0f}"
        if not self.theirs:
            return f"{line}{'':35}{min(self.ours):,.0f} to {max(self.ours):,.0f}"
        each = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        verdict = "met" if self.met else "MISSED"
        return (
            f"{line}{statistics.median(self.theirs):14,.0f}{self.ratio:8.2f}x"
            f"{f'{min(each):.2f} to {max(each):.2f}':>16}{self.target:8.1f}x {verdict:7}{self.setting}"
        )


@dataclass(frozen=True)
class Result:
    """One run of the benchmark: where it ran, on what, and every figure."""

    about: dict
    difference: float  # largest |difference| of logits before the clocks started
    rows: tuple[Row, ...]

    def to_dict(self) -> dict:
        return {"about": self.about, "difference": self.difference, "rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        about = self.about
        head = (
            f"{about['model']}: {about['parameters'] / 1e6:.1f}M parameters, {about['active'] / 1e6:.1f}M active; "
            f"{about['dtype']}, threads: {about['threads']}, rounds: {about['rounds']}\n{about['cpu']}; "
            f"torch {about['torch']}, transformers {about['transformers']}\n"
            f"logits agree within {self.difference:.1e} over {CHECKED} positions\n"
        )
        if about["load"] > BUSY:
            head += (
                f"other programs were running (load {about['load']:.1f}): expect scatter, and measure again when idle\n"
            )
        columns = (
            f"{'tokens/s, median':24}{'workbench':>10}{'transformers':>14}{'ratio':>9}{'each round':>16}{'target':>9}"
        )
        return head + "\n" + "\n".join([columns, *map(str, self.rows)])

    def save(self, folder: Path = RESULTS) -> Path:
        if not folder.parent.is_dir():
            raise RequestError(f"{folder.parent} is not there: results are kept in a checkout of the project.")
        folder.mkdir(exist_ok=True)
        about = self.about
        day = about["date"][:10]
        path = folder / f"cpu-{day}-{about['model'].replace(' ', '-')}-{about['dtype']}-{about['threads']}t.json"
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int = 5,
) -> Result:
    """Runs everything on `checkpoint`, on random weights of a `shape`, or on pocket.

    RequestError where transformers is missing or computes something else; then nothing is timed.
    """
    if rounds < 1 or (threads is not None and threads < 1):
        raise RequestError("rounds and threads must be at least 1.")
    if checkpoint is not None and shape is not None:
        raise RequestError("give a checkpoint or a shape, not both.")
    load = psutil.getloadavg()[0]
    with _threads(threads), tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if shape is not None:
            checkpoint = Path(folder)
            save(Model(SHAPES[shape], Random(SHAPES[shape], seed=0)), checkpoint)
        elif checkpoint is None and not (POCKET / "config.json").is_file():
            raise CheckpointError("pocket is not here; train it, or measure --shape 28m or --checkpoint DIR.")
        path = checkpoint or POCKET
        ours, theirs = Ours(path, DTYPES[dtype]), Transformers(path, DTYPES[dtype])
        config = ours.model.config
        longest = max(job.context + job.new * job.passes for job in WORKLOADS)
        if config.max_position_embeddings < longest:
            raise RequestError(f"{path}: a context of {longest} is measured, and this model has less.")
        tokens = torch.randint(config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
        difference = _same(ours, theirs, tokens[:, :CHECKED])
        rows = [_compare(job, ours, theirs, tokens, rounds) for job in WORKLOADS]
        rows += _engine(ours.model, path, tokens, rounds)
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "model": f"random {shape}" if shape else path.resolve().name,
            "parameters": config.parameters().total,
            "active": config.parameters().active,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "load": round(load, 2),
            "cpu": f"{machine.cpu_name()}, {machine.cores()} cores",
            "torch": torch.__version__,
            "transformers": theirs.version,
        }
    return Result(about, difference, tuple(rows))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or machine.cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same(ours: Ours, theirs: Transformers, tokens: torch.Tensor) -> float:
    """The largest difference; RequestError beyond what rounding explains. In bf16 a near tie may choose another expert,
    so there most positions must agree, not all."""
    a, b = ours.logits(tokens).float(), theirs.logits(tokens).float()
    worst = (a - b).abs().amax(-1)  # [1, T]
    exact = ours.model.dtype == torch.float32
    typical = (worst.max() if exact else worst.median()).item()
    if typical > (1e-3 if exact else 0.1 * b.std().item()):
        raise RequestError(
            f"the two sides do not compute the same (logits differ by {typical:.2g}): nothing was timed."
        )
    return worst.max().item()


def _compare(job: Workload, ours: Ours, theirs: Transformers, tokens: torch.Tensor, rounds: int) -> Row:
    setting, repeats = _fastest(job, theirs, tokens)
    theirs.use(setting)
    sides = [_runner(rival, job, tokens) for rival in (ours, theirs)]
    for run in sides:
        run(passes=1)  # warm
    pairs = [[run(repeats=repeats) for run in sides] for _ in range(rounds)]
    return Row(job.name, *(tuple(side) for side in zip(*pairs, strict=True)), target=job.target, setting=str(setting))


def _fastest(job: Workload, theirs: Transformers, tokens: torch.Tensor) -> tuple[Setting, int]:
    """transformers' best setting for this workload, and how often to repeat it for a measurement long enough."""
    passes = min(job.passes, TRIED)
    speeds = {}
    for setting in theirs.settings(job.new):
        theirs.use(setting)
        run = _runner(theirs, job, tokens)
        speeds[setting] = max(run(passes=passes) for _ in range(3))
    best = max(speeds, key=speeds.get)
    return best, max(1, round(LONG_ENOUGH * speeds[best] / (job.new * job.passes)))


def _runner(rival: Rival, job: Workload, tokens: torch.Tensor) -> Callable[..., float]:
    """A function that measures tokens per second. What fills the cache before the clock starts is done here, once."""
    filled = rival.start(tokens[:, : job.context]) if job.context else None

    def run(passes: int = job.passes, repeats: int = 1) -> float:
        seconds = 0.0
        for _ in range(repeats):
            if filled is None:
                cache = rival.start(tokens[:, :0])
            else:
                cache = filled
                rival.rewind(cache, job.context)
            start = time.perf_counter()
            for done in range(passes):
                position = job.context + done * job.new
                rival.advance(tokens[:, position : position + job.new], cache)
            seconds += time.perf_counter() - start
        return job.new * passes * repeats / seconds

    return run


def _engine(model: Model, path: Path, tokens: torch.Tensor, rounds: int) -> Iterator[Row]:
    """Decoding as a user sees it: sampling, alternatives and text included. Nothing where there is no tokenizer."""
    home = next((folder for folder in (path, POCKET) if (folder / "tokenizer.json").is_file()), None)
    tokenizer = home and Tokenizer(home)
    if tokenizer is None or tokenizer.vocab_size > model.config.vocab_size:
        return
    engine = Engine(model, tokenizer, CACHE[model.dtype])
    for context in (1, 1024):
        prompt = tokens[0, :context].tolist()
        speeds = [_generated(engine, prompt, seed) for seed in range(rounds + 1)]
        yield Row(f"whole engine at {context:,}", tuple(speeds[1:]))  # the first filled the cache


def _generated(engine: Engine, prompt: list[int], seed: int) -> float:
    """Tokens per second over at least STEPS tokens; an answer that ends early is followed by another."""
    tokens, seconds = 0, 0.0
    while tokens < STEPS:
        seed += 1000
        stats = engine.generate(prompt, Sampling(temperature=1.0, max_tokens=STEPS + 1, seed=seed)).stats
        tokens, seconds = tokens + stats.tokens - 1, seconds + stats.decode_seconds
    return tokens / seconds


def _commit() -> str:
    """Of this checkout, "+" where files have changed since; empty outside one."""
    where = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    if head.returncode:
        return ""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=where, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")
