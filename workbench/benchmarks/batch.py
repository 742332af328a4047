"""Decoding many sequences at once: tokens a second of all together, beside the bound of the experts they share."""

from collections.abc import Callable
from pathlib import Path

import torch

from workbench.benchmarks.decode import STEPS
from workbench.benchmarks.rivals import CACHE
from workbench.benchmarks.speeds import Bench, Result, Row, opened, operations, weight_bytes
from workbench.cache import LatentCache
from workbench.errors import RequestError
from workbench.formats import Row as Widths
from workbench.formats import cache_format
from workbench.graph import DecodeGraph
from workbench.probe import OFF

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 8, 64, 256)}
CONTEXT = 512


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
    rounds: int = 5,
    context: int = CONTEXT,
    cache: str | None = None,
) -> Result:
    """Of some numbers of sequences, each `context` tokens long."""
    if rounds < 1 or context < 1:
        raise RequestError("rounds and context must be at least 1.")
    with opened(checkpoint, shape, dtype, threads, device, rival=False) as bench:
        if context + STEPS > bench.model.config.max_position_embeddings:
            raise RequestError(f"a context of {context} and {STEPS} steps is more than this model holds.")
        format = cache or CACHE[bench.model.dtype]
        return bench.result("batch", [_row(bench, size, context, format, rounds) for size in BATCHES[device]])


def _row(bench: Bench, size: int, context: int, format: str, rounds: int) -> Row:
    run = _runner(bench, size, context, format)
    run()
    speeds = tuple(run() for _ in range(rounds))
    config = bench.model.config
    row = cache_format(format).nbytes(Widths(config.kv_lora_rank, config.qk_rope_head_dim))
    cached = size * row * config.num_hidden_layers * (context + STEPS / 2)
    moving = (weight_bytes(bench.model, size) + cached) / bench.rates.bandwidth
    computing = size * operations(bench.model, 1, context) / bench.rates.operations
    binds = "bytes of a step" if moving > computing else "operations of a step"
    name = f"batch of {size} at {context:,}, cache {format}"
    return Row(name, {"workbench": speeds}, size / max(moving, computing), binds)


def _runner(bench: Bench, size: int, context: int, format: str) -> Callable[[], float]:
    model, tokens = bench.model, bench.tokens(size, context + STEPS)
    cache = LatentCache(model.config, size, format, bench.device)
    for one in range(size):
        model(tokens[one : one + 1, :context], cache.only(one), logits="last")
    graph = DecodeGraph(model) if bench.device.type == "cuda" else None

    def step(new: torch.Tensor) -> torch.Tensor:
        return graph.step(new, cache, OFF) if graph else model(new, cache, logits="last")

    def steps(count: int) -> None:
        for at in range(context, context + count):
            step(tokens[:, at : at + 1])

    steps(2)  # the first, and the one that is captured

    def run() -> float:
        cache.truncate(context)
        return size * STEPS / bench.seconds(lambda: steps(STEPS))

    return run
