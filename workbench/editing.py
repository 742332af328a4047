"""Editing: the probe that carries out edits. What they say is checked before anything is computed.

B batch, T new tokens, S tokens so far, E experts, K chosen.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch

from workbench.config import Config
from workbench.editcheck import check, indexed
from workbench.edits import Ablate, Add, Bias, Edit, Force, ReplayRouting, Scale, TopK
from workbench.errors import RequestError
from workbench.probe import INSIDE, OFF, SITES, Probe, layers_with

OPENING = ("moe.router_probs", *INSIDE["route"])  # to change one of these the router must be open


class Editing(Probe):
    """Carries out `edits` on a model of this config.

    prompts  number of prompt tokens of each row (or one number for all), for edits with a phase
    live     also keeps buffers for edits that may come later, see `update`

    What Ablate, Bias and TopK say is held in tensors on the device, which the router reads: they can be changed in
    place, also under a captured graph.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        config: Config,
        prompts: int | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        live: bool = False,
    ):
        check(edits, config)
        self.edits, self.config, self.device = tuple(edits), config, torch.device(device)
        self.prompts = [prompts] if isinstance(prompts, int) else prompts
        if self.prompts is None and any(edit.phase for edit in edits):
            raise RequestError("an edit of one phase needs to know where the prompt ends: Editing(..., prompts=n).")
        self.live = live
        self.fired: set[int] = set()  # by number in `edits`
        self.moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
        self.layers = [frozenset(_layers(edit, config)) for edit in self.edits]
        self.width = {layer: self._width(layer) for layer in self.moe}
        self.bias: dict[tuple[int, int], torch.Tensor] = {}  # (number of the edit, layer) -> [E]
        self.limit: dict[int, torch.Tensor] = {}  # number of the edit -> [], the k of a TopK
        self.tables: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # replayed ids and gates [n, K]
        self.values: dict[int, torch.Tensor] = {}  # number of the edit -> the experts of a Force, the vector of an Add
        for number, edit in enumerate(self.edits):
            self._prepare(number, edit)
        if live:
            self.bias |= {(-1, layer): self._zeros() for layer in self.moe}

    @property
    def static(self) -> bool:
        """Whether a captured pass can be replayed: no edit asks where in the sequence a token is."""
        return not any(edit.positions or edit.phase or isinstance(edit, ReplayRouting) for edit in self.edits)

    def update(self, edits: Sequence[Edit]) -> None:
        """Replaces what a `live` Editing adds to the logits, in place, by Ablate and Bias edits of all positions."""
        check([*self.edits, *edits], self.config)
        if not self.live or any(not isinstance(edit, Ablate | Bias) or edit.positions or edit.phase for edit in edits):
            raise RequestError(
                "only Ablate and Bias without positions or phase can be changed in place, in Editing(..., live=True); "
                "for anything else make a new Editing."
            )
        for layer in self.moe:
            self.bias[-1, layer].copy_(sum((self._bias(e) for e in edits if e.layer in (None, layer)), self._zeros()))

    def on(self, prompts: Sequence[int]) -> "Editing":
        """The same edits, buffers and memory of what fired, for rows with these prompts."""
        other = copy(self)
        other.prompts = list(prompts)
        return other

    def silent(self) -> list[Edit]:
        """The edits that no token has met so far."""
        return [edit for number, edit in enumerate(self.edits) if number not in self.fired]

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        if config is not self.config and config != self.config:
            raise RequestError("these edits were made for another model: Editing(edits, model.config).")
        masks = {number: self._mask(edit, _places(edit, positions)) for number, edit in enumerate(self.edits)}
        active = [number for number, mask in masks.items() if mask is None or bool(mask.any())]
        if not active and not self.live:
            return OFF
        masks = {n: masks[n] if masks[n] is None or not masks[n].all() else None for n in active}
        return _Pass(self, {n: m if m is None else m.to(self.device) for n, m in masks.items()}, positions)

    def _mask(self, edit: Edit, positions: torch.Tensor) -> torch.Tensor | None:
        """Where, of positions [B, T], an edit acts; None for everywhere."""
        if isinstance(edit, ReplayRouting):
            there = torch.from_numpy((edit.experts >= 0).any((1, 2)))
            known = (positions < len(there)) & there[positions.clamp(max=len(there) - 1)]
        elif edit.positions is None and edit.phase is None:
            return None
        else:
            known = torch.ones_like(positions, dtype=torch.bool)
        if edit.positions is not None:
            known = known & (positions >= edit.positions[0]) & (positions < edit.positions[1])
        if edit.phase is not None:
            prompts = torch.tensor(self.prompts)
            assert len(prompts) in (1, len(positions)), f"{len(prompts)} prompts for {len(positions)} rows"
            known = known & ((positions < prompts[:, None]) == (edit.phase == "prefill"))
        return known

    def _width(self, layer: int) -> int:
        """Slots of a token in this layer: those of the config, unless every token gets another number."""
        counts = [edit for edit in self.edits if isinstance(edit, TopK) and edit.layer in (None, layer)]
        replayed = [edit.experts.shape[2] for edit in self.edits if isinstance(edit, ReplayRouting)]
        all_limited = any(edit.positions is None and edit.phase is None for edit in counts) and not replayed
        usual = 0 if all_limited else self.config.num_experts_per_tok
        return max([usual, *replayed, *(edit.k for edit in counts)])

    def _prepare(self, number: int, edit: Edit) -> None:
        layers = self.moe if getattr(edit, "layer", None) is None else [edit.layer]
        if isinstance(edit, Ablate | Bias):
            self.bias |= {(number, layer): self._bias(edit) for layer in layers}
        elif isinstance(edit, TopK):
            self.limit[number] = torch.tensor(edit.k, device=self.device)
        elif isinstance(edit, Force):
            self.values[number] = torch.tensor(edit.experts, device=self.device)
        elif isinstance(edit, Add):
            self.values[number] = torch.tensor(edit.vector, device=self.device)
        elif isinstance(edit, ReplayRouting):
            for column, layer in enumerate(edit.layers):
                ids = torch.from_numpy(edit.experts[:, column].astype(np.int64))
                gates = torch.from_numpy(edit.weights[:, column].copy())
                self.tables[number, layer] = ids.to(self.device), gates.to(self.device)

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.config.n_routed_experts, device=self.device)

    def _bias(self, edit: Ablate | Bias) -> torch.Tensor:
        bias = self._zeros()
        if isinstance(edit, Ablate):
            bias[list(edit.experts)] = float("-inf")
        else:
            bias[edit.expert] = edit.amount
        return bias


