"""Residents: the weights that every token passes, and how many bytes each kind of them takes as a recipe packs them.

Arithmetic over the names and shapes of a checkpoint: nothing is read, so it serves any model on any machine.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from workbench.blocks import Layout
from workbench.codec import Codec
from workbench.config import Config
from workbench.footprint import WEIGHTS
from workbench.recipe import Recipe
from workbench.weights import expert_layout

EXPERTS = "routed experts"
TAKEN = "router and norms"  # computed with as plain numbers, however they are stored on disk
KINDS = tuple(kind for kind in WEIGHTS if kind != EXPERTS)


class Weight(NamedTuple):
    kind: str  # of footprint.WEIGHTS
    name: str
    shape: tuple[int, ...]


def weights(config: Config) -> Iterator[Weight]:
    """Every tensor of the model but those of routed experts."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query, latent = heads * config.qk_head_dim, config.kv_lora_rank
    yield Weight("embedding", "model.embed_tokens.weight", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        yield from (Weight(TAKEN, f"{at}.{norm}.weight", (hidden,)) for norm in norms)
        if rank is None:
            of = {"q_proj": (query, hidden)}
        else:
            of = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)}
        of |= {
            "kv_a_proj_with_mqa": (config.latent_width, hidden),
            "kv_a_layernorm": (latent,),
            "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
            "o_proj": (hidden, heads * config.v_head_dim),
        }
        yield from (Weight("attention", f"{at}.self_attn.{name}.weight", shape) for name, shape in of.items())
        if not config.is_moe(layer):
            yield from _dense("dense", f"{at}.mlp", hidden, config.intermediate_size)
            continue
        yield Weight(TAKEN, f"{at}.mlp.gate.weight", (config.n_routed_experts, hidden))
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            yield from _dense("shared experts", f"{at}.mlp.shared_experts", hidden, width)
    yield Weight(TAKEN, "model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield Weight("head", "lm_head.weight", (config.vocab_size, hidden))


def _dense(kind: str, name: str, hidden: int, width: int) -> Iterator[Weight]:
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Weight(kind, f"{name}.{part}_proj.weight", shape)


def stored(shape: tuple[int, ...], codec: Codec | None, dtype: torch.dtype) -> int:
    """Bytes of a tensor: packed row by row, or as it is in `dtype`."""
    *rows, width = shape
    row = dtype.itemsize * width if codec is None else sum(kind.itemsize * size for kind, size in codec.layout(width))
    return torch.Size(rows).numel() * row


class Residents(NamedTuple):
    """Bytes by kind, those of the largest tensor (held twice while it is read)."""

    kinds: dict[str, int]
    largest: int

    @property
    def nbytes(self) -> int:
        return sum(self.kinds.values())

    @property
    def read(self) -> int:
        """By one token: of the embedding it takes one row, unless that is also the head."""
        return self.nbytes - (self.kinds["embedding"] if self.kinds["head"] else 0)


@lru_cache
def residents(config: Config, recipe: Recipe | None, dtype: torch.dtype) -> Residents:
    """`recipe` None: all plain, in `dtype`."""
    kinds, largest = dict.fromkeys(KINDS, 0), 0
    for weight in weights(config):
        plain = recipe is None or weight.kind == TAKEN or len(weight.shape) == 1
        codec = None if plain else recipe.codec(weight.name)
        size = stored(weight.shape, codec, dtype)
        kinds[weight.kind] += size
        largest = max(largest, size)
    return Residents(kinds, largest)


@lru_cache
def expert_layouts(config: Config, recipe: Recipe | None) -> tuple[Layout | None, ...]:
    """Of the experts of each layer that has some: None where they are plain. CheckpointError: not packed alike."""
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    if recipe is None:
        return (None,) * len(layers)
    return tuple(expert_layout(config, layer, recipe.codec) for layer in layers)
