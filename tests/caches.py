"""A small cache, written and read as a forward pass does it."""

from dataclasses import replace

import torch

from workbench.config import Config

CONFIG = replace(
    Config.preset("pocket"), num_hidden_layers=3, kv_lora_rank=24, qk_rope_head_dim=8, max_position_embeddings=320
)


def rows(cache, tokens, seed=0):
    """Random ones [layers, B, T, W]."""
    shape = (CONFIG.num_hidden_layers, cache.batch, tokens, CONFIG.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(cache, new):
    """new [layers, B, T, W]."""
    cache.reserve(new.shape[2])
    for layer, of_layer in enumerate(new):
        cache.append(layer, of_layer)
    cache.advance(new.shape[2])


def read(cache, sequence=0):
    """[layers, S, W] of one sequence, without what is only reserved."""
    length = cache.lengths[sequence]
    layers = range(CONFIG.num_hidden_layers)
    return torch.stack([cache.rows(layer, sequence, torch.float32)[:length] for layer in layers])
