"""Sites are the named places inside a forward pass; a Probe is what stands there. The default, OFF, does nothing.

B batch, T new tokens, S tokens so far, D hidden, H heads, N content width of a head, R rotary width, V value width,
Q query latent, C key-value latent, E experts, G groups of experts, K chosen.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from workbench.config import Config
from workbench.errors import RequestError


class Site(NamedTuple):
    """A place to look or to edit.

    dims      what the value's dimensions are; a product such as K+1 is one dimension
    dtype     fp32 or int64 whatever the model computes in; None: the model's own type
    writable  what a probe returns takes the value's place; otherwise a change is refused
    """

    name: str
    dims: str
    doc: str
    dtype: torch.dtype | None = None
    writable: bool = True


FP32, INT = torch.float32, torch.int64
SITES = {
    site.name: site
    for site in (
        Site("embed", "B T D", "embedded tokens, entering the first block"),
        Site("resid.pre", "B T D", "residual stream entering a block"),
        Site("attn.in", "B T D", "what attention reads: the normed residual stream"),
        Site("attn.q_latent", "B T Q", "compressed query after its norm (only with q_lora_rank)"),
        Site("attn.q_content", "B T H N", "content part of each head's query"),
        Site("attn.q_rope", "B T H R", "rotary part of each head's query, after rotation"),
        Site("attn.kv_latent", "B T C", "compressed key-value latent after its norm: what is cached"),
        Site("attn.k_rope", "B T R", "rotary key shared by all heads, after rotation: what is cached beside it"),
        Site("attn.k_content", "B S H N", "content key of each head, rebuilt from the latents for this look"),
        Site("attn.v", "B S H V", "value of each head, rebuilt from the latents for this look"),
        Site(
            "attn.scores_content", "B H T S", "scaled scores of content queries and keys, before the causal mask", FP32
        ),
        Site(
            "attn.scores_position", "B H T S", "scaled scores of rotary queries and keys, before the causal mask", FP32
        ),
        Site("attn.scores", "B H T S", "their sum, before the causal mask", FP32),
        Site("attn.pattern", "B H T S", "softmax of the scores over the past; 0 for the future", FP32),
        Site("attn.z", "B T H V", "output of each head, before the output projection"),
        Site("attn.out", "B T D", "what attention adds to the residual stream"),
        Site("resid.mid", "B T D", "residual stream between attention and feed-forward"),
        Site("mlp.in", "B T D", "what the feed-forward part and the router read: the normed residual stream"),
        Site("moe.router_logits", "B T E", "scores of the experts before softmax", FP32),
        Site("moe.router_probs", "B T E", "softmax of the scores, before groups are dropped", FP32),
        Site("moe.groups", "B T G", "1 for groups a token may choose from, 0 for those dropped", FP32),
        Site("moe.experts", "B T K", "ids of the chosen experts, strongest first", INT, writable=False),
        Site("moe.scores", "B T K+1", "router_probs of the chosen, then of the best that was not chosen", FP32, False),
        Site("moe.gates", "B T K", "weights of the chosen experts, scaling included", FP32),
        Site("moe.expert_out", "B T K D", "output of each chosen expert, before its gate"),
        Site("moe.routed_out", "B T D", "weighted sum over the routed experts"),
        Site("moe.shared_out", "B T D", "output of the shared experts (only with n_shared_experts)"),
        Site("mlp.out", "B T D", "what the feed-forward part adds to the residual stream"),
        Site("resid.post", "B T D", "residual stream leaving a block"),
        Site("final.norm", "B T D", "residual stream after the last norm, which the head reads"),
        Site("logits", "B T vocab", "scores of the next token", FP32),
    )
}
OUTSIDE = ("embed", "final.norm", "logits")  # not in any layer: their layer is None

# Sites that exist only while an operation is carried out in the open, step by step: see `Probe.opens`.
INSIDE = {
    "attend": (
        "attn.k_content",
        "attn.v",
        "attn.scores_content",
        "attn.scores_position",
        "attn.scores",
        "attn.pattern",
    ),
    "route": ("moe.groups",),
    "experts": ("moe.expert_out",),
}


class Probe:
    """The null probe, and the base of all others: whatever it is called with, it returns.

    A subclass overrides `__call__` to look at a value (and return it) or to change it (and return another of the same
    shape). A model calls `begin` once a pass, `at` once a layer, the probe at every site, and `end` after the pass.
    """

    static = False  # whether a captured pass may be replayed with it: nothing in it depends on the host
    quiet = False  # of a pass: whether `bias` and `row` are all it wants, so that nobody stands at its sites

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> "Probe":
        """The probe of one forward pass over tokens at `positions` [B, T] (on the CPU). May refuse, before any work."""
        return self

    def at(self, layer: int) -> "Probe":
        """The probe one block should use."""
        return self

    def opens(self, op: str) -> bool:
        """Whether "attend", "route" or "experts" must be carried out in the open, because a site inside is wanted."""
        return False

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return x

    @property
    def see(self) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """What a layer calls at its sites: this probe, as a function."""
        return self.__call__

    def select(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """The experts to choose, asked only where "route" is open.

        ids [B, T, K] is the router's own choice, allowed [B, T, E] the probabilities it chose by (0 in dropped groups).
        Returns ids [B, T, any K], -1 for a slot that is not used.
        """
        return ids

    def routed(
        self, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Passes moe.router_probs (unless it has been), moe.experts, moe.scores and moe.gates; returns the gates.

        One call for the sites that come together in every layer: a probe that wants no others, as the static recorder
        does, overrides this one and is as cheap as OFF everywhere else.
        """
        if probs is not None:
            read(self, "moe.router_probs", probs)
        read(self, "moe.experts", ids)
        read(self, "moe.scores", scores)
        return self("moe.gates", gates)

    def bias(self, layer: int) -> torch.Tensor | None:
        """What a quiet probe adds to the logits of this layer's router, [E] fp32: a tensor that it changes in place."""
        return None

    def row(self, layer: int) -> object | None:
        """Where a quiet probe wants this layer's router to write what it chose: a ring.RingRow."""
        return None

    def held(self) -> object:
        """Of a static probe: what a captured pass holds of it. Where this differs, a pass is captured anew."""
        return ()

    def direct(self) -> None:
        """Before a pass, or a replay of one, whose routers write into `row` and read `bias` themselves."""

    def end(self) -> None:
        """The pass is complete. Not called for one that failed."""