class _Pass(Probe):
    """One pass: which edits act in it, and where."""

    def __init__(self, editing: Editing, masks: dict[int, torch.Tensor | None], positions: torch.Tensor):
        self.editing, self.masks, self.positions = editing, masks, positions
        self.outside = self.at(None)
        acting = [editing.edits[number] for number in masks]
        everywhere = all(mask is None for mask in masks.values())
        self.quiet = everywhere and all(isinstance(edit, Ablate | Bias) for edit in acting)
        self.static = editing.static

    def at(self, layer: int | None) -> Probe:
        active = [(number, self.editing.edits[number]) for number in self.masks if layer in self.editing.layers[number]]
        biased = (-1, layer) in self.editing.bias
        return _Layer(self, layer, active) if active or biased else OFF

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return self.outside(site, x)

    def held(self) -> object:
        return id(self.editing.bias), *self.masks

    def bias(self, layer: int) -> torch.Tensor | None:
        held = self.editing.bias
        given = [held[number, layer] for number in (-1, *self.masks) if (number, layer) in held]
        return sum(given[1:], given[0]) if given else None

    def end(self) -> None:
        self.editing.fired.update(self.masks)


class _Layer(Probe):
    def __init__(self, parent: _Pass, layer: int | None, active: list[tuple[int, Edit]]):
        self.parent, self.editing, self.layer = parent, parent.editing, layer
        self.active = active
        self.choosing = any(isinstance(edit, Force | TopK | ReplayRouting) for _, edit in active)
        self.at_sites = {edit.site for _, edit in active if isinstance(edit, Scale | Add)}
        self.ids: torch.Tensor | None = None

    def opens(self, op: str) -> bool:
        if op == "route":
            return self.choosing or any(site in self.at_sites for site in OPENING)
        return any(site in self.at_sites for site in INSIDE[op])

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site == "moe.gates" and self.choosing:
            x = self._gates(x)
        if site in self.at_sites:
            for number, edit in self.active:
                if isinstance(edit, Scale | Add) and edit.site == site:
                    x = _where(self._mask_at(number, site, x), self._changed(number, x), x)
        return self._bias(x) if site == "moe.router_logits" else x  # last: an ablated expert stays out

    def select(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        if not self.choosing:
            return ids
        width = self.editing.width[self.layer]
        ranks = allowed.clone()  # probabilities, at most 1; what is put before them gets more
        limit = torch.full(allowed.shape[:-1], self.editing.config.num_experts_per_tok, device=allowed.device)
        for kind in (ReplayRouting, TopK, Force):
            for number, edit in self.active:
                if not isinstance(edit, kind):
                    continue
                mask = self.parent.masks[number]
                if kind is TopK:
                    limit = _where(mask, self.editing.limit[number].expand_as(limit), limit)
                elif kind is Force:
                    named = self.editing.values[number]
                    first = 1000.0 + torch.arange(len(named), 0, -1, device=ranks.device, dtype=ranks.dtype)
                    forced = ranks.index_copy(-1, named, first.expand(*ranks.shape[:-1], -1))
                    ranks = _where(mask, forced, ranks)
                else:
                    recorded = self._recorded(number)[0]
                    used = recorded >= 0
                    first = 100.0 + torch.arange(recorded.shape[-1], 0, -1, device=ranks.device) * used
                    put = allowed.scatter_reduce(-1, recorded.clamp(min=0), first * used, "amax")
                    ranks = _where(mask, put, ranks)
                    limit = _where(mask, used.sum(-1), limit)
        ids = ranks.topk(width, -1).indices
        self.ids = ids.masked_fill(torch.arange(width, device=ids.device) >= limit[..., None], -1)
        return self.ids

    def _bias(self, logits: torch.Tensor) -> torch.Tensor:
        if (-1, self.layer) in self.editing.bias:
            logits = logits + self.editing.bias[-1, self.layer]
        for number, edit in self.active:
            if isinstance(edit, Ablate | Bias):
                logits = _where(self.parent.masks[number], logits + self.editing.bias[number, self.layer], logits)
        return logits

    def _gates(self, gates: torch.Tensor) -> torch.Tensor:
        for number, edit in self.active:
            if isinstance(edit, ReplayRouting) and edit.gates:
                recorded, weights = self._recorded(number)
                same = self.ids[..., :, None] == recorded[..., None, :]  # [B, T, slots, recorded slots]
                value = (same * weights[..., None, :]).sum(-1)
                gates = self._put(number, same.any(-1) & (self.ids >= 0), value, gates)
        for number, edit in self.active:
            if isinstance(edit, Force) and edit.gate is not None:
                there = torch.isin(self.ids, self.editing.values[number])
                gates = self._put(number, there, torch.full_like(gates, edit.gate), gates)
        return gates

    def _put(self, number: int, there: torch.Tensor, value: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        mask = self.parent.masks[number]
        return torch.where(there if mask is None else there & mask[..., None], value, gates)

    def _recorded(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and gates [B, T, K] that the trace has for the tokens of this pass; beyond its end, of its last token."""
        ids, gates = self.editing.tables[number, self.layer]
        rows = self.parent.positions.clamp(max=len(ids) - 1).to(ids.device)
        return ids[rows], gates[rows]

    def _mask_at(self, number: int, site: str, x: torch.Tensor) -> torch.Tensor | None:
        """The mask of an edit, shaped for what passes a site."""
        mask = self.parent.masks[number]
        if mask is None:
            return None
        dims = SITES[site].dims.split()
        axis = dims.index("T" if "T" in dims else "S")
        if mask.shape[1] != x.shape[axis]:  # the model was asked for its last logits only
            mask = mask[:, -x.shape[axis] :]
        return mask.view([n if d in (0, axis) else 1 for d, n in enumerate(x.shape)])

    def _changed(self, number: int, x: torch.Tensor) -> torch.Tensor:
        edit, axis = self.editing.edits[number], indexed(self.editing.edits[number].site)
        if edit.index is not None and edit.index >= x.shape[axis]:
            return x  # a slot that other edits make, but not in this pass
        changed = x.clone()
        part = changed if edit.index is None else changed.select(axis, edit.index)
        if isinstance(edit, Scale):
            part.mul_(edit.factor)
        else:
            part.add_(self.editing.values[number].to(x.dtype))
        return changed


def _places(edit: Edit, positions: torch.Tensor) -> torch.Tensor:
    """What an edit may change, by position: the tokens of a pass, or at a site of keys all keys, rebuilt each time."""
    if isinstance(edit, Scale | Add) and "T" not in SITES[edit.site].dims.split():
        return torch.arange(int(positions.max()) + 1).expand(len(positions), -1)
    return positions


def _layers(edit: Edit, config: Config) -> Sequence[int | None]:
    """Where an edit may act."""
    if isinstance(edit, ReplayRouting):
        return edit.layers
    if edit.layer is not None:
        return [edit.layer]
    return layers_with(edit.site if isinstance(edit, Scale | Add) else "moe.experts", config)


def _where(mask: torch.Tensor | None, changed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return changed
    return torch.where(mask if mask.dim() == x.dim() else mask[..., None], changed, x)
