"""How much of what a head scores is distance alone: the same for all tokens that are as far apart."""

import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError


def distance(scores: Tensor, *, rounds: int = 10, seed: int = 0) -> pd.DataFrame:
    """One row a head of scores [H, T, S]: how much of their variance over the keys a query sees follows from distance.

    observed       R^2 of the best function of distance alone, a value for each, fitted by least squares. What is the
                   same for all keys of a query does not count: the softmax does not see it
    null, null_sd  the same after the keys that each query sees have changed places, `rounds` times: a function with so
                   many values fits a little of anything
    Scores are those before the causal mask, of the last T of S positions. NaN for a head whose scores do not vary.
    RequestError unless a query sees two keys.
    """
    if scores.dim() != 3 or not 1 <= scores.shape[1] <= scores.shape[2] or scores.shape[2] < 2:
        raise RequestError(f"need [heads, queries, keys] of one sequence, two keys or more; got {tuple(scores.shape)}.")
    scores = scores.detach().cpu().double()
    _, new, length = scores.shape
    seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    back = (torch.arange(length - new, length)[:, None] - torch.arange(length)).clamp(min=0)
    inverse = _inverse(seen.sum(1).double(), length)
    generator = torch.Generator().manual_seed(seed)
    observed = _explained(scores, seen, back, inverse)
    null = torch.stack([_explained(_traded(scores, seen, generator), seen, back, inverse) for _ in range(rounds)])
    columns = {"observed": observed, "null": null.mean(0), "null_sd": null.std(0)}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis("head")


def _inverse(seen: Tensor, length: int) -> Tensor:
    """Pseudo-inverse of the normal equations for a value a distance [S, S], after the mean of each query is taken off.

    A query that sees n keys has each distance below n once. The values are known up to a constant.
    """
    has = (seen[:, None] > torch.arange(length)).double()  # [T, S]: whether a query has this distance
    return torch.linalg.pinv(torch.diag(has.sum(0)) - has.T @ (has / seen[:, None]), hermitian=True)


def _explained(scores: Tensor, seen: Tensor, back: Tensor, inverse: Tensor) -> Tensor:
    """R^2 of each head [H]."""
    scores = scores.where(seen, 0.0)
    scores = (scores - scores.sum(2, keepdim=True) / seen.sum(1)[:, None]) * seen
    sums = scores.new_zeros(len(scores), len(inverse)).index_add_(1, back[seen], scores[:, seen])
    total = scores.square().sum((1, 2))
    found = torch.einsum("hd,de,he->h", sums, inverse, sums)
    return torch.where(total > 1e-18, found / total.clamp(min=1e-18), torch.nan)


def _traded(scores: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
    """The scores a query gives the keys it sees, in another order; one order for all heads."""
    order = torch.rand(seen.shape, generator=generator).masked_fill(~seen, 2.0).argsort(1)
    return scores.gather(2, order.expand(len(scores), -1, -1))
