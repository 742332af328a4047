"""The two forms of latent attention against the clock: absorbed, and expanded."""

from collections.abc import Iterable
from time import perf_counter

import pandas as pd
import torch

from workbench.errors import RequestError
from workbench.model import Attention, absorbing_is_cheaper


@torch.inference_mode()
def forms(
    attention: Attention,
    content: torch.Tensor,
    position: torch.Tensor,
    rows: torch.Tensor,
    points: Iterable[tuple[int, int]],
    repeats: int = 9,
) -> pd.DataFrame:
    """Both forms for the last `new` queries of the first `context` rows, one row a point (new, context).

    content [1, T, H, N], position [1, T, H, R], rows [1, T, W]: what a model really asked and kept, see attn.q_content,
    attn.q_rope, attn.kv_latent and attn.k_rope. The two take turns, after one turn that is not counted, so that a busy
    moment of the machine falls on both.

    absorbed, expanded  milliseconds, the fastest of `repeats`: what is left when nothing else runs
    won                 share of the turns in which the absorbed form was the faster
    counted             the form with fewer multiplications, which is the one the model uses
    """
    table = {}
    for new, context in points:
        if not 1 <= new <= context <= rows.shape[1]:
            raise RequestError(f"{new} new tokens in a context of {context} cannot be cut from {rows.shape[1]} tokens.")
        given = (content[:, context - new : context], position[:, context - new : context], rows[:, :context])
        turns = [(_time(attention.absorbed, *given), _time(attention.expanded, *given)) for _ in range(repeats + 1)][1:]
        counted = "absorbed" if absorbing_is_cheaper(attention.config, new, context) else "expanded"
        won = sum(one < other for one, other in turns) / repeats
        table[new, context] = (*map(min, zip(*turns)), won, counted)
    columns = ["absorbed", "expanded", "won", "counted"]
    frame = pd.DataFrame.from_dict(table, orient="index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(table, names=["new", "context"])
    return frame


def _time(form, *given: torch.Tensor) -> float:
    """Milliseconds of one call."""
    started = perf_counter()
    form(*given).cpu()  # a GPU may still be at work
    return 1e3 * (perf_counter() - started)
