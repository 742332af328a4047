"""Lean: a pass of as few operations as there are kernels for, of a model on a GPU that nobody looks into.

What `Model.forward` computes, with several of its steps in one operation and no place where a probe could stand. In it
nothing asks the host, so that a pass of one token can be captured and replayed (graph.py).

B batch, T new tokens, D hidden, H heads, R rotary width, C latent.
"""

import torch
from torch import nn

from workbench import ops, steps
from workbench.blocks import Bank
from workbench.cache import LatentCache
from workbench.door import present
from workbench.experts import Resident
from workbench.pages import Pages
from workbench.probe import Probe

FEW = 8  # new tokens of a sequence that attend in the latent space, over pages


def refusal(model: nn.Module, cache: LatentCache | None, probe: Probe) -> str | None:
    """Why a pass of a model.Model is not lean; None where it may be."""
    if not present(model.norm):
        return f"the model is on {model.device.type}"
    if cache is None:
        return "there is no cache"
    if cache.pool.recent:
        return f"the cache keeps recent tokens wide ({cache.format})"
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
        return "a gradient is asked for"
    if not probe.quiet:
        return "a probe looks inside, or changes more than routers' logits"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a module has a forward hook"
    return None


def forward(
    model: nn.Module, x: torch.Tensor, rotations: torch.Tensor, cache: LatentCache, probe: Probe, every: bool
) -> torch.Tensor:
    """Embedded tokens [B, T, D] to fp32 logits [B, T, vocab], or [B, 1, vocab] if not of `every` token.

    rotations complex [B, T, R / 2]. The cache has room for the new rows, which are written; it is not advanced.
    """
    probe.direct()
    return computed(model, x, rotations, cache, cache.pages, probe, every)


def computed(
    model: nn.Module,
    x: torch.Tensor,
    rotations: torch.Tensor,
    cache: LatentCache,
    pages: Pages,
    probe: Probe,
    every: bool = False,
) -> torch.Tensor:
    """What `forward` launches, once the host has said where everything is."""
    turns = torch.view_as_real(rotations)
    for block in model.blocks:
        normed = ops.rms_norm(x, block.attention_norm, block.eps)
        attended = _attention(block.attention, normed, turns, cache, pages)
        x, normed = steps.add_norm(x, attended, block.mlp_norm, block.eps)
        x = x + _fed(block, normed, probe).to(x.dtype)
    x = x if every else x[:, -1:]
    return ops.linear(ops.rms_norm(x, model.norm, model.config.rms_norm_eps), model.head).float()


def _attention(
    attention: nn.Module, x: torch.Tensor, turns: torch.Tensor, cache: LatentCache, pages: Pages
) -> torch.Tensor:
    config = attention.config
    query, compressed = attention.projected(x)
    content, position = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    latents = cache.latents(attention.layer, pages)
    position = steps.append(position, compressed, attention.kv_norm, turns, latents, pages.before, config.rms_norm_eps)
    if x.shape[1] <= FEW:
        read = steps.mla_decode(ops.lift(content, attention.kv_up), position, latents, attention.scale)
        z = ops.lower(read, attention.kv_up, config.v_head_dim)
    else:
        each = [attention.recall(content[b : b + 1], position[b : b + 1], cache, b) for b in range(cache.batch)]
        z = torch.cat(each) if len(each) > 1 else each[0]
    return ops.linear(z.flatten(-2), attention.out)


def _fed(block: nn.Module, x: torch.Tensor, probe: Probe) -> torch.Tensor:
    """What the feed-forward part adds to x [B, T, D], in x's type or in fp32."""
    mlp, layer = block.mlp, block.layer
    if not hasattr(mlp, "router"):
        return mlp(x)
    flat = x.flatten(0, -2)
    ids, gates, _ = steps.route(flat, mlp.router, probe.bias(layer), mlp.config, probe.row(layer))
    if isinstance(mlp.store, Resident):
        shared = mlp.shared and Bank(mlp.shared.gate_up, mlp.shared.down)
        return steps.experts(flat, ids, gates, mlp.store.bank(layer), shared).view(x.shape)
    return mlp.mixed(x, ids.view(*x.shape[:-1], -1), gates.view(*x.shape[:-1], -1))
