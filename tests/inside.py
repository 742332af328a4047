"""The value at every site of one sequence, in float64: written from the paper like `reference`, to be compared with
what a probe sees, and with a hook at each site, to be compared with what an edit does.

T tokens, S keys; no batch and no cache. Sites and dimensions are named as in workbench/probe.py, B left out.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from reference import is_moe, rms_norm, rotate, softmax_scale, swiglu
from safetensors.torch import load_file
from torch import Tensor

Change = Callable[["Inside", str, int | None, Tensor], Tensor]  # site, layer, value -> what takes its place
Choose = Callable[["Inside", int, int, list[int]], list[int]]  # layer, position, experts from best to worst -> chosen


def nothing(inside: "Inside", site: str, layer: int | None, x: Tensor) -> Tensor:
    return x


def the_best(inside: "Inside", layer: int, position: int, ranked: list[int]) -> list[int]:
    return ranked[: inside.config["num_experts_per_tok"]]


def opened(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a checkpoint in one file, read without the package."""
    return json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")


class Inside(dict):
    """(site, layer) -> value; layer None outside the layers."""

    def __init__(
        self,
        config: dict,
        tensors: dict[str, Tensor],
        tokens: list[int],
        change: Change = nothing,
        choose: Choose = the_best,
    ):
        super().__init__()
        self.config, self.change, self.choose = config, change, choose
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.eps = config["rms_norm_eps"]
        x = self.pass_("embed", None, self.weights["model.embed_tokens.weight"][torch.tensor(tokens)])
        for layer in range(config["num_hidden_layers"]):
            x = self.block(x, layer)
        x = self.pass_("final.norm", None, rms_norm(x, self.weights["model.norm.weight"], self.eps))
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        self.logits = self.pass_("logits", None, x @ self.weights[head].T)

    def pass_(self, site: str, layer: int | None, x: Tensor) -> Tensor:
        self[site, layer] = self.change(self, site, layer, x)
        return self[site, layer]

    def block(self, x: Tensor, layer: int) -> Tensor:
        at = f"model.layers.{layer}"
        x = self.pass_("resid.pre", layer, x)
        h = self.pass_("attn.in", layer, rms_norm(x, self.weights[f"{at}.input_layernorm.weight"], self.eps))
        x = self.pass_("resid.mid", layer, x + self.pass_("attn.out", layer, self.attention(h, layer)))
        h = self.pass_("mlp.in", layer, rms_norm(x, self.weights[f"{at}.post_attention_layernorm.weight"], self.eps))
        moe = is_moe(self.config, layer)
        fed = self.mixture(h, layer) if moe else swiglu(h, self.weights, f"{at}.mlp")
        return self.pass_("resid.post", layer, x + self.pass_("mlp.out", layer, fed))

    def attention(self, h: Tensor, layer: int) -> Tensor:
        config, at, length = self.config, f"model.layers.{layer}.self_attn", len(h)
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
        if config["q_lora_rank"] is None:
            queries = h @ self.weights[f"{at}.q_proj.weight"].T
        else:
            down = h @ self.weights[f"{at}.q_a_proj.weight"].T
            down = self.pass_(
                "attn.q_latent", layer, rms_norm(down, self.weights[f"{at}.q_a_layernorm.weight"], self.eps)
            )
            queries = down @ self.weights[f"{at}.q_b_proj.weight"].T
        queries = queries.view(length, heads, nope + rope)
        content = self.pass_("attn.q_content", layer, queries[..., :nope])
        turned = torch.stack([rotate(queries[:, head, nope:], config) for head in range(heads)], 1)
        turned = self.pass_("attn.q_rope", layer, turned)
        compressed = h @ self.weights[f"{at}.kv_a_proj_with_mqa.weight"].T
        shared_key = self.pass_("attn.k_rope", layer, rotate(compressed[:, latent:], config))
        c = rms_norm(compressed[:, :latent], self.weights[f"{at}.kv_a_layernorm.weight"], self.eps)
        c = self.pass_("attn.kv_latent", layer, c)
        both = (c @ self.weights[f"{at}.kv_b_proj.weight"].T).view(length, heads, nope + value)
        keys = self.pass_("attn.k_content", layer, both[..., :nope])
        values = self.pass_("attn.v", layer, both[..., nope:])
        scale = softmax_scale(config)
        per_head = [content[:, head] @ keys[:, head].T * scale for head in range(heads)]
        by_content = self.pass_("attn.scores_content", layer, torch.stack(per_head))
        per_head = [turned[:, head] @ shared_key.T * scale for head in range(heads)]
        by_position = self.pass_("attn.scores_position", layer, torch.stack(per_head))
        scores = self.pass_("attn.scores", layer, by_content + by_position)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        pattern = self.pass_("attn.pattern", layer, torch.softmax(scores.masked_fill(future, -math.inf), -1))
        z = torch.stack([pattern[head] @ values[:, head] for head in range(heads)], 1)
        return self.pass_("attn.z", layer, z).flatten(1) @ self.weights[f"{at}.o_proj.weight"].T

    def mixture(self, h: Tensor, layer: int) -> Tensor:
        at = f"model.layers.{layer}.mlp"
        logits = self.pass_("moe.router_logits", layer, h @ self.weights[f"{at}.gate.weight"].T)
        probs = self.pass_("moe.router_probs", layer, torch.softmax(logits, -1))
        ids, gates, scores = self.route(probs, layer)
        self.pass_("moe.experts", layer, ids)
        self.pass_("moe.scores", layer, scores)
        gates = self.pass_("moe.gates", layer, gates)
        rows = [
            torch.stack([swiglu(x, self.weights, f"{at}.experts.{max(expert, 0)}") for expert in row])
            for x, row in zip(h, ids.tolist(), strict=True)
        ]
        out = self.pass_("moe.expert_out", layer, torch.stack(rows))
        used = (ids >= 0)[..., None]
        routed = self.pass_("moe.routed_out", layer, (out * gates[..., None] * used).sum(1))
        if not self.config["n_shared_experts"]:
            return routed
        return routed + self.pass_("moe.shared_out", layer, swiglu(h, self.weights, f"{at}.shared_experts"))

    def route(self, probs: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        config, experts = self.config, probs.shape[1]
        count = config["n_group"] if config["topk_method"] == "group_limited_greedy" else 1
        size = experts // count
        groups = torch.ones(len(probs), count, dtype=probs.dtype)
        if config["topk_method"] == "group_limited_greedy":
            for row, keep in zip(probs, groups, strict=True):
                best = [max(row[g * size : (g + 1) * size].tolist()) for g in range(count)]
                for dropped in sorted(range(count), key=lambda g: best[g])[: count - config["topk_group"]]:
                    keep[dropped] = 0
        groups = self.pass_("moe.groups", layer, groups)
        allowed = [[row[e].item() * keep[e // size].item() for e in range(experts)] for row, keep in zip(probs, groups)]
        ranked = [sorted(range(experts), key=lambda e: -row[e]) for row in allowed]
        chosen = [self.choose(self, layer, position, row) for position, row in enumerate(ranked)]
        width = max(map(len, chosen))
        ids, gates, scores = [], [], []
        for row, may, order, picked in zip(probs, allowed, ranked, chosen, strict=True):
            weights = [row[e].item() for e in picked]
            if picked == the_best(self, layer, 0, order):  # its own choice is among the groups kept, or is none
                weights = [weight if may[e] > 0 else 0.0 for weight, e in zip(weights, picked)]
            best = max([may[e] for e in range(experts) if e not in picked], default=0.0)
            empty = width - len(picked)
            scores.append(weights + [0.0] * empty + [best])
            if config["norm_topk_prob"] and len(picked) > 1:
                weights = [weight / (sum(weights) + 1e-20) for weight in weights]
            else:
                weights = [weight * config["routed_scaling_factor"] for weight in weights]
            ids.append(picked + [-1] * empty)
            gates.append(weights + [0.0] * empty)
        return torch.tensor(ids), torch.tensor(gates, dtype=probs.dtype), torch.tensor(scores, dtype=probs.dtype)
