"""Where a model routes: which layers have experts, how many there are, how many are chosen, and in what groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import RequestError

if TYPE_CHECKING:
    from workbench.config import Config
    from workbench.trace import Trace


@dataclass(frozen=True)
class Geometry:
    """`topk_group` of `n_group` equal groups are kept before experts are chosen; None where groups play no part."""

    layers: tuple[int, ...]
    n_experts: int
    k: int
    n_group: int = 1
    topk_group: int | None = None

    @classmethod
    def of(cls, config: "Mapping | Config", layers: Sequence[int] | None = None, k: int | None = None) -> "Geometry":
        """Of a config.json or a Config; `layers` and `k` where only some were recorded, or an edit chose more."""
        facts = config if isinstance(config, Mapping) else vars(config)
        experts = facts.get("n_routed_experts") or 0
        if layers is None:
            first, every = facts.get("first_k_dense_replace", 0), facts.get("moe_layer_freq", 1)
            every_layer = range(first, facts["num_hidden_layers"])
            layers = [layer for layer in every_layer if layer % every == 0] if experts else []
        grouped = facts.get("topk_method") == "group_limited_greedy" and (facts.get("n_group") or 1) > 1
        return cls(
            tuple(layers),
            experts,
            (facts.get("num_experts_per_tok") or 0) if k is None else k,
            facts["n_group"] if grouped else 1,
            facts["topk_group"] if grouped else None,
        )

    @classmethod
    def of_trace(cls, trace: "Trace") -> "Geometry":
        return cls.of(trace.header["config"], trace.layers, trace.k)

    def check(self, name: str, array: np.ndarray, tokens: int, dtype: type) -> np.ndarray:
        """`array` as [tokens, layers, k] of `dtype`. RequestError for any other shape."""
        array = np.asarray(array, dtype)
        wanted = (tokens, len(self.layers), self.k)
        if array.shape != wanted:
            raise RequestError(f"{name} must be [tokens, layers, k] = {list(wanted)}; got {list(array.shape)}.")
        return array

    def row(self, layer: int) -> int:
        """Where `layer` stands among the recorded ones. RequestError if it is none of them."""
        if layer not in self.layers:
            raise RequestError(f"layer {layer} has no recorded experts; those that have: {_listed(self.layers)}.")
        return self.layers.index(layer)

    def __str__(self) -> str:
        layers, experts = len(self.layers), self.n_experts
        text = f"{layers} layer{'' if layers == 1 else 's'} × {experts} experts, {self.k} chosen"
        return text if self.topk_group is None else f"{text} from {self.topk_group} of {self.n_group} groups"


def last_margin(experts: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """[..., K] -> [...]: how narrowly the last chosen expert made the cut; NaN where none was chosen."""
    used = experts >= 0
    if not experts.shape[-1]:
        return np.full(experts.shape[:-1], np.nan, np.float32)
    last = experts.shape[-1] - 1 - used[..., ::-1].argmax(-1)
    found = np.take_along_axis(margins, last[..., None], -1)[..., 0]
    return np.where(used.any(-1), found, np.nan).astype(np.float32)


def _listed(layers: Sequence[int]) -> str:
    if len(layers) > 8 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "none"
