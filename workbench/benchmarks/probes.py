"""What looking costs: decode and prefill with probes off, recording and editing, against code without probes (bare.py).

The machine is shared and its speed drifts by more than what is measured. So every way of looking runs in many short
blocks, in a new order every round, and is compared with the baseline of its own round. The baseline runs twice: its
second run against its first shows what a difference of nothing looks like. With one thread the clock is the
processor's time, in which nobody else takes part. What is due only now and then, reading the static recorder off, is
timed by itself and counted in every token.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.benchmarks.bare import copy_of
from workbench.benchmarks.measure import (
    DTYPES,
    RESULTS,
    about,
    checkpoint_of,
    computing_with,
    keep,
    load_average,
    scatter,
)
from workbench.benchmarks.rivals import CACHE
from workbench.cache import LatentCache
from workbench.edits import Ablate, Edit, TopK
from workbench.errors import RequestError
from workbench.model import Model
from workbench.opening import open_model
from workbench.probe import OFF, SITES, Probe, layers_with
from workbench.recorder import Recorder
from workbench.reply import Stats
from workbench.watching import Watch

BARE, AGAIN, OFF_NAME, STATIC = "no probes in the code", "the same again", "probes off", "static routing recorder"
LIMITS = {OFF_NAME: 0.5, STATIC: 2.0}  # percent
STEPS = 16  # tokens of a block: short, for the machine changes its speed within a tenth of a second
READ = 3  # blocks after which the static recorder is read off, more often than a live view asks
PROMPT = 128  # tokens
SECONDS = {"decode": 65.0, "prefill": 15.0}  # rounds that fit into it are the default
FEWEST = 8  # rounds
SELDOM = 4  # of so many rounds, what has no limit to keep takes part in one
CHECKED = 32  # positions whose logits must agree before anything is timed
RESAMPLES = 2000


class Way(NamedTuple):
    """A way of looking. `clear` comes before a block and is not timed; `drain` is due every READ blocks."""

    name: str
    model: nn.Module
    probe: Probe | None  # None: the model takes none
    clear: Callable[[], object] = lambda: None
    drain: Callable[[], object] | None = None

    def run(self, tokens: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """One pass, as Engine does it."""
        if self.probe is None:
            return self.model(tokens, cache, logits="last")
        return self.model(tokens, cache, self.probe, logits="last")


@dataclass(frozen=True)
class Row:
    """Milliseconds per token in every round. `extra`: percent over the baseline of the same round."""

    name: str
    ms: tuple[float, ...]
    extra: tuple[float, ...]
    ops: int  # that torch carries out in one pass
    limit: float | None = None

    @property
    def percent(self) -> float:
        return statistics.median(self.extra)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, 95 %, by bootstrap over rounds."""
        rng = np.random.default_rng(0)
        picked = rng.integers(0, len(self.extra), (RESAMPLES, len(self.extra)))
        low, high = np.quantile(np.median(np.array(self.extra)[picked], 1), (0.025, 0.975))
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        low, high = self.interval
        return "met" if high <= self.limit else "MISSED" if low > self.limit else "open: run more rounds"

    def to_dict(self) -> dict:
        summary = {"median_ms": statistics.median(self.ms), "percent": self.percent, "interval": self.interval}
        return asdict(self) | summary | {"verdict": self.verdict}

    def __str__(self) -> str:
        low, high = self.interval
        line = (
            f"{self.name:44}{statistics.median(self.ms):9.4f}{self.percent:+9.2f} %{f'{low:+.2f} to {high:+.2f}':>20}"
            f"{self.ops:7}"
        )
        return line if self.limit is None else f"{line}   <= {self.limit} %: {self.verdict}"


