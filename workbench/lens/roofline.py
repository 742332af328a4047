"""What bounds a step of decoding: the bytes it moves and the operations it computes, part by part, from a shape alone.

A step takes `batch` sequences `new` tokens further. It reads each weight it needs once, however many tokens share it,
and each cached row once. What tokens hand from part to part is left out: a few kilobytes a token and layer. Attention
is in the absorbed form (paper, section 2.1.2), in which one cached row serves every head.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.config import Config
from workbench.errors import RequestError
from workbench.formats import Format, Row, cache_format

BF16 = 2.0  # bytes of a weight


class Card(NamedTuple):
    """What a device can do at most: bytes a second from its memory, operations a second in products."""

    bandwidth: float
    operations: float

    @property
    def ridge(self) -> float:
        """Operations a byte from which on operations bind, and below which bytes do."""
        return self.operations / self.bandwidth

    def rate(self, intensity: float) -> float:
        """Operations a second that work of so many operations a byte can reach (Williams and others, 2009)."""
        return min(self.operations, intensity * self.bandwidth)

    def seconds(self, nbytes: float, operations: float) -> float:
        """The least, if moving and computing overlap fully."""
        return max(nbytes / self.bandwidth, operations / self.operations)


# as published in NVIDIA's data sheets, not measured: dense bf16 products, without sparsity; SXM modules
CARDS = {
    "A100 80 GB": Card(2.039e12, 312e12),
    "H100": Card(3.35e12, 989e12),
    "H200": Card(4.8e12, 989e12),
}


class Work(NamedTuple):
    """Of one part in all layers: bytes of weights, bytes of cached rows, multiplications and additions."""

    weights: float = 0.0
    cached: float = 0.0
    operations: float = 0.0

    @property
    def nbytes(self) -> float:
        return self.weights + self.cached

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.nbytes if self.nbytes else float("nan")


def attention(config: Config, batch: int, context: int, format: str | Format = "bf16", new: int = 1) -> Work:
    """Scores over `context` cached rows of each sequence, and the sum of their latents.

    For each row, head and new token: C + R multiplied and added for the score, C for the sum. The row is read once for
    all of them, so the batch and the context change nothing in the intensity.
    """
    rows = batch * context * config.num_hidden_layers
    row = cache_format(format).nbytes(Row(config.kv_lora_rank, config.qk_rope_head_dim))
    each = 2 * config.num_attention_heads * (config.latent_width + config.kv_lora_rank)
    return Work(cached=rows * row, operations=rows * new * each)


def projections(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    """Matrices of attention: queries, the row, its way up to keys and values (absorbed: to the query and the output)
    and the output."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * config.qk_head_dim
    count = hidden * query if rank is None else rank * (hidden + query)
    count += hidden * config.latent_width
    count += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    count += heads * config.v_head_dim * hidden
    return _matrices(count * config.num_hidden_layers, batch * new, each)


def uniform(config: Config, tokens: int) -> float:
    """Distinct experts of a layer that so many tokens choose if each chooses by chance: E (1 - (1 - K / E)^tokens).

    The null. It holds for choices within groups too, as long as no group is preferred.
    """
    if not config.n_routed_experts:
        raise RequestError("this model has no routed experts.")
    return config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens)


def distinct(ids: np.ndarray) -> float:
    """Distinct experts that the tokens of a step really chose, ids [tokens, ..., K], on average over what is between
    (steps, layers). A slot that was not used is -1. RequestError without tokens or slots."""
    ids = np.asarray(ids)
    if ids.ndim < 2 or not ids.size:
        raise RequestError(f"ids of the experts of tokens [tokens, ..., K] are needed; got {list(ids.shape)}.")
    chosen = np.sort(np.moveaxis(ids, 0, -1).reshape(-1, ids.shape[-1] * ids.shape[0]), 1)
    first = np.diff(chosen, axis=1, prepend=-1) != 0  # -1 is before all, so it is never counted
    return float(first.sum(1).mean())


def experts(config: Config, batch: int, new: int = 1, each: float = BF16, distinct: float | None = None) -> Work:
    """Routed experts: those `distinct` ones that the step's tokens choose in a layer are read, by default as many as
    `uniform` says; each token computes with its own K."""
    layers = _moe_layers(config)
    if not layers:
        return Work()
    one = 3 * config.hidden_size * config.moe_intermediate_size * layers
    read = uniform(config, batch * new) if distinct is None else distinct
    return Work(weights=each * read * one, operations=2.0 * batch * new * config.num_experts_per_tok * one)


def shared(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    """Shared experts, which every token passes."""
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return _matrices((config.n_shared_experts or 0) * one * _moe_layers(config), batch * new, each)


def dense(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    """Layers without experts."""
    layers = config.num_hidden_layers - _moe_layers(config)
    return _matrices(3 * config.hidden_size * config.intermediate_size * layers, batch * new, each)


def router(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    return _matrices(config.hidden_size * (config.n_routed_experts or 0) * _moe_layers(config), batch * new, each)


def norms(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    """Weights of all norms; squared, added, scaled and weighed are four operations a number."""
    count = (2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)) * config.num_hidden_layers
    count += config.hidden_size
    return Work(weights=each * count, operations=4.0 * batch * new * count)


def head(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    return _matrices(config.vocab_size * config.hidden_size, batch * new, each)


def embedding(config: Config, batch: int, new: int = 1, each: float = BF16) -> Work:
    """A row a token; none where the table is the head's too, which is read whole."""
    rows = 0 if config.tie_word_embeddings else min(batch * new, config.vocab_size)
    return Work(weights=each * rows * config.hidden_size)


def step(
    config: Config,
    batch: int = 1,
    context: int = 0,
    format: str | Format = "bf16",
    new: int = 1,
    each: float = BF16,
    distinct: float | None = None,
) -> pd.DataFrame:
    """A row a part, and their sum: bytes of weights and cached rows, operations, and operations a byte.

    each: bytes of a weight; distinct: routed experts that are read in a layer, see `experts`. RequestError for a batch
    or new tokens below 1, or a context below 0.
    """
    if batch < 1 or new < 1 or context < 0:
        raise RequestError(f"batch and new are 1 or more, a context 0 or more; got {batch}, {new} and {context}.")
    parts = {
        "routed experts": experts(config, batch, new, each, distinct),
        "shared experts": shared(config, batch, new, each),
        "dense layers": dense(config, batch, new, each),
        "router": router(config, batch, new, each),
        "projections of attention": projections(config, batch, new, each),
        "attention over the cache": attention(config, batch, context, format, new),
        "norms": norms(config, batch, new, each),
        "head": head(config, batch, new, each),
        "embedding": embedding(config, batch, new, each),
    }
    parts["all"] = Work(*map(sum, zip(*parts.values(), strict=True)))
    rows = [(*part, part.nbytes, part.intensity) for part in parts.values()]
    columns = ["weights", "cached", "operations", "bytes", "operations a byte"]
    return pd.DataFrame(rows, pd.Index(parts, name="part"), columns)


def calls(work: Callable[[], object]) -> int:
    """Operations that PyTorch is asked for while `work` runs, views included. Asking takes time too, which no roofline
    knows."""
    with _Counted() as seen:
        work()
    return seen.count


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def _matrices(count: int, tokens: int, each: float) -> Work:
    return Work(weights=each * count, operations=2.0 * tokens * count)


def _moe_layers(config: Config) -> int:
    return sum(map(config.is_moe, range(config.num_hidden_layers)))
