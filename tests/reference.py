"""DeepSeek-V2 a second time, in float64 and in loops: written from the paper and the released configurations alone, to
be compared with `workbench.model` and never to share a line with it.

Attention is expanded, nothing is cached, every token visits its experts one by one. Configurations are dictionaries in
the spelling of the released config.json. Equations are those of the technical report (arXiv 2405.04434).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    scores: Tensor  # [T, E] softmax over all routed experts
    ids: Tensor  # [T, K]
    gates: Tensor  # [T, K]


class Run(NamedTuple):
    logits: Tensor  # [T, vocab] float64
    routing: dict[int, Routing]  # by layer, where the layer has routed experts


def is_moe(config: dict, layer: int) -> bool:
    every = config.get("moe_layer_freq", 1)
    return bool(config["n_routed_experts"]) and layer >= config["first_k_dense_replace"] and layer % every == 0


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this configuration holds, rows = outputs."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, q_latent = config["kv_lora_rank"], config["q_lora_rank"]
    table = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        table["lm_head.weight"] = (config["vocab_size"], hidden)

    def mlp(prefix: str, width: int) -> None:
        table[f"{prefix}.gate_proj.weight"] = (width, hidden)
        table[f"{prefix}.up_proj.weight"] = (width, hidden)
        table[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        table[f"{at}.input_layernorm.weight"] = (hidden,)
        table[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        if q_latent is None:
            table[f"{at}.self_attn.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            table[f"{at}.self_attn.q_a_proj.weight"] = (q_latent, hidden)
            table[f"{at}.self_attn.q_a_layernorm.weight"] = (q_latent,)
            table[f"{at}.self_attn.q_b_proj.weight"] = (heads * (nope + rope), q_latent)
        table[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (latent + rope, hidden)
        table[f"{at}.self_attn.kv_a_layernorm.weight"] = (latent,)
        table[f"{at}.self_attn.kv_b_proj.weight"] = (heads * (nope + value), latent)
        table[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * value)
        if is_moe(config, layer):
            table[f"{at}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            for expert in range(config["n_routed_experts"]):
                mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
            if config["n_shared_experts"]:
                mlp(f"{at}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])
        else:
            mlp(f"{at}.mlp", config["intermediate_size"])
    return table


def mscale(factor: float, coefficient: float) -> float:
    """Section 3.1.4: sqrt(t) = 0.0707 ln s + 1, with the coefficient 0.707 of the paper made a parameter."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def frequencies(config: dict) -> list[float]:
    """One angle per position for each pair of rotated channels, interpolated as YaRN has it (arXiv 2309.00071)."""
    width, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if yarn is None:
        return plain

    def pair_that_turns(rounds: float) -> float:
        # the (fractional) pair that makes so many rounds over the original context
        turn = yarn["original_max_position_embeddings"] / (2 * math.pi * rounds)
        return width * math.log(turn) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), width - 1)
    mixed = []
    for i, frequency in enumerate(plain):
        slowed = min(max((i - low) / (high - low if high != low else 0.001), 0.0), 1.0)
        mixed.append(frequency * (1 - slowed) + frequency / yarn["factor"] * slowed)
    return mixed


def rotation_length(config: dict) -> float:
    """What YaRN multiplies the rotated channels by: 1 for every released checkpoint."""
    yarn = config["rope_scaling"]
    if yarn is None:
        return 1.0
    return mscale(yarn["factor"], yarn.get("mscale", 1)) / mscale(yarn["factor"], yarn.get("mscale_all_dim", 0))


def softmax_scale(config: dict) -> float:
    yarn = config["rope_scaling"]
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    return scale if yarn is None else scale * mscale(yarn["factor"], yarn.get("mscale_all_dim", 0)) ** 2