@dataclass(frozen=True)
class Result:
    """One run: where, on what, and every figure."""

    about: dict
    decode: tuple[Row, ...]
    prefill: tuple[Row, ...]

    def to_dict(self) -> dict:
        tables = {"decode": self.decode, "prefill": self.prefill}
        return {"about": self.about} | {name: [row.to_dict() for row in rows] for name, rows in tables.items()}

    def __str__(self) -> str:
        about = self.about
        lines = [
            f"{about['model']}: {about['parameters'] / 1e6:.1f}M parameters",
            f"{about['dtype']}, threads: {about['threads']}, load before: {about['load']}",
            f"{about['cpu']}; torch {about['torch']}; clock: {about['clock']}",
            "without probes and off: the same bits, the same operations",
            scatter(about["load"]).rstrip(),
        ]
        for rows, what in (
            (self.decode, f"decode at {about['context']:,}, {STEPS} tokens a block"),
            (self.prefill, f"prefill of {PROMPT}"),
        ):
            lines += ["", f"{f'{what}, rounds: {len(rows[0].ms)}':44}{'ms/token':>9}{'more':>11}{'95 %':>20}{'ops':>7}"]
            lines += map(str, rows)
        return "\n".join(line for number, line in enumerate(lines) if line or number > 4)

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, f"probes-at-{self.about['context']}", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int | None = None,
    context: int = 256,
) -> Result:
    """On `checkpoint`, on random weights of a `shape`, or on pocket, with `context` tokens in the cache.

    RequestError where code without probes computes something else than probes that are off; then nothing is timed.
    """
    if rounds is not None and rounds < 1:
        raise RequestError("rounds and threads must be at least 1.")
    load = load_average()
    with computing_with(threads), checkpoint_of(checkpoint, shape) as path, torch.inference_mode():
        model = open_model(path, dtype=DTYPES[dtype])
        config = model.config
        most = config.max_position_embeddings - STEPS - 1
        if not 1 <= context <= most or most < PROMPT:
            raise RequestError(f"context must be from 1 to {most:,}, so that {STEPS} tokens fit behind it.")
        ways = ways_of(model)
        tokens = torch.randint(
            config.vocab_size, (1, context + STEPS + PROMPT), generator=torch.Generator().manual_seed(0)
        )
        cache = LatentCache(config, format=CACHE[model.dtype])
        check(ways, tokens[:, :CHECKED], cache)
        prefill = _table(ways, tokens[:, :PROMPT], cache, 0, 1, rounds, SECONDS["prefill"])
        cache.truncate(0)
        model(tokens[:, :context], cache, logits="last")
        decode = _table(ways, tokens[:, context : context + 1], cache, context, STEPS, rounds, SECONDS["decode"])
        run = {"dtype": dtype, "context": context, "load": load, "clock": _clock().__name__}
        return Result(about(config, path, shape) | run, decode, prefill)


def ways_of(model: Model) -> list[Way]:
    """All that are measured, the baseline first, each under code of its own."""
    config = model.config
    moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    watched = [
        site for site in SITES if site.startswith(("resid.", "moe.router", "moe.experts", "moe.gates", "moe.scores"))
    ]
    ways = [
        Way(BARE, copy_of(model, probes=False), None),
        Way(AGAIN, copy_of(model, probes=False), None),
        Way(OFF_NAME, copy_of(model, probes=True), OFF),
        _recorded(model, "residual and router sites", watched),
        _recorded(model, "all sites, attention in the open", SITES),
    ]
    if moe:
        ways[3:3] = [
            _static(model, STATIC),
            _static(model, "static, one expert of one layer ablated", Ablate(moe[-1], 0)),
            _static(model, "static, TopK in every layer", TopK(None, config.num_experts_per_tok)),
        ]
    return ways


def _static(model: Model, name: str, *edits: Edit) -> Way:
    """As the engine always records. A TopK with the model's own K costs what looking costs, and no more."""
    watch = Watch(model, name, edits)
    probe = watch.probe([watch.of(SimpleNamespace(stats=Stats(prompt_tokens=0, seed=0)), str)])
    return Way(name, copy_of(model, probes=True), probe, drain=watch.ring.drain)


def _recorded(model: Model, name: str, sites: Sequence[str]) -> Way:
    there = [site for site in sites if layers_with(site, model.config)]
    recorder = Recorder(*there, limit=1 << 40)
    return Way(name, copy_of(model, probes=True), recorder, recorder.clear)


