"""Calibration: what every matrix of a model reads on some text, as second moments, for a rounding that knows them.

D hidden, I width of a feed-forward part, E experts, K chosen.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from workbench import ops
from workbench.config import Config
from workbench.model import Dense, Model
from workbench.probe import OFF, Probe

KIND = "deepseek-workbench calibration"
LIMIT = 8 * 2**30  # bytes of moments that are held at once
TOKENS = 512  # of a pass at most: what passes a site is held for one pass only
EVERY = 8  # one token in so many is seen by all experts, for what those read that few tokens go to
# What a matrix reads, by the end of its name. Inside a feed-forward part, "hidden" is what its down projection reads.
_READS = {
    "q_proj": "attn.in",
    "q_a_proj": "attn.in",
    "kv_a_proj_with_mqa": "attn.in",
    "q_b_proj": "attn.q_latent",
    "kv_b_proj": "attn.kv_latent",
    "o_proj": "attn.z",
    "gate_proj": "mlp.in",
    "up_proj": "mlp.in",
    "down_proj": "hidden",
}


def moment_name(matrix: str) -> str | None:
    """The moment of what that matrix of a checkpoint reads; None for one that multiplies nothing, as the embedding.

    "layers.3.attn.in"; of a routed expert its own: "layers.3.experts.7.mlp.in", "layers.3.experts.7.hidden".
    """
    if matrix == "lm_head.weight":
        return "final.norm"
    if not matrix.startswith("model.layers."):
        return None
    layer, *_, last, _ = (parts := matrix.split("."))[2:]
    if last not in _READS:
        return None
    site = _READS[last]
    if "experts" in parts:
        site = f"experts.{parts[parts.index('experts') + 1]}.{site}"
    elif "shared_experts" in parts and site == "hidden":
        site = "shared.hidden"
    return f"layers.{layer}.{site}"


def moments_of(config: Config, layers: Iterable[int] | None = None) -> dict[str, int]:
    """Every moment of a model and its width; of some layers only, and then without the head's."""
    found = {}
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        of_layer = {"attn.in": config.hidden_size}
        if config.q_lora_rank is not None:
            of_layer["attn.q_latent"] = config.q_lora_rank
        of_layer["attn.kv_latent"] = config.kv_lora_rank
        of_layer["attn.z"] = config.num_attention_heads * config.v_head_dim
        of_layer["mlp.in"] = config.hidden_size
        if not config.is_moe(layer):
            of_layer["hidden"] = config.intermediate_size
        else:
            for expert in range(config.n_routed_experts):
                of_layer[f"experts.{expert}.mlp.in"] = config.hidden_size
                of_layer[f"experts.{expert}.hidden"] = config.moe_intermediate_size
            if config.n_shared_experts:
                of_layer["shared.hidden"] = config.n_shared_experts * config.moe_intermediate_size
        found |= {f"layers.{layer}.{site}": width for site, width in of_layer.items()}
    if layers is None:
        found["final.norm"] = config.hidden_size
    return found


class Calibration:
    """Second moments X^T X / n, fp32 [in, in], of what matrices read.

    Of a feed-forward part the moment "hidden" is computed from what it reads, with its own plain weights.
    """

    def __init__(self, moments: Mapping[str, torch.Tensor]):
        self.moments = moments

    def of(self, matrix: str) -> torch.Tensor | None:
        name = moment_name(matrix)
        return None if name is None else self.moments[name]

    @classmethod
    def collect(cls, model: Model, texts: Iterable[torch.Tensor], limit: int = LIMIT) -> "Calibration":
        needed = sum(4 * w * w for w in moments_of(model.config).values())
        return cls(gather(model, texts, None))


def gather(
    model: Model, texts: Iterable[torch.Tensor], layers: Sequence[int] | None, gated: bool = False, own=True
) -> dict[str, torch.Tensor]:
    sums = _Sums(model, frozenset(range(model.config.num_hidden_layers) if layers is None else layers), gated)
    with torch.inference_mode():
        for tokens in texts:
            for part in tokens.split(max(1, TOKENS // tokens.shape[1])):
                model(part, probe=sums)
    return sums.means(own)


class _Sum:
    """Of x^T x, x [n, in] a call, and of the weights of the rows."""

    def __init__(self):
        self.square, self.weight = 0.0, 0.0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        x = x.float()
        w = x if weight is None else x * weight[:, None]
        self.square = self.square + x.mT @ w
        self.weight += len(x) if weight is None else float(weight.sum())


class _Sums(Probe):
    def __init__(self, model, layers, gated):
        self.model, self.layers, self.gated = model, layers, gated
        self.sums: dict[str, _Sum] = {}
        self.n: dict[str, int] = {}

    def at(self, layer):
        return _Layer(self, layer) if layer in self.layers else OFF

    def __call__(self, site, x):
        if site == "final.norm":
            self.add(site, x.flatten(0, -2))
        return x

    def add(self, name, x, weight=None):
        self.sums.setdefault(name, _Sum()).add(x, weight)
        self.n[name] = self.n.get(name, 0) + len(x)

    def means(self, own):
        config, found = self.model.config, {}
        for name, width in moments_of(config).items():
            if name not in self.sums and ".experts." not in name:
                continue
            if ".experts." not in name:
                s = self.sums[name]
                found[name] = s.square / s.weight
                continue
            layer = name.split(".experts.")[0]
            prior = self.sums[f"{layer}.mlp.in"] if name.endswith("mlp.in") else self.sums[f"{name}:prior"]
            prior = prior.square / prior.weight
            if name in self.sums and own:
                s, n = self.sums[name], self.n[name]
                share = n / (n + width * PRIOR)
                found[name] = share * s.square / s.weight + (1 - share) * prior
            else:
                found[name] = prior
        return found


PRIOR = 1.0


class _Layer(Probe):
    def __init__(self, sums, layer):
        self.sums, self.layer, self.ffn = sums, layer, sums.model.blocks[layer].mlp

    def __call__(self, site, x):
        at = f"layers.{self.layer}"
        if site in ("attn.in", "attn.q_latent", "attn.kv_latent"):
            self.sums.add(f"{at}.{site}", x.flatten(0, 1))
        elif site == "attn.z":
            self.sums.add(f"{at}.{site}", x.flatten(2).flatten(0, 1))
        elif site == "mlp.in":
            self.x = x.flatten(0, 1)
            self.sums.add(f"{at}.{site}", self.x)
            if isinstance(self.ffn, Dense):
                self.sums.add(f"{at}.hidden", ops.swiglu(ops.linear(self.x, self.ffn.gate_up)))
            elif self.ffn.shared is not None:
                self.sums.add(f"{at}.shared.hidden", ops.swiglu(ops.linear(self.x, self.ffn.shared.gate_up)))
        elif site == "moe.experts":
            self.ids = x.flatten(0, 1)
        elif site == "moe.gates":
            gates = x.flatten(0, 1)
            bank = self.ffn.store.bank(self.layer)
            for e in range(bank.gate_up.shape[0]):
                t, k = (self.ids == e).nonzero(as_tuple=True)
                xe = self.x[t]
                w = gates[t, k].float().square() if self.sums.gated else None
                name = f"{at}.experts.{e}"
                if len(xe):
                    self.sums.add(f"{name}.mlp.in", xe, w)
                    self.sums.add(f"{name}.hidden", ops.swiglu(ops.linear(xe, bank.gate_up[e])), w)
                self.sums.add(f"{name}.hidden:prior", ops.swiglu(ops.linear(self.x[::EVERY], bank.gate_up[e])))
        return x