def rotate(x: Tensor, config: dict) -> Tensor:
    """x [T, width], pairs (0, 1), (2, 3) ... each turned by position x frequency."""
    length = rotation_length(config)
    positions = torch.arange(x.shape[0], dtype=torch.float64)
    turned = torch.empty_like(x)
    for i, frequency in enumerate(frequencies(config)):
        cos, sin = torch.cos(positions * frequency) * length, torch.sin(positions * frequency) * length
        even, odd = x[:, 2 * i], x[:, 2 * i + 1]
        turned[:, 2 * i] = even * cos - odd * sin
        turned[:, 2 * i + 1] = even * sin + odd * cos
    return turned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu(x: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def attention(h: Tensor, config: dict, weights: dict[str, Tensor], prefix: str) -> Tensor:
    """Eq. 37-47, expanded: every head gets its own keys and values, [T, hidden] -> [T, hidden]."""
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    length, latent, eps = h.shape[0], config["kv_lora_rank"], config["rms_norm_eps"]

    if config["q_lora_rank"] is None:
        queries = h @ weights[f"{prefix}.q_proj.weight"].T
    else:
        q_latent = rms_norm(h @ weights[f"{prefix}.q_a_proj.weight"].T, weights[f"{prefix}.q_a_layernorm.weight"], eps)
        queries = q_latent @ weights[f"{prefix}.q_b_proj.weight"].T
    compressed = h @ weights[f"{prefix}.kv_a_proj_with_mqa.weight"].T
    kv_latent = rms_norm(compressed[:, :latent], weights[f"{prefix}.kv_a_layernorm.weight"], eps)
    shared_key = rotate(compressed[:, latent:], config)
    keys_values = kv_latent @ weights[f"{prefix}.kv_b_proj.weight"].T

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = []
    for head in range(config["num_attention_heads"]):
        q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        kv = keys_values[:, head * (nope + value) : (head + 1) * (nope + value)]
        scores = q[:, :nope] @ kv[:, :nope].T + rotate(q[:, nope:], config) @ shared_key.T
        pattern = torch.softmax((scores * softmax_scale(config)).masked_fill(future, -math.inf), dim=-1)
        heads.append(pattern @ kv[:, nope:])
    return torch.cat(heads, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T


def route(scores: Tensor, config: dict) -> Routing:
    """Eq. 20-22 and section 2.2.2 (device-limited routing), token by token. scores [T, E]."""
    k = config["num_experts_per_tok"]
    ids, gates = [], []
    for row in scores:
        allowed = list(range(len(row)))
        if config["topk_method"] == "group_limited_greedy":
            size = len(row) // config["n_group"]
            best = [max(row[g * size : (g + 1) * size].tolist()) for g in range(config["n_group"])]
            kept = sorted(range(config["n_group"]), key=lambda g: -best[g])[: config["topk_group"]]
            allowed = [expert for expert in allowed if expert // size in kept]
        chosen = sorted(allowed, key=lambda expert: -row[expert].item())[:k]
        gate = row[chosen]
        # one or the other, never both: what DeepSeek-V3 does next is not what V2 does
        if config["norm_topk_prob"] and k > 1:
            gate = gate / (gate.sum() + 1e-20)
        else:
            gate = gate * config["routed_scaling_factor"]
        ids.append(torch.tensor(chosen))
        gates.append(gate)
    return Routing(scores, torch.stack(ids), torch.stack(gates))


def mixture(h: Tensor, config: dict, weights: dict[str, Tensor], prefix: str) -> tuple[Tensor, Routing]:
    routing = route(torch.softmax(h @ weights[f"{prefix}.gate.weight"].T, dim=-1), config)
    rows = []
    for x, ids, gates in zip(h, routing.ids.tolist(), routing.gates):
        rows.append(sum(gate * swiglu(x, weights, f"{prefix}.experts.{expert}") for expert, gate in zip(ids, gates)))
    out = torch.stack(rows)
    if config["n_shared_experts"]:
        out = out + swiglu(h, weights, f"{prefix}.shared_experts")
    return out, routing


def run(config: dict, tensors: dict[str, Tensor], tokens: list[int]) -> Run:
    """One sequence through the whole model. Gradients flow to `tensors` where those are float64 leaves."""
    weights = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    eps, routing = config["rms_norm_eps"], {}
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{at}.input_layernorm.weight"], eps)
        x = x + attention(h, config, weights, f"{at}.self_attn")
        h = rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        if is_moe(config, layer):
            out, routing[layer] = mixture(h, config, weights, f"{at}.mlp")
        else:
            out = swiglu(h, weights, f"{at}.mlp")
        x = x + out
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return Run(rms_norm(x, weights["model.norm.weight"], eps) @ weights[head].T, routing)
