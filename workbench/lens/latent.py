"""The latent cache looked into: how many directions it uses, which channels stand out. Tensors of one layer.

T tokens of one sequence; C width of the latent, R of the rotary key, W of either.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError


class Rank(NamedTuple):
    """How many directions a set of vectors uses, two ways; both between 0 (no vector differs) and the rank.

    effective      exp of the entropy of the singular values, made to sum to 1 (Roy and Vetterli 2007, EUSIPCO)
    participation  (sum l)^2 / sum l^2 of the squared singular values l: less moved by many small ones
    """

    effective: float
    participation: float


def effective_rank(x: Tensor, center: bool = True, *, rounds: int = 20, seed: int = 0) -> pd.DataFrame:
    """Rank of x [T, W], beside two nulls of the same shape, which tokens so few could not exceed.

    Rows: observed; gaussian: independent normal numbers; shuffled: the values of each channel in another order of
    tokens, so that channels keep their size and outliers and lose what joins them. Columns: effective and participation
    (see `Rank`; means over `rounds`), their standard deviations over rounds, and possible: the largest rank there can
    be. With `center` the mean over tokens is taken off first, and with it one direction of the tokens.
    RequestError for fewer than two tokens.
    """
    x = _tokens(x)
    generator = torch.Generator().manual_seed(seed)

    def shuffle() -> Tensor:
        order = torch.rand(x.shape, generator=generator, dtype=x.dtype).argsort(0)
        return x.gather(0, order)

    def normal() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    rows = {"observed": [rank(x, center)]}
    for name, make in (("gaussian", normal), ("shuffled", shuffle)):
        rows[name] = [rank(make(), center) for _ in range(rounds)]
    table = {}
    for name, found in rows.items():
        values = torch.tensor(found, dtype=torch.float64)
        spread = values.std(0) if len(found) > 1 else values.new_zeros(2)
        table[name] = [*values.mean(0).tolist(), *spread.tolist(), min(x.shape[0] - center, x.shape[1])]
    columns = ["effective", "participation", "effective_sd", "participation_sd", "possible"]
    return pd.DataFrame.from_dict(table, orient="index", columns=columns).astype({"possible": int})


def rank(x: Tensor, center: bool = True) -> Rank:
    """Of x [T, W], without nulls."""
    singular = _singular(_tokens(x), center)
    if not singular.any():
        return Rank(0.0, 0.0)
    share, power = singular / singular.sum(), singular**2 / (singular**2).sum()
    return Rank(float(torch.exp(-torch.xlogy(share, share).sum())), float(1 / (power**2).sum()))


def spectrum(x: Tensor, center: bool = True) -> pd.DataFrame:
    """One row a direction of x [T, W], largest first: singular value, its share of the variance, and all so far."""
    singular = _singular(_tokens(x), center)
    power = singular**2
    share = power / power.sum() if power.any() else power
    columns = {"singular": singular.numpy(), "share": share.numpy(), "cumulative": share.cumsum(0).numpy()}
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(singular) + 1, name="direction"))


class Components(NamedTuple):
    """Principal components: mean [W], components [n, W] of length 1, share [n] of the variance, projections [T, n]."""

    mean: np.ndarray
    components: np.ndarray
    share: np.ndarray
    projections: np.ndarray


def pca(x: Tensor, n: int = 2) -> Components:
    """The first `n` principal components of x [T, W] over its tokens.

    The sign of each is chosen so that its largest entry is positive. RequestError for more than there can be, which is
    the least of T - 1 and W, and for tokens that do not differ.
    """
    x = _tokens(x)
    possible = min(x.shape[0] - 1, x.shape[1])
    if not 1 <= n <= possible:
        raise RequestError(f"{x.shape[0]} tokens of width {x.shape[1]} have 1 to {possible} components; asked for {n}.")
    centred = _centred(x)
    if not centred.any():
        raise RequestError("all tokens are the same: there is no direction in which they differ.")
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    power = singular**2
    components = components[:n]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    parts = (x.mean(0), components, power[:n] / power.sum(), centred @ components.T)
    return Components(*(part.numpy() for part in parts))


def norms(c: Tensor, k_rope: Tensor) -> pd.DataFrame:
    """One row a token of attn.kv_latent [T, C] and attn.k_rope [T, R]: Euclidean norm and root mean square of each.

    The latent has passed its norm (RMSNorm with a learned weight), so its size varies little; the rotary key has not.
    """
    if c.dim() != 2 or k_rope.dim() != 2 or len(c) != len(k_rope):
        raise RequestError(f"need [T, C] and [T, R] of one sequence; got {tuple(c.shape)} and {tuple(k_rope.shape)}.")
    c, k_rope = (x.detach().cpu().double() for x in (c, k_rope))
    columns = {
        "latent": c.norm(dim=1),
        "latent_rms": c.square().mean(1).sqrt(),
        "rope": k_rope.norm(dim=1),
        "rope_rms": k_rope.square().mean(1).sqrt(),
    }
    frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    return frame.rename_axis(index="token")


def outliers(x: Tensor, count: int | None = 10) -> pd.DataFrame:
    """The `count` channels of x [T, W] with the largest peak (None: all), one row a channel.

    mean, rms   over tokens
    largest     absolute value; token: where
    peak        largest / rms, at most sqrt(T): what a quantiser that scales by the largest value loses to it
    kurtosis    of the values about their mean, less 3: 0 for a normal distribution, -1.2 for an even one, large where a
                few tokens stand out. NaN for a channel that does not vary
    """
    x = _tokens(x)
    rms = x.square().mean(0).sqrt()
    largest, token = x.abs().max(0)
    centred = _centred(x)
    variance = centred.square().mean(0)
    kurtosis = torch.where(variance > 0, centred.pow(4).mean(0) / variance.where(variance > 0, 1.0) ** 2 - 3, torch.nan)
    columns = {
        "mean": x.mean(0),
        "rms": rms,
        "largest": largest,
        "token": token,
        "peak": largest / rms.where(rms > 0, 1.0),
        "kurtosis": kurtosis,
    }
    frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    frame = frame.rename_axis(index="channel").sort_values("peak", ascending=False, kind="stable")
    return frame if count is None else frame.head(count)


def _tokens(x: Tensor) -> Tensor:
    if x.dim() != 2 or len(x) < 2:
        raise RequestError(f"need [T, width] of one sequence, of two tokens or more; got {tuple(x.shape)}.")
    return x.detach().cpu().double()


def _centred(x: Tensor) -> Tensor:
    """Less the mean over tokens; rounding that is left of equal values is taken off too."""
    out = x - x.mean(0)
    return out.masked_fill(out.abs() <= 1e-14 * x.abs().amax(0), 0.0)


def _singular(x: Tensor, center: bool) -> Tensor:
    return torch.linalg.svdvals(_centred(x) if center else x)
