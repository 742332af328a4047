"""What reading costs: time, for tokens read alone or together, and bytes of cache."""

from collections.abc import Iterable
from statistics import median
from time import perf_counter

import pandas as pd
import torch

from workbench.workbench import Workbench


def reading(
    bench: Workbench, tokens: list[int], at_once: Iterable[int] = (1, 8, 64, 128), repeats: int = 5
) -> pd.DataFrame:
    """Milliseconds per token when the same `tokens` are read `at_once` at a time, into a new cache each time.

    Median, fastest and slowest of `repeats`, after one that is not counted. Sizes take turns, so that a busy moment of
    the machine falls on all of them.
    """
    sizes = list(at_once)
    rounds = [[_read(bench, tokens, size) for size in sizes] for _ in range(repeats + 1)][1:]
    rows = {size: (median(taken), min(taken), max(taken)) for size, taken in zip(sizes, zip(*rounds))}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["median", "fastest", "slowest"])
    return frame.rename_axis("tokens at once")


@torch.inference_mode()
def _read(bench: Workbench, tokens: list[int], size: int) -> float:
    """Milliseconds per token of one reading."""
    cache, ids = bench.new_cache(), torch.tensor([tokens])
    started = perf_counter()
    for chunk in ids.split(size, dim=1):
        logits = bench.model(chunk, cache=cache, logits="last")
    logits.cpu()  # a GPU may still be at work
    return 1e3 * (perf_counter() - started) / len(tokens)


@torch.inference_mode()
def growth(bench: Workbench, tokens: list[int], at_once: int = 16) -> pd.DataFrame:
    """Bytes that a new cache really holds, while `tokens` are read `at_once` at a time."""
    cache, held = bench.new_cache(), {0: 0}
    for chunk in torch.tensor([tokens]).split(at_once, dim=1):
        bench.model(chunk, cache=cache, logits="last")
        held[cache.lengths[0]] = cache.nbytes
    return pd.DataFrame({"latent cache": held}).rename_axis("tokens read")