def check(ways: Sequence[Way], tokens: torch.Tensor, cache: LatentCache) -> None:
    """RequestError unless the baseline and probes that are off give the same bits by the same operations."""
    bare, off = (next(way for way in ways if way.name == name) for name in (BARE, OFF_NAME))
    for piece in (tokens[:, :-1], tokens[:, -1:]):
        start, (a, b) = cache.lengths[0], (_Listed(), _Listed())
        with a:
            expected = bare.run(piece, cache)
        cache.truncate(start)
        with b:
            got = off.run(piece, cache)
        if not torch.equal(expected, got) or a.ops != b.ops:
            what = "the same operations" if torch.equal(expected, got) else "the same logits"
            raise RequestError(f"code without probes and probes that are off do not give {what}: nothing was timed.")
    cache.truncate(0)


class _Listed(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def _table(
    ways: Sequence[Way],
    tokens: torch.Tensor,
    cache: LatentCache,
    at: int,
    passes: int,
    rounds: int | None,
    seconds: float,
) -> tuple[Row, ...]:
    """The ways in turns on `tokens`, `passes` of them one after the other, with `at` tokens in the cache before."""
    counts = [_ops(way, tokens, cache, at) for way in ways]
    dice, every = random.Random(0), READ if passes > 1 else 1
    read = passes + 1 if passes > 1 else 2 * tokens.shape[1]  # tokens of a block, with those that warm up
    blocks: dict[str, int] = dict.fromkeys((way.name for way in ways), 0)
    drained: dict[str, list[float]] = {way.name: [] for way in ways if way.drain}

    def run(number: int) -> dict[str, float]:
        """Milliseconds per token of each way that is in this round, in an order that chance decides."""
        chosen = [way for way in ways if number % SELDOM == 0 or way.name in (BARE, AGAIN, *LIMITS)]
        taken = {}
        for way in dice.sample(chosen, len(chosen)):
            taken[way.name] = _block(way, tokens, cache, passes) / (passes * tokens.shape[1])
            cache.truncate(at)
            blocks[way.name] += 1
            if way.drain and blocks[way.name] % every == 0:
                drained[way.name].append(_milliseconds(way.drain) / (every * read))
        return taken

    if rounds is None:
        started = time.perf_counter()
        for number in range(SELDOM):
            run(number)
        rounds = max(FEWEST, int(SELDOM * seconds / max(time.perf_counter() - started, 1e-9)))
    rounds = max(rounds, READ)  # so that there is one reading at least
    taken = [run(number) for number in range(rounds)]
    due = {name: statistics.median(each) if each else 0.0 for name, each in drained.items()}
    return tuple(rows_of(taken, due, ways, counts))


def rows_of(
    taken: Sequence[dict[str, float]], due: dict[str, float], ways: Sequence[Way], ops: Sequence[int]
) -> Iterator[Row]:
    """A row a way, from the milliseconds per token of each round and what is `due` now and then, per token."""
    for way, count in zip(ways, ops, strict=True):
        there = [one for one in taken if way.name in one]
        base = [one[BARE] if way.name in (BARE, AGAIN) else (one[BARE] + one[AGAIN]) / 2 for one in there]
        ms = [one[way.name] + due.get(way.name, 0.0) for one in there]
        extra = tuple(round(100 * (one / b - 1), 3) for one, b in zip(ms, base, strict=True))
        yield Row(way.name, tuple(round(one, 5) for one in ms), extra, count, LIMITS.get(way.name))


def _ops(way: Way, tokens: torch.Tensor, cache: LatentCache, at: int) -> int:
    listed = _Listed()
    with listed:
        way.run(tokens, cache)
    cache.truncate(at)
    way.clear()
    if way.drain:
        way.drain()
    return len(listed.ops)


def _clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _milliseconds(run: Callable[[], object]) -> float:
    clock = _clock()
    gc.disable()
    try:
        started = clock()
        run()
        return 1e3 * (clock() - started)
    finally:
        gc.enable()


def _block(way: Way, tokens: torch.Tensor, cache: LatentCache, passes: int) -> float:
    """Milliseconds. What the block before left in the processor's caches is made up for by a pass that is not timed."""
    length = cache.lengths[0]
    way.run(tokens, cache)
    if passes == 1:
        cache.truncate(length)
    way.clear()

    def block() -> None:
        for _ in range(passes):
            way.run(tokens, cache)

    return _milliseconds(block)
