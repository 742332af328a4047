"""The operations of the model. Each body here is the definition; a file in kernels/ may answer the same call faster.

N tokens, B batch, T new tokens, S tokens so far, H heads, D hidden, W key width, V value width, E experts, K chosen,
G groups, I expert width.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from workbench.config import Config

SCORES = 1 << 26  # attention scores held at once, in elements: a quarter of a gigabyte


@cache
def kernel(name: str) -> ModuleType | None:
    """The file in kernels/ for the op of that name, if there is one here and Triton can be imported."""
    if find_spec("triton") is None or find_spec("workbench_kernels") is None:
        return None
    return import_module(f"workbench_kernels.{name}") if find_spec(f"workbench_kernels.{name}") else None


def refusal(name: str, *args) -> str | None:
    """Why the reference, not a kernel, answers this call; None where the kernel does."""
    if not args[0].is_cuda:
        return f"tensors are on {args[0].device.type}"
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return "a gradient is asked for"
    file = kernel(name)
    return f"there is no kernel for {name} here" if file is None else file.refuses(*args)


def op(body: Callable) -> Callable:
    """A reference body that a kernel of the same name may answer for. `refusal` says, for any call, which and why."""
    name = body.__name__

    @wraps(body)
    def call(*args):
        if args[0].is_cuda and refusal(name, *args) is None:
            return kernel(name).launch(*args)
        return body(*args)

    return call


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] by weight [out, in]."""
    return F.linear(x, weight)


@op
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised in fp32 and rounded to x's type before the weight, the order of the original code."""
    return weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, from [..., 2 I] holding gate then up."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax attention of the last T of S positions.

    query [B, T, H, W]; key [B, S, H or 1, W]; value [B, S, H or 1, V] -> [B, T, H, V]. One key for all heads is the
    absorbed form (paper, section 2.1.2); the softmax is fp32 and rounded to the query's type, as in the original code.
    """
    if key.shape[2] == 1:
        return _attend_shared(query, key[:, :, 0], value[:, :, 0], scale)
    return _attend_heads(query, key, value, scale)


def _attend_shared(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    batch, new, heads, _ = query.shape
    past = key.shape[1] - new
    few = max(1, SCORES // (batch * heads * key.shape[1]))
    if new > few:
        ends = [*range(few, new, few), new]
        starts = [0, *ends[:-1]]
        parts = [
            _attend_shared(query[:, start:end], key[:, : past + end], value[:, : past + end], scale)
            for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(parts, 1)
    scores = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).float() * scale  # [B, T H, S]
    if new > 1:
        future = _future(new, key.shape[1], query.device).repeat_interleave(heads, 0)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.bmm(scores.softmax(-1).to(query.dtype), value).unflatten(1, (new, heads))


def _attend_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    new, length, width = query.shape[1], key.shape[1], value.shape[-1]
    if query.shape[-1] > width:  # the fused kernels want one width for keys and values
        value = F.pad(value, (0, query.shape[-1] - width))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if new == length:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        past = ~_future(new, length, query.device)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=past, scale=scale)
    return out.transpose(1, 2)[..., :width]


def _future(new: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(new, length, dtype=torch.bool, device=device).triu(length - new + 1)


class Routing(NamedTuple):
    logits: torch.Tensor  # [N, E] fp32
    probs: torch.Tensor  # [N, E] fp32, softmax over all experts
    ids: torch.Tensor  # [N, K] int64, strongest first
    gates: torch.Tensor  # [N, K] fp32


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N, D] and [E, D] to [N, E], in fp32 whatever the model computes in: near ties decide experts."""
    return F.linear(x.float(), weight.float())


def route(logits: torch.Tensor, config: Config) -> Routing:
    """Chooses experts and weighs them (paper, eq. 21-22 and 2.2.2; group score = its best expert)."""
    probs = logits.softmax(-1)
    allowed = probs
    if config.topk_method == "group_limited_greedy":
        grouped = probs.unflatten(-1, (config.n_group, -1))  # [N, G, E/G]
        kept = grouped.amax(-1).topk(config.topk_group, -1).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter(-1, kept, 1.0)
        allowed = (grouped * mask[..., None]).flatten(-2)
    gates, ids = allowed.topk(config.num_experts_per_tok, -1)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    else:
        gates = gates * config.routed_scaling_factor
    return Routing(logits, probs, ids, gates)


def experts(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Sum over the chosen experts of gate * expert(x), accumulated in fp32.

    x [N, D]; ids, gates [N, K]; gate_up [E, 2 I, D]; down [E, D, I] -> [N, D] in x's type.
    """
    if x.shape[0] == 1 and not torch.is_grad_enabled():
        return _experts_of_one(x, ids[0], gates[0], gate_up, down)
    return _experts_grouped(x, ids, gates, gate_up, down)


def _experts_of_one(x, ids, gates, gate_up, down):
    chosen = ids.tolist()
    token = x[0]
    hidden = torch.stack([torch.mv(gate_up[expert], token) for expert in chosen])  # [K, 2 I]
    hidden = swiglu(hidden)
    outs = torch.stack([torch.mv(down[expert], h) for expert, h in zip(chosen, hidden, strict=True)])  # [K, D]
    return (gates @ outs.float()).to(x.dtype)[None]


def _experts_grouped(x, ids, gates, gate_up, down):
    order = ids.flatten().argsort(stable=True)  # assignments sorted by expert: every expert sees one contiguous run
    ends = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    token = order // ids.shape[1]
    hidden = swiglu(F.grouped_mm(x.index_select(0, token), gate_up.mT, offs=ends))
    sorted_gates = gates.flatten().index_select(0, order)[:, None]
    weighted = F.grouped_mm(hidden, down.mT, offs=ends).float() * sorted_gates
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, weighted).to(x.dtype)
