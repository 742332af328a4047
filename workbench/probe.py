"""Sites are the named places inside a forward pass; a Probe is what stands there. The default, OFF, does nothing.

B batch, T new tokens, S tokens so far, D hidden, H heads, C latent, R rotary width, V value width, E experts, K chosen.
"""

from typing import NamedTuple

import torch

from workbench.errors import RequestError


class Site(NamedTuple):
    name: str
    dims: str
    doc: str


SITES = {
    site.name: site
    for site in (
        Site("resid.pre", "B T D", "residual stream entering a block"),
        Site("resid.mid", "B T D", "residual stream between attention and feed-forward"),
        Site("resid.post", "B T D", "residual stream leaving a block"),
        Site("attn.q_latent", "B T Q", "compressed query after its norm (only with q_lora_rank)"),
        Site("attn.kv_latent", "B T C", "compressed key-value latent after its norm: what is cached"),
        Site("attn.k_rope", "B T R", "rotary key shared by all heads, after rotation: what is cached beside it"),
        Site("attn.z", "B T H V", "output of each head, before the output projection"),
        Site("attn.out", "B T D", "what attention adds to the residual stream"),
        Site("moe.router_logits", "B T E", "scores of the experts before softmax, fp32"),
        Site("moe.router_probs", "B T E", "softmax of the scores, before groups are masked"),
        Site("moe.experts", "B T K", "ids of the chosen experts, strongest first"),
        Site("moe.gates", "B T K", "weights of the chosen experts, scaling included"),
        Site("moe.routed_out", "B T D", "weighted sum over the routed experts"),
        Site("moe.shared_out", "B T D", "output of the shared experts"),
        Site("mlp.out", "B T D", "what the feed-forward part adds to the residual stream"),
        Site("logits", "B T vocab", "scores of the next token"),
    )
}


class Probe:
    """The null probe, and the base of all others: a call returns what it was given."""

    def at(self, layer: int) -> "Probe":
        """The probe a block should use."""
        return self

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return x


OFF = Probe()


class Recorder(Probe):
    """Keeps what passes the named sites, with its gradient history: `recorder.seen[site, layer]`.

    Sites outside the blocks have layer None. A later pass through the same site replaces what an earlier one left.
    """

    def __init__(self, *sites: str, layers: range | None = None):
        unknown = set(sites) - SITES.keys()
        if unknown or not sites:
            raise RequestError(f"no site called {', '.join(sorted(unknown))!r}; there are {', '.join(SITES)}.")
        self.sites = frozenset(sites)
        self.layers = layers
        self.seen: dict[tuple[str, int | None], torch.Tensor] = {}

    def at(self, layer: int) -> Probe:
        return OFF if self.layers is not None and layer not in self.layers else _AtLayer(self, layer)

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return _AtLayer(self, None)(site, x)


class _AtLayer(Probe):
    def __init__(self, recorder: Recorder, layer: int | None):
        self.recorder, self.layer = recorder, layer

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self.recorder.sites:
            self.recorder.seen[site, self.layer] = x
        return x
