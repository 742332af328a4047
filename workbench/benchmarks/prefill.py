"""Reading a prompt: tokens a second of one pass, beside the rate of products and beside transformers."""

from collections.abc import Callable
from pathlib import Path

import torch

from workbench.benchmarks.rivals import CACHE
from workbench.benchmarks.speeds import Bench, Result, Row, opened, operations
from workbench.cache import LatentCache
from workbench.errors import RequestError

LENGTHS = (128, 512, 4096)


def measure(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
    rounds: int = 5,
    context: int | None = None,
) -> Result:
    """Of prompts of `context` tokens, or of all LENGTHS that the model holds."""
    if rounds < 1:
        raise RequestError("rounds must be at least 1.")
    with opened(checkpoint, shape, dtype, threads, device) as bench:
        limit = bench.model.config.max_position_embeddings
        lengths = [one for one in ((context,) if context is not None else LENGTHS) if 0 < one <= limit]
        if not lengths:
            raise RequestError(f"a prompt of {context} is measured, and this model holds 1 to {limit} tokens.")
        return bench.result("prefill", [_row(bench, length, rounds) for length in lengths])


def _row(bench: Bench, length: int, rounds: int) -> Row:
    tokens = bench.tokens(1, length)
    sides = {"workbench": _ours(bench, tokens)}
    if bench.rival is not None:
        sides |= {f"transformers, {one}": _theirs(bench, tokens, one) for one in bench.rival.settings(length)[-2:]}
    for run in sides.values():
        run()
    speeds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            speeds[name].append(length / bench.seconds(run))
    most = bench.rates.operations * length / operations(bench.model, length)
    return Row(f"prefill {length:,}", {n: tuple(s) for n, s in speeds.items()}, most, "its operations")


def _ours(bench: Bench, tokens: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        cache = LatentCache(bench.model.config, format=CACHE[bench.model.dtype], device=bench.device)
        return bench.model(tokens, cache, logits="last")

    return run


def _theirs(bench: Bench, tokens: torch.Tensor, setting) -> Callable[[], object]:
    there = tokens.to(bench.device)

    def run() -> object:
        bench.rival.use(setting)
        return bench.rival.start(there)

    return run
