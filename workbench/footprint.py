"""Bytes by arithmetic: what a model and the cache of so many tokens must take, before anything is allocated.

Whole numbers throughout. What is really allocated says the meter.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch

from workbench.cache import BLOCK
from workbench.config import Config
from workbench.errors import RequestError
from workbench.formats import Format, Plain, Row, cache_format

WEIGHTS = ("embedding", "attention", "shared experts", "routed experts", "dense", "router and norms", "head")
TABLE = "rotary table"  # one complex64 for every position and pair: no weight, but as large as the context is long


class RowBytes(NamedTuple):
    """Bytes of one row: of the latent's elements or codes, of the rotary key's, and of the scales of both."""

    latent: int
    rotary: int
    scales: int

    @classmethod
    def of(cls, format: Format, row: Row) -> "RowBytes":
        sizes = [dtype.itemsize * width for dtype, width in format.layout(row)]
        if isinstance(format, Plain):  # both in one tensor
            return cls(format.dtype.itemsize * row.latent, format.dtype.itemsize * row.rope, 0)
        first = len(format.latent.layout(row.latent))  # of each codec the elements come first, then their scales
        return cls(sizes[0], sizes[first], sum(sizes) - sizes[0] - sizes[first])


def count_weights(config: Config) -> dict[str, int]:
    """Numbers of weights of each kind; together those of `config.parameters()`."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * config.qk_head_dim
    attention = hidden * query if rank is None else rank * (hidden + 1 + query)
    attention += hidden * config.latent_width + config.kv_lora_rank
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * hidden
    layers = range(config.num_hidden_layers)
    sparse = sum(map(config.is_moe, layers))
    experts, expert = config.n_routed_experts or 0, 3 * hidden * config.moe_intermediate_size
    counts = (
        config.vocab_size * hidden,
        len(layers) * attention,
        sparse * (config.n_shared_experts or 0) * expert,
        sparse * experts * expert,
        (len(layers) - sparse) * 3 * hidden * config.intermediate_size,
        sparse * experts * hidden + (2 * len(layers) + 1) * hidden,
        0 if config.tie_word_embeddings else config.vocab_size * hidden,
    )
    return dict(zip(WEIGHTS, counts, strict=True))


@dataclass(frozen=True)
class Footprint:
    """A model of this shape, its weights in `dtype`, with `batch` sequences of `tokens` tokens each in its cache.

    RequestError for fewer than 0 tokens or 1 sequence, more tokens than the context holds, or an unknown format.
    """

    config: Config
    tokens: int
    batch: int = 1
    format: str | Format = "bf16"
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "format", cache_format(self.format))
        most = self.config.max_position_embeddings
        if not 0 <= self.tokens <= most:
            raise RequestError(f"tokens must be from 0 to the context of {most:,}; got {self.tokens:,}.")
        if self.batch < 1:
            raise RequestError(f"a batch has at least 1 sequence; got {self.batch}.")

    @property
    def row(self) -> Row:
        return Row(self.config.kv_lora_rank, self.config.qk_rope_head_dim)

    @property
    def per_token(self) -> int:
        """Of a token in all layers, padding and recent tokens left out: what the paper counts."""
        return self.config.num_hidden_layers * self.format.nbytes(self.row)

    @property
    def weights(self) -> dict[str, int]:
        return {kind: count * self.dtype.itemsize for kind, count in count_weights(self.config).items()}

    @property
    def table(self) -> int:
        return self.config.max_position_embeddings * (self.config.qk_rope_head_dim // 2) * torch.complex64.itemsize

    @property
    def cache(self) -> dict[str, int]:
        """Of all sequences and layers: "latent", "rotary key" and "scales" of the tokens, the "padding" of each last
        block of 64, and the "recent tokens" kept in bf16 beside their packed rows.
        """
        layers, format = self.config.num_hidden_layers, self.format
        each = RowBytes.of(format, self.row)
        rows = self.batch * layers * self.tokens
        window = min(format.recent, self.config.max_position_embeddings)
        return {
            "latent": rows * each.latent,
            "rotary key": rows * each.rotary,
            "scales": rows * each.scales,
            "padding": self.batch * layers * (-self.tokens % BLOCK) * format.nbytes(self.row),
            "recent tokens": self.batch * layers * window * self.row.width * torch.bfloat16.itemsize,
        }

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.weights.values()) + self.table + sum(self.cache.values())

    def to_frame(self) -> pd.DataFrame:
        """A row a part, with its bytes and its share of all."""
        parts = [("weights", kind, size) for kind, size in self.weights.items()]
        parts += [("table", TABLE, self.table)]
        parts += [("cache", part, size) for part, size in self.cache.items()]
        table = pd.DataFrame(parts, columns=["of", "part", "bytes"]).set_index(["of", "part"])
        return table.assign(share=table["bytes"] / self.nbytes)

    def __str__(self) -> str:
        sequences = "1 sequence" if self.batch == 1 else f"{self.batch:,} sequences"
        return f"{self.config.name or 'this model'}, {sequences} of {self.tokens:,} tokens, cache in {self.format.name}"
