"""What the experts of a token cost: time, by how many of them read it."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import pandas as pd
import torch

from workbench import ops
from workbench.blocks import Bank


@torch.inference_mode()
def experts_by_k(
    x: torch.Tensor, router: torch.Tensor, bank: Bank, ks: Sequence[int] = (1, 2, 4, 8), repeats: int = 7
) -> pd.DataFrame:
    """Milliseconds a token spends in the routed experts of one layer, when its `k` most probable ones read it.

    x [N, D] what passes mlp.in, read token by token as in decoding. The groups play no part. Median, fastest and
    slowest of `repeats` rounds over all tokens, after one that is not counted. The numbers of experts take turns, so
    that a busy moment of the machine falls on all of them.
    """
    gates, ids = ops.router_logits(x, router).softmax(-1).topk(max(ks), -1)
    rounds = [[_pass(x, ids[:, :k], gates[:, :k], bank) for k in ks] for _ in range(repeats + 1)][1:]
    rows = {k: (median(taken), min(taken), max(taken)) for k, taken in zip(ks, zip(*rounds))}
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["median", "fastest", "slowest"])
    return frame.rename_axis("experts")


def _pass(x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, bank: Bank) -> float:
    """Milliseconds per token."""
    started = perf_counter()
    for n in range(len(x)):
        out = ops.experts(x[n : n + 1], gates[n : n + 1], [(bank, ids[n : n + 1])])
    out.cpu()  # a GPU may still be at work
    return 1e3 * (perf_counter() - started) / len(x)
