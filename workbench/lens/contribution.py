"""What shared and routed experts contribute to the residual stream. Tensors of one sequence in, tables out.

T tokens, D hidden, K chosen experts.
"""

import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError


def contributions(routed: Tensor, shared: Tensor, residual: Tensor | None = None) -> pd.DataFrame:
    """One row a token, from moe.routed_out, moe.shared_out and resid.mid, [T, D] each (a recorder's tensor, [0]).

    routed, shared  Euclidean norms of the two outputs; ratio: routed / shared
    cosine          of the angle between them: 1 the same direction, 0 unrelated, -1 against each other
    update          norm of their sum, which is what the layer adds to the residual stream
    routed_share    share of the sum that is the routed output: its projection on the sum, over the sum. With the shared
                    output's it makes 1; below 0 or above 1 where the two oppose each other
    residual        norm of the stream they are added to; change: update / residual. Only if it is given
    NaN where a norm to divide by is 0. RequestError unless shapes agree.
    """
    routed, shared = _alike("routed", routed, "shared", shared)
    update = routed + shared
    columns = {
        "routed": routed.norm(dim=1),
        "shared": shared.norm(dim=1),
        "ratio": _over(routed.norm(dim=1), shared.norm(dim=1)),
        "cosine": _cosine(routed, shared),
        "update": update.norm(dim=1),
        "routed_share": _over((routed * update).sum(1), (update * update).sum(1)),
    }
    if residual is not None:
        residual = _alike("residual", residual, "routed", routed)[0]
        columns["residual"] = residual.norm(dim=1)
        columns["change"] = _over(update.norm(dim=1), residual.norm(dim=1))
    return _frame(columns)


def expert_contributions(expert_out: Tensor, gates: Tensor, ids: Tensor) -> pd.DataFrame:
    """One row a token and used slot, from moe.expert_out [T, K, D], moe.gates and moe.experts [T, K] (-1: not used).

    norm     of gate x output, what this expert adds
    share    of the sum over the experts: projection on it, over it; the slots of a token make 1
    cosine   between this expert's part and the sum
    change   leave one out: norm of the difference that removing it makes to the sum, over the norm of the sum. The
             others keep their gates, as with norm_topk_prob false, which all published DeepSeek-V2 have
    turn     cosine between the sum without it and the sum: 1 means that removing it only changes the length
    NaN where a norm to divide by is 0, as the sum without the only expert. RequestError unless shapes agree.
    """
    shape = tuple(expert_out.shape)
    if expert_out.dim() != 3 or tuple(gates.shape) != shape[:2] or tuple(ids.shape) != shape[:2]:
        raise RequestError(
            f"expert_out must be [T, K, D], gates and ids [T, K]; got {shape}, {tuple(gates.shape)}, "
            f"{tuple(ids.shape)}. Take one sequence of a batch."
        )
    ids = ids.detach().cpu()
    used = ids >= 0
    parts = _double(expert_out) * _double(gates)[..., None]
    parts = parts.masked_fill(~used[..., None], 0.0)
    total = parts.sum(1, keepdim=True).expand_as(parts)
    size = total.norm(dim=2)
    columns = {
        "slot": torch.arange(shape[1]).expand(shape[:2]),
        "expert": ids,
        "gate": _double(gates),
        "norm": parts.norm(dim=2),
        "share": _over((parts * total).sum(2), size**2),
        "cosine": _cosine(parts, total),
        "change": _over(parts.norm(dim=2), size),
        "turn": _cosine(total - parts, total),
    }
    frame = pd.DataFrame({name: values[used].numpy() for name, values in columns.items()})
    frame.insert(0, "token", used.nonzero()[:, 0].numpy())
    return frame


def _alike(name: str, a: Tensor, other: str, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or a.shape != b.shape:
        raise RequestError(
            f"{name} and {other} must be [T, D] alike; got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Take one sequence of a batch."
        )
    return _double(a), _double(b)


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.where(b > 0, 1.0), torch.nan)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return _over((a * b).sum(-1), a.norm(dim=-1) * b.norm(dim=-1))


def _frame(columns: dict[str, Tensor]) -> pd.DataFrame:
    frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    return frame.rename_axis(index="token")
