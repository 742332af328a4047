"""What the heads of multi-head latent attention look at, and whether it is content or position that draws them.

A score is the sum of two (paper, section 2.1.3): the content part, of query and key without rotation, and the position
part, of the rotary query and the rotary key all heads share. T queries, the last of S keys; H heads; one sequence.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError


def heads(pattern: Tensor, content: Tensor | None = None, position: Tensor | None = None) -> pd.DataFrame:
    """One row a head and a last one, "uniform", of what a head would have that attends to all keys alike.

    pattern, content, position: attn.pattern, attn.scores_content, attn.scores_position, [H, T, S] each (a recorder's
    tensor, [0]), scores scaled and before the causal mask. Means over the queries that see more than one key:

    entropy          of the pattern, in nats; evenness: over the largest possible, ln(keys seen): 1 is uniform
    distance         tokens back, weighted by the pattern; 0 is the token itself
    first, itself    share of the attention on the first token of the sequence, and on the query's own
    content_share, position_share  of the variance of the scores over the keys a query sees, pooled over queries:
                     covariance of the part with the score, over the variance of the score. The two make 1; one is below
                     0 where the other part works against it. NaN for a head whose scores do not vary
    RequestError unless shapes agree and a query sees two keys.
    """
    pattern, content, position = _alike(pattern, content, position)
    seen = _seen(pattern)
    many = seen.sum(1) > 1
    if not many.any():
        raise RequestError("the only query sees one key, itself: there is nothing to attend to. Use a longer text.")
    uniform = seen.double() / seen.sum(1, keepdim=True)
    both = torch.cat([pattern, uniform[None]])[:, many]
    length = seen[many].sum(1)  # keys seen
    back = (length[:, None] - 1 - torch.arange(pattern.shape[2])).clamp(min=0)
    entropy = -torch.xlogy(both, both).sum(2)
    columns = {
        "entropy": entropy.mean(1),
        "evenness": (entropy / length.log()).mean(1),
        "distance": (both * back).sum(2).mean(1),
        "first": both[:, :, 0].mean(1),
        "itself": both.gather(2, (length - 1)[None, :, None].expand(len(both), -1, 1))[:, :, 0].mean(1),
    }
    if content is not None:
        shares = _shares(content, position, seen)
        nothing = shares.new_full((1,), torch.nan)
        columns["content_share"] = torch.cat([shares, nothing])
        columns["position_share"] = torch.cat([1 - shares, nothing])
    index = pd.Index([*range(len(pattern)), "uniform"], name="head")
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}, index=index)


def attended(
    pattern: Tensor,
    query: int,
    content: Tensor | None = None,
    position: Tensor | None = None,
    head: int | None = None,
    texts: Sequence[str] | None = None,
) -> pd.DataFrame:
    """What query number `query` (negative: from the end) attends to: one row a key it sees, in order of the text.

    Tensors as in `heads`. head: which one; None is the mean of all. texts: the text of each key.
    Columns: key, back (tokens before the query), text, pattern, content, position. Scores count relative to each other
    only: softmax of content + position over the rows is the pattern.
    """
    pattern, content, position = _alike(pattern, content, position)
    count, new, length = pattern.shape
    if not -new <= query < new:
        raise RequestError(f"query must be from 0 to {new - 1}, or count from the end; got {query}.")
    if head is not None and not 0 <= head < count:
        raise RequestError(f"head must be from 0 to {count - 1}, or None for the mean; got {head}.")
    if texts is not None and len(texts) != length:
        raise RequestError(f"texts must be one a key, {length}; got {len(texts)}.")
    query %= new
    keys = int(_seen(pattern)[query].sum())
    columns = {"key": range(keys), "back": range(keys - 1, -1, -1)}
    if texts is not None:
        columns["text"] = list(texts[:keys])
    for name, values in (("pattern", pattern), ("content", content), ("position", position)):
        if values is not None:
            row = values[:, query, :keys]
            columns[name] = (row.mean(0) if head is None else row[head]).numpy()
    return pd.DataFrame(columns)


def _alike(pattern: Tensor, content: Tensor | None, position: Tensor | None) -> list[Tensor | None]:
    if (content is None) != (position is None):
        raise RequestError("content and position scores belong together: give both, or neither.")
    given = [x for x in (pattern, content, position) if x is not None]
    shapes = [tuple(x.shape) for x in given]
    if len(set(shapes)) != 1 or len(shapes[0]) != 3 or not 1 <= shapes[0][1] <= shapes[0][2]:
        raise RequestError(f"need [heads, queries, keys] of one sequence, alike; got {', '.join(map(str, shapes))}.")
    given = [x.detach().cpu().double() for x in given]
    return given if len(given) == 3 else [*given, None, None]


def _seen(pattern: Tensor) -> Tensor:
    """[T, S]: 1 where a query may see a key; the last query is at the last key."""
    _, new, length = pattern.shape
    return torch.ones(new, length, dtype=torch.int64).tril(length - new)


def _shares(content: Tensor, position: Tensor, seen: Tensor) -> Tensor:
    """Covariance of the content part with the score over the variance of the score, within the keys of a query: [H]."""

    def centred(scores: Tensor) -> Tensor:
        scores = scores.where(seen.bool(), 0.0)  # beyond them a recorder may hold anything, infinities too
        return (scores - scores.sum(2, keepdim=True) / seen.sum(1)[:, None]) * seen

    part, other = centred(content), centred(position)
    score = part + other
    variance = (score * score).sum((1, 2))
    scale = (part * part + other * other).sum((1, 2))
    flat = variance <= 1e-18 * scale.clamp(min=1.0)
    return torch.where(flat, torch.nan, (part * score).sum((1, 2)) / variance.where(~flat, 1.0))
