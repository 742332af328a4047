"""This machine's speed against transformers, and llama.cpp where it is named: prefill and decode on one checkpoint.

Their rounds are taken in turns with ours: transformers in this process, llama.cpp in another.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from workbench.benchmarks import gguf
from workbench.benchmarks.llamacpp import LlamaCpp
from workbench.benchmarks.measure import (
    DTYPES,
    POCKET,
    RESULTS,
    about,
    checkpoint_of,
    computing_with,
    keep,
    load_average,
    scatter,
)
from workbench.benchmarks.rivals import CACHE, Ours, Rival, Setting, Transformers
from workbench.checkpoint import Safetensors
from workbench.engine import Engine
from workbench.errors import RequestError
from workbench.model import Model
from workbench.sampling import Sampling
from workbench.tokenizer import Tokenizer

CHECKED = 96  # positions whose logits must agree before anything is timed
STEPS = 32  # tokens of one decode measurement
TRIED = 8  # of them, to choose among the settings of transformers
LONG_ENOUGH = 0.25  # seconds; shorter passes are repeated within a measurement


class Workload(NamedTuple):
    name: str
    context: int  # tokens in the cache before the clock starts
    new: int  # tokens of one pass
    passes: int
    target: float  # how many times faster than transformers we mean to be


WORKLOADS = (
    Workload("prefill 128", 0, 128, 1, 1.0),
    Workload("prefill 512", 0, 512, 1, 1.0),
    Workload("decode at 0", 0, 1, STEPS, 5.0),
    Workload("decode at 1,024", 1024, 1, STEPS, 5.0),
)


@dataclass(frozen=True)
class Row:
    """Tokens per second in every round, ours and theirs taken in turns."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    target: float | None = None
    setting: str = ""
    llama: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Of the medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else None

    @property
    def to_llama(self) -> float | None:
        """Ours over llama.cpp's, of the medians."""
        return statistics.median(self.ours) / statistics.median(self.llama) if self.llama else None

    @property
    def met(self) -> bool | None:
        return self.ratio >= self.target if self.theirs else None

    def to_dict(self) -> dict:
        summary = {"median_ours": statistics.median(self.ours), "ratio": self.ratio, "met": self.met}
        summary["ratio_to_llama"] = self.to_llama
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
            f"{f'{min(each):.2f} to {max(each):.2f}':>16}{self.target:8.1f}x {verdict:7}"
            f"{f'{statistics.median(self.llama):12,.0f}{self.to_llama:8.2f}x' if self.llama else ''}  {self.setting}"
        )


@dataclass(frozen=True)
class Result:
    """One run of the benchmark: where it ran, on what, and every figure."""

    about: dict
    difference: float  # largest |difference| of logits before the clocks started
    rows: tuple[Row, ...]

    @property
    def to_llama(self) -> float | None:
        """Geometric mean of the rows' ratios to llama.cpp."""
        ratios = [row.to_llama for row in self.rows if row.llama]
        return statistics.geometric_mean(ratios) if ratios else None

    def to_dict(self) -> dict:
        own = {"about": self.about, "difference": self.difference, "ratio_to_llama": self.to_llama}
        return own | {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        about = self.about
        head = (
            f"{about['model']}: {about['parameters'] / 1e6:.1f}M parameters, {about['active'] / 1e6:.1f}M active; "
            f"{about['dtype']}, threads: {about['threads']}, rounds: {about['rounds']}\n{about['cpu']}; "
            f"torch {about['torch']}, transformers {about['transformers']}\n"
            f"logits agree within {self.difference:.1e} over {CHECKED} positions\n"
        )
        head += scatter(about["load"])
        if about.get("refused"):
            head += f"not fused: {about['refused']}\n"
        columns = (
            f"{'tokens/s, median':24}{'workbench':>10}{'transformers':>14}{'ratio':>9}{'each round':>16}{'target':>9}"
        )
        lines = [columns, *map(str, self.rows)]
        if self.to_llama:
            lines[0] += f"{'llama.cpp':>20}{'ratio':>9}"
            lines.append(f"beside llama.cpp {about['llama']}: {self.to_llama:.2f}x, geometric mean of the four")
        return head + "\n" + "\n".join(lines)

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, "cpu", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int = 5,
    llama: Path | None = None,
) -> Result:
    """Runs everything on `checkpoint`, on random weights of a `shape`, or on pocket. llama: a Python with
    llama-cpp-python, which is given the same weights in the same type.

    RequestError where transformers is missing or computes something else; then nothing is timed.
    """
    if rounds < 1:
        raise RequestError("rounds and threads must be at least 1.")
    load = load_average()
    with computing_with(threads), checkpoint_of(checkpoint, shape) as path, torch.inference_mode(), ExitStack() as held:
        ours, theirs = Ours(path, DTYPES[dtype]), Transformers(path, DTYPES[dtype])
        config = ours.model.config
        longest = max(job.context + job.new * job.passes for job in WORKLOADS)
        if config.max_position_embeddings < longest:
            raise RequestError(f"{path}: a context of {longest} is measured, and this model has less.")
        tokens = torch.randint(config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
        difference = _same(ours, theirs, tokens[:, :CHECKED])
        other = None
        if llama is not None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            file = gguf.write(config, folder / "same.gguf", source=Safetensors(path, DTYPES[dtype]))
            other = held.enter_context(LlamaCpp(llama, file, torch.get_num_threads(), longest))
        rows = [_compare(job, ours, theirs, other, tokens, rounds) for job in WORKLOADS]
        rows += _engine(ours.model, path, tokens, rounds)
        run = {"dtype": dtype, "rounds": rounds, "load": load, "transformers": theirs.version}
        run |= {"llama": other and other.version, "refused": ours.model.explain()}
        return Result(about(config, path, shape) | run, difference, tuple(rows))


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


def _compare(
    job: Workload, ours: Ours, theirs: Transformers, other: LlamaCpp | None, tokens: torch.Tensor, rounds: int
) -> Row:
    setting, repeats = _fastest(job, theirs, tokens)
    theirs.use(setting)
    sides = [_runner(rival, job, tokens) for rival in (ours, theirs)]
    for run in sides:
        run(passes=1)  # warm
    pairs, llama = [], []
    for _ in range(rounds):
        pairs.append([run(repeats=repeats) for run in sides])
        if other:
            best = max(_llama(other, job) for _ in range(3))  # its passes are shorter than ours are repeated
            llama.append(best)
    both = (tuple(side) for side in zip(*pairs, strict=True))
    return Row(job.name, *both, target=job.target, setting=str(setting), llama=tuple(llama))


def _llama(other: LlamaCpp, job: Workload) -> float:
    [speed] = other.prefill(job.new, 1) if job.new > 1 else other.decode(job.context, job.passes, 1)
    return speed


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
