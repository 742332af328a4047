"""The operations of the model. Each body here is the definition; a file in kernels/ may answer the same call faster.

N tokens, B batch, T new tokens, S tokens so far, H heads, D hidden, W key width, V value width, E experts, K chosen,
G groups, I expert width. What ends in `_open` is the same with its inside laid out for a probe (see probe.py).
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

from workbench import packed
from workbench.blocks import Bank
from workbench.config import Config
from workbench.door import op, present
from workbench.matrix import Matrix, Weight, dense
from workbench.probe import Probe

SCORES = 1 << 26  # attention scores held at once, in elements: a quarter of a gigabyte
PART = 1024  # rows of a packed cache that are unpacked together


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x [..., in] by weight [out, in]."""
    return _linear_packed(x, weight) if isinstance(weight, Matrix) else F.linear(x, weight)


@op("linear")
def _linear_packed(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    return packed.linear(x, weight)


def embed(tokens: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a weight [vocab, D] for tokens [...]: [..., D]. Of a packed one only these rows are unpacked."""
    return weight[tokens].dense(dtype) if isinstance(weight, Matrix) else F.embedding(tokens, weight)


def lift(content: torch.Tensor, kv_up: Weight) -> torch.Tensor:
    """Queries [B, T, H, N] into the space of the latent, [B, T, H, C], by the key rows of kv_up [H (N + V), C]."""
    heads, width = content.shape[-2:]
    if isinstance(kv_up, Matrix) and (lifted := packed.lift(content, kv_up)) is not None:
        return lifted
    keys = dense(kv_up, content.dtype).unflatten(0, (heads, -1))[:, :width]  # [H, N, C]
    return (content.transpose(1, 2) @ keys).transpose(1, 2)


def lower(out: torch.Tensor, kv_up: Weight, width: int) -> torch.Tensor:
    """What heads read of the latent, [B, T, H, C], as values [B, T, H, V = width], by the value rows of kv_up."""
    if isinstance(kv_up, Matrix) and (lowered := packed.lower(out, kv_up, width)) is not None:
        return lowered
    values = dense(kv_up, out.dtype).unflatten(0, (out.shape[-2], -1))[:, -width:]  # [H, V, C]
    return (out.transpose(1, 2) @ values.mT).transpose(1, 2)


@op("rms_norm")
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
    if not present(query):
        return _attend_heads(query, key, value, scale)
    starts = (torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1] for x in (query, key))
    flat = (x.flatten(0, 1) for x in (query, key, value))
    return mla_prefill(*flat, *starts, query.shape[1], scale).unflatten(0, query.shape[:2])


def rows_at_once(new: int, heads: int) -> int:
    """How many rows of a cache are unpacked together: whole blocks, as many as keep the scores within SCORES."""
    return max(1, min(PART, SCORES // (new * heads)) // 64) * 64


def attend_in_parts(
    query: torch.Tensor, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], length: int, scale: float
) -> torch.Tensor:
    """`attend` over keys and values that come in parts, in order, S = `length` together; each part is held alone.

    The softmax is carried along (arXiv 1805.02867): sums so far are rescaled when a larger score comes. All in fp32.
    """
    batch, new, heads, _ = query.shape
    last = length - new + torch.arange(new, device=query.device)  # the last position each query sees
    largest = torch.full((batch, heads, new, 1), float("-inf"), device=query.device)
    total, out, start = torch.zeros_like(largest), None, 0
    asked = query.transpose(1, 2).float()  # [B, H, T, W]
    for key, value in parts:
        key, value = key.transpose(1, 2).float(), value.transpose(1, 2).float()  # [B, H or 1, s, ...]
        scores = asked @ key.mT * scale
        seen = start + torch.arange(key.shape[2], device=query.device)
        scores = scores.masked_fill(seen > last[:, None], float("-inf"))
        now = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, kept = (scores - now).exp(), (largest - now).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        out = weights @ value if out is None else out * kept + weights @ value
        largest, start = now, start + key.shape[2]
    return (out / total).transpose(1, 2).to(query.dtype)


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


@op("mla_prefill")
def mla_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """`attend` of several sequences of any lengths, a key and a value for each head, one after the other.

    query [N, H, W], key [M, H, W], value [M, H, V]; sequence b has those from starts [B + 1] int32 b to b + 1, its
    queries are the last of its positions and at most `longest` -> [N, H, V].
    """
    spans = zip(query_starts.tolist(), query_starts.tolist()[1:], key_starts.tolist(), key_starts.tolist()[1:])
    each = [
        _attend_heads(query[None, first:last], key[None, start:end], value[None, start:end], scale)[0]
        for first, last, start, end in spans
    ]
    return torch.cat(each)


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


def attend_open(
    content: torch.Tensor,
    position: torch.Tensor,
    key: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    ends: torch.Tensor,
    probe: Probe,
) -> torch.Tensor:
    """`attend` of every head in fp32, step by step, each step a site that a probe may see and change.

    content [B, T, H, N], position [B, T, H, R]; key [B, S, H, N], k_rope [B, S, R], value [B, S, H, V]; ends [B]: the
    length of each sequence, whose last T positions ask -> [B, T, H, V]. It holds some T x S numbers a head.
    """
    key, value = probe("attn.k_content", key), probe("attn.v", value)
    by_content = torch.einsum("bthn,bshn->bhts", content.float(), key.float()) * scale
    by_position = torch.einsum("bthr,bsr->bhts", position.float(), k_rope.float()) * scale
    by_content, by_position = probe("attn.scores_content", by_content), probe("attn.scores_position", by_position)
    scores = probe("attn.scores", by_content + by_position)
    new, length = scores.shape[-2:]
    last = ends[:, None] - new + torch.arange(new, device=ends.device)  # [B, T]: the last position each token sees
    future = torch.arange(length, device=ends.device) > last[..., None]
    pattern = scores.masked_fill(future[:, None], float("-inf")).softmax(-1)
    pattern = probe("attn.pattern", pattern)
    return torch.einsum("bhts,bshv->bthv", pattern, value.float()).to(content.dtype)


class Routing(NamedTuple):
    """Any leading dimensions in place of N."""

    probs: torch.Tensor  # [N, E] fp32, softmax over all experts
    ids: torch.Tensor  # [N, K] int64, strongest first
    gates: torch.Tensor  # [N, K] fp32
    scores: torch.Tensor  # [N, K + 1] fp32, probs of the chosen, then of the best expert that was not chosen


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N, D] and [E, D] to [N, E], in fp32 whatever the model computes in: near ties decide experts."""
    return F.linear(x.float(), weight.float())


def route(logits: torch.Tensor, config: Config) -> Routing:
    """Chooses experts and weighs them (paper, eq. 21-22 and 2.2.2; group score = its best expert)."""
    probs, chosen = logits.softmax(-1), config.num_experts_per_tok
    allowed = probs
    if config.topk_method == "group_limited_greedy":
        allowed = _among(probs, groups_kept(probs, config))
    scores, ids = allowed.topk(min(chosen + 1, probs.shape[-1]), -1)
    if scores.shape[-1] == chosen:  # every expert is chosen, so there is no other
        scores = F.pad(scores, (0, 1))
    return Routing(probs, ids[..., :chosen], _weighed(scores[..., :chosen], config), scores)


def route_open(logits: torch.Tensor, config: Config, probe: Probe) -> Routing:
    """The same step by step, each step a site that a probe may see and change; what is chosen may be changed too."""
    probs = probe("moe.router_probs", logits.softmax(-1))
    allowed = _among(probs, probe("moe.groups", groups_kept(probs, config)))
    own = allowed.topk(config.num_experts_per_tok, -1).indices
    ids = probe.select(own, allowed)
    used, slots = ids >= 0, ids.clamp(min=0)
    others = allowed.scatter(-1, slots, torch.where(used, float("-inf"), allowed.gather(-1, slots)))
    best = others.amax(-1, keepdim=True).clamp(min=0)
    # what fills a slot for want of others weighs nothing; what a probe chose may come from a dropped group
    chosen = probs.gather(-1, slots) * (allowed.gather(-1, slots) > 0 if ids is own else used)
    scores = torch.cat([chosen, best], -1)
    gates = probe.routed(ids, _weighed(chosen, config, used.sum(-1, keepdim=True)), scores)
    return Routing(probs, slots, gates * used, scores)


def groups_kept(probs: torch.Tensor, config: Config) -> torch.Tensor:
    """[N, E] to [N, G]: 1 for the topk_group groups whose best expert is best, 0 for the others (paper, 2.2.2)."""
    if config.topk_method == "greedy":
        return torch.ones_like(probs[..., :1])
    best = probs.unflatten(-1, (config.n_group, -1)).amax(-1)
    return torch.zeros_like(best).scatter(-1, best.topk(config.topk_group, -1).indices, 1.0)


def _among(probs: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return (probs.unflatten(-1, (groups.shape[-1], -1)) * groups[..., None]).flatten(-2)


def _weighed(chosen: torch.Tensor, config: Config, used: torch.Tensor | int = 0) -> torch.Tensor:
    """Gates from the probabilities of the chosen [N, K]; `used` slots of each token, if an edit left some empty."""
    if not config.norm_topk_prob:
        return chosen * config.routed_scaling_factor
    normed = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    if isinstance(used, int):
        return normed if chosen.shape[-1] > 1 else chosen * config.routed_scaling_factor
    return torch.where(used > 1, normed, chosen * config.routed_scaling_factor)


Waves = Iterable[tuple[Bank, torch.Tensor]]


def experts(x: torch.Tensor, gates: torch.Tensor, waves: Waves) -> torch.Tensor:
    """Sum over the chosen experts of gate * expert(x), accumulated in fp32.

    x [N, D]; gates [N, K]; waves: banks gate_up [E, 2 I, D], down [E, D, I], each with the slot of every choice in it,
    [N, K], or -1 where it is in another wave. Plain experts come in one wave -> [N, D] in x's type.
    """
    waves = iter(waves)
    bank, slots = next(waves)
    if isinstance(bank.gate_up, Matrix):  # one order of summing, however many waves there are
        return weigh_outputs(packed.expert_outputs(x, chain([(bank, slots)], waves)), gates)
    if x.shape[0] == 1 and not torch.is_grad_enabled():
        return (gates[0] @ _outputs_of_one(x[0], slots[0], *bank).float()).to(x.dtype)[None]
    return experts_grouped(x, slots, gates, *bank)


def expert_outputs(x: torch.Tensor, waves: Waves) -> torch.Tensor:
    """What `experts` sums, before the gates: [N, K, D] in x's type."""
    waves = iter(waves)
    bank, slots = next(waves)
    if isinstance(bank.gate_up, Matrix):
        return packed.expert_outputs(x, chain([(bank, slots)], waves))
    if x.shape[0] == 1 and not torch.is_grad_enabled():
        return _outputs_of_one(x[0], slots[0], *bank)[None]
    order, _, outputs = _outputs_grouped(x, slots, *bank)
    return torch.empty_like(outputs).index_copy(0, order, outputs).unflatten(0, slots.shape)


def weigh_outputs(outputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """[N, K, D] and [N, K] to [N, D], accumulated in fp32."""
    return (outputs.float() * gates[..., None]).sum(-2).to(outputs.dtype)


def _outputs_of_one(token, ids, gate_up, down):
    chosen = ids.tolist()
    hidden = swiglu(torch.stack([torch.mv(gate_up[expert], token) for expert in chosen]))  # [K, I]
    return torch.stack([torch.mv(down[expert], h) for expert, h in zip(chosen, hidden, strict=True)])  # [K, D]


def _outputs_grouped(x, ids, gate_up, down):
    order = ids.flatten().argsort(stable=True)  # assignments sorted by expert: every expert sees one contiguous run
    ends = _counts(ids.flatten(), gate_up.shape[0]).cumsum(0).to(torch.int32)
    token = order // ids.shape[1]
    hidden = swiglu(_grouped(x.index_select(0, token), gate_up, ends))
    return order, token, _grouped(hidden, down, ends)


def _counts(ids, experts):
    """How often each expert is chosen. Not torch.bincount, which asks a GPU for the largest id."""
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add(0, ids, torch.ones_like(ids))


def _grouped(x, weight, ends):
    """Runs of rows of x [M, in], each up to its own end, by their weights [E, out, in]: [M, out]."""
    if any(size * weight.itemsize % 16 for size in weight.shape[1:]):  # F.grouped_mm wants rows of whole 16 bytes
        runs = x.tensor_split(ends[:-1].tolist())
        return torch.cat([F.linear(run, own) for run, own in zip(runs, weight, strict=True)])
    return F.grouped_mm(x, weight.mT, offs=ends)


def experts_grouped(x, ids, gates, gate_up, down):
    """`experts` of one plain bank, by products of whole groups."""
    order, token, outputs = _outputs_grouped(x, ids, gate_up, down)
    weighted = outputs.float() * gates.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, weighted).to(x.dtype)
