"""Decoding one sequence: steps replayed from a graph, launched, and one operation at a time; looking and editing on."""

from collections.abc import Callable
from pathlib import Path

import torch

from workbench.benchmarks.rivals import CACHE
from workbench.benchmarks.speeds import Bench, Result, Row, opened, weight_bytes
from workbench.cache import LatentCache
from workbench.editing import Editing
from workbench.errors import RequestError
from workbench.formats import Row as Widths
from workbench.formats import cache_format
from workbench.graph import DecodeGraph
from workbench.probe import OFF, Probe, both
from workbench.ring import RoutingRing

STEPS = 32  # of one measurement
WARM = 4  # steps before the clock starts: whoever ran before has left its own weights in the processor's caches
CONTEXTS = (0, 1024, 8192)

Step = Callable[[torch.Tensor, LatentCache], torch.Tensor]


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
    rounds: int = 5,
    context: int | None = None,
    cache: str | None = None,
) -> Result:
    """Tokens a second of one sequence, at `context` tokens or at all of CONTEXTS that the model holds."""
    if rounds < 1:
        raise RequestError("rounds must be at least 1.")
    with opened(checkpoint, shape, dtype, threads, device) as bench:
        limit = bench.model.config.max_position_embeddings - STEPS - 1
        contexts = [one for one in ((context,) if context is not None else CONTEXTS) if one <= limit]
        if not contexts:
            raise RequestError(f"a context of {context} is measured, and this model holds {limit} and the answer.")
        formats = [cache] if cache else list(dict.fromkeys([CACHE[bench.model.dtype], "q6"]))
        return bench.result("decode", [_row(bench, at, name, rounds) for at in contexts for name in formats])


def bound(bench: Bench, context: int, format: str) -> float:
    """Tokens a second if nothing took time but reading a token's weights and the cached rows, once."""
    config = bench.model.config
    row = cache_format(format).nbytes(Widths(config.kv_lora_rank, config.qk_rope_head_dim))
    cached = row * config.num_hidden_layers * (context + STEPS / 2)
    return bench.rates.bandwidth / (weight_bytes(bench.model) + cached)


def _row(bench: Bench, context: int, format: str, rounds: int) -> Row:
    tokens = bench.tokens(1, context + STEPS)
    sides = {name: _runner(bench, step, format, context, tokens) for name, step in _ways(bench).items()}
    if bench.rival is not None and format == CACHE[bench.model.dtype]:
        sides["transformers"] = _rival(bench, context, tokens)
    for run in sides.values():
        run()  # compiles, captures, fills caches
    speeds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            speeds[name].append(run())
    name = f"decode at {context:,}, cache {format}"
    return Row(name, {n: tuple(s) for n, s in speeds.items()}, bound(bench, context, format), "bytes a token reads")


def _ways(bench: Bench) -> dict[str, Callable[[], Step]]:
    """How steps are taken, by name; each makes a function for one measurement."""
    model, config = bench.model, bench.model.config

    def passes(probe: Probe) -> Callable[[], Step]:
        return lambda: lambda tokens, cache: model(tokens, cache, probe, logits="last")

    def replays(probe: Probe) -> Callable[[], Step]:
        def make() -> Step:
            graph = DecodeGraph(model)
            return lambda tokens, cache: graph.step(tokens, cache, probe)

        return make

    ring, live = RoutingRing(config, model.device), Editing([], config, device=model.device, live=True)
    ring.to(ring.log())
    seen = both(live, ring)
    if bench.device.type == "cpu":
        return {"workbench": passes(OFF), "routing recorded": passes(ring), "operation by operation": _apart(bench)}
    return {
        "workbench, replayed": replays(OFF),
        "routing recorded": replays(ring),
        "recorded, edits live": replays(seen),
        "launched": passes(OFF),
        "operation by operation": _apart(bench),
    }


def _apart(bench: Bench) -> Callable[[], Step]:
    def step(tokens: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        bench.model.fuse = False
        try:
            return bench.model(tokens, cache, logits="last")
        finally:
            del bench.model.fuse

    return lambda: step


def _runner(
    bench: Bench, way: Callable[[], Step], format: str, context: int, tokens: torch.Tensor
) -> Callable[[], float]:
    """Tokens a second of STEPS steps after `context` tokens. What comes before the clock starts is done here, once."""
    cache, step = LatentCache(bench.model.config, format=format, device=bench.device), way()
    for at in range(0, context, 1024):
        bench.model(tokens[:, at : min(at + 1024, context)], cache, logits="last")
    for at in range(2):  # a first step, and the one that is captured
        step(tokens[:, context + at : context + at + 1], cache)

    return _timed(bench, context, tokens, lambda: cache.truncate(context), lambda new: step(new, cache))


def _rival(bench: Bench, context: int, tokens: torch.Tensor) -> Callable[[], float]:
    rival, there = bench.rival, tokens.to(bench.device)
    rival.use(rival.settings(1)[-1])
    cache = rival.start(there[:, :context])

    return _timed(bench, context, there, lambda: rival.rewind(cache, context), lambda new: rival.advance(new, cache))


def _timed(
    bench: Bench,
    context: int,
    tokens: torch.Tensor,
    rewind: Callable[[], object],
    step: Callable[[torch.Tensor], object],
) -> Callable[[], float]:
    def steps(count: int) -> None:
        rewind()
        for at in range(context, context + count):
            step(tokens[:, at : at + 1])

    def run() -> float:
        steps(WARM)
        return STEPS / bench.seconds(lambda: steps(STEPS))

    return run