class Silent(Probe):
    """A probe that does nothing at a single site, at the least cost.

    What a mapping of nothing gets is the default, x: the base's own answer without a frame of Python for each of some
    twenty sites a layer, which on a small model would be 1 % of the time.
    """

    __call__ = see = staticmethod({}.get)


class _Off(Silent):
    static = quiet = True

    def routed(
        self, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        return gates


OFF = _Off()


def both(*probes: Probe) -> Probe:
    """One probe of several; each sees what the one before it made of a value."""
    probes = tuple(probe for probe in probes if probe is not OFF)
    return OFF if not probes else probes[0] if len(probes) == 1 else _Chain(probes)


class _Chain(Probe):
    def __init__(self, probes: tuple[Probe, ...]):
        self.probes = probes

    @property
    def static(self) -> bool:
        return all(probe.static for probe in self.probes)

    @property
    def quiet(self) -> bool:
        return all(probe.quiet for probe in self.probes)

    def bias(self, layer: int) -> torch.Tensor | None:
        given = [bias for probe in self.probes if (bias := probe.bias(layer)) is not None]
        return sum(given[1:], given[0]) if given else None

    def row(self, layer: int) -> object | None:
        return next((row for probe in self.probes if (row := probe.row(layer)) is not None), None)

    def held(self) -> object:
        return tuple(probe.held() for probe in self.probes)

    def direct(self) -> None:
        for probe in self.probes:
            probe.direct()

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        return both(*(probe.begin(config, positions, dtype) for probe in self.probes))

    def at(self, layer: int) -> Probe:
        return both(*(probe.at(layer) for probe in self.probes))

    def opens(self, op: str) -> bool:
        return any(probe.opens(op) for probe in self.probes)

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        for probe in self.probes:
            x = probe(site, x)
        return x

    def select(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        for probe in self.probes:
            ids = probe.select(ids, allowed)
        return ids

    def routed(
        self, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        for probe in self.probes:
            gates = probe.routed(ids, gates, scores, probs)
        return gates

    def end(self) -> None:
        for probe in self.probes:
            probe.end()


def read(probe: Probe, site: str, x: torch.Tensor) -> None:
    """Shows `x` to a probe at a place where nothing can be changed. RequestError if the probe tried to."""
    if probe(site, x) is not x:
        inside = next((op for op, sites in INSIDE.items() if site in sites or (op == "route" and "moe." in site)), None)
        how = f' Let its opens("{inside}") return True' if inside and SITES[site].writable else " Edit another site"
        raise RequestError(f"a probe changed {site}, which is only read here.{how}: see workbench/probe.py.")


def layers_with(site: str, config: Config) -> list[int | None]:
    """The layers of a model in which a site fires; [None] for a site outside the layers, [] where it never does."""
    if site in OUTSIDE:
        return [None]
    if site == "attn.q_latent" and config.q_lora_rank is None:
        return []
    if site == "moe.shared_out" and not config.n_shared_experts:
        return []
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if not site.startswith("moe.") or config.is_moe(layer)]


def known(sites: Iterable[str]) -> tuple[str, ...]:
    """The sites, each once. RequestError for a name that is not in the table, or for none."""
    sites = tuple(sites)
    if not all(isinstance(site, str) for site in sites):
        raise RequestError(f"sites are given by their names, one after the other; got {sites}.")
    sites = tuple(dict.fromkeys(sites))
    wrong = [site for site in sites if site not in SITES]
    if wrong or not sites:
        asked = f"no site called {', '.join(map(repr, wrong))}" if wrong else "no site was named"
        raise RequestError(f"{asked}; there are {', '.join(SITES)}.")
    return sites


def check_fires(sites: Iterable[str], layers: frozenset[int] | None, config: Config) -> None:
    """RequestError for a layer that the model does not have, and for a site that none of these layers has."""
    last = config.num_hidden_layers - 1
    if layers is not None and not layers <= set(range(last + 1)):
        raise RequestError(f"layers go from 0 to {last} in this model; asked for {sorted(layers)}.")
    for site in sites:
        there = layers_with(site, config)
        if not there:
            raise RequestError(f"{site} never fires in this model: {SITES[site].doc}.")
        if there != [None] and layers is not None and not layers & set(there):
            span = f"layers {there[0]} to {there[-1]}" if len(there) > 1 else f"layer {there[0]}"
            raise RequestError(f"{site} never fires in layers {sorted(layers)}; it is in {span}.")


def sizes(config: Config, batch: int, new: int, length: int) -> dict[str, int]:
    """What the letters of `Site.dims` stand for in one pass."""
    groups = config.n_group if config.topk_method == "group_limited_greedy" else 1
    return {
        "G": groups, "B": batch, "T": new, "S": length, "D": config.hidden_size, "H": config.num_attention_heads,
        "N": config.qk_nope_head_dim, "R": config.qk_rope_head_dim, "V": config.v_head_dim,
        "Q": config.q_lora_rank or 0,
        "C": config.kv_lora_rank, "E": config.n_routed_experts or 0, "K": config.num_experts_per_tok,
        "K+1": config.num_experts_per_tok + 1, "vocab": config.vocab_size,
    }  # fmt: skip
