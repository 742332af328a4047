"""Whether an edit has a place in a model: checked before anything is computed."""

from collections.abc import Sequence

from workbench.config import Config
from workbench.edits import PHASES, Ablate, Add, Bias, Edit, Force, ReplayRouting, Scale, TopK, describe
from workbench.errors import RequestError
from workbench.probe import OUTSIDE, SITES, known, layers_with, sizes

ROUTING = (Ablate, Bias, Force, TopK, ReplayRouting)


def check(edits: Sequence[Edit], config: Config) -> None:
    """RequestError for an edit that this model has no place for, and for edits that leave a token too few experts."""
    moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    if isinstance(edits, Edit):
        raise RequestError(f"edits come as a list, also a single one: [{edits!r}].")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise RequestError(f"edits are made with wb.Ablate, wb.TopK and so on; got {edit!r}.")
        try:
            if isinstance(edit, ROUTING):
                _check_routing(edit, config, moe)
            else:
                _check_site(edit, config, edits)
        except RequestError as error:
            raise RequestError(f"{describe(edit)}: {error}") from None
    choosing = [edit for edit in edits if isinstance(edit, Ablate | Force | TopK)]
    for layer in moe:
        for together in _meetings([edit for edit in choosing if edit.layer in (None, layer)]):
            try:
                _check_choice(together, config)
            except RequestError as error:
                raise RequestError(f"{', '.join(map(describe, together))}: {error}") from None


def _meetings(edits: Sequence[Edit]) -> list[list[Edit]]:
    """The different lists of edits that one token can meet."""
    places = {0, *(edit.positions[0] for edit in edits if edit.positions)}
    met = []
    for place, phase in ((place, phase) for place in sorted(places) for phase in PHASES):
        there = [
            edit
            for edit in edits
            if edit.phase in (None, phase) and (not edit.positions or edit.positions[0] <= place < edit.positions[1])
        ]
        if there and there not in met:
            met.append(there)
    return met


def _check_choice(edits: Sequence[Edit], config: Config) -> None:
    """That what is left after all Ablate edits is enough for TopK, and that enough for all that Force names."""
    grouped = config.topk_method == "group_limited_greedy"
    groups, kept = (config.n_group, config.topk_group) if grouped else (1, 1)
    ablated = {expert for edit in edits if isinstance(edit, Ablate) for expert in edit.experts}
    forced = {expert for edit in edits if isinstance(edit, Force) for expert in edit.experts}
    chosen = [config.num_experts_per_tok, *(edit.k for edit in edits if isinstance(edit, TopK))][-1]
    size = config.n_routed_experts // groups
    left = sorted(len({*range(group * size, (group + 1) * size)} - ablated) for group in range(groups))
    fewest = sum([count for count in left if count][:kept])  # a token may be left with the smallest groups
    if fewest < chosen:
        what = f"where {kept} of {groups} groups are kept, " if grouped else ""
        raise RequestError(f"{what}as few as {fewest} experts would be left, and {chosen} are to be chosen.")
    if len(forced) > chosen:
        raise RequestError(f"{len(forced)} experts cannot be forced where {chosen} are chosen.")


def _check_routing(edit: Edit, config: Config, moe: list[int]) -> None:
    if not moe:
        raise RequestError("this model has no routed experts.")
    layer = getattr(edit, "layer", None)
    if layer is not None and layer not in moe:
        what = "is dense: it has no router" if 0 <= layer < config.num_hidden_layers else "does not exist"
        raise RequestError(f"layer {layer} {what}. Layers with experts: {_ranges(moe)}.")
    experts = config.n_routed_experts
    named = edit.experts if isinstance(edit, Ablate | Force) else (edit.expert,) if isinstance(edit, Bias) else ()
    if any(expert >= experts for expert in named):
        raise RequestError(f"there is no expert {max(named)}; there are {experts}, counted from 0.")
    if isinstance(edit, ReplayRouting):
        if not set(edit.layers) <= set(moe) or edit.experts.max() >= experts:
            raise RequestError("this trace is of another model: its layers or experts are not those of this one.")
        if edit.experts.shape[2] > experts:
            raise RequestError("this trace is of another model: more experts a token than there are here.")


def _check_site(edit: Scale | Add, config: Config, edits: Sequence[Edit]) -> None:
    [site] = known([edit.site])
    layers = layers_with(site, config)
    if not SITES[site].writable:
        raise RequestError(f"{site} can only be watched; change what is chosen with Force, TopK or ReplayRouting.")
    if not layers:
        raise RequestError(f"{site} never fires in this model: {SITES[site].doc}.")
    if edit.layer is not None and edit.layer not in layers:
        where = "outside the layers: leave layer out" if site in OUTSIDE else f"in layers {_ranges(layers)}"
        raise RequestError(f"{site} never fires in layer {edit.layer}; it is {where}.")
    dims = SITES[site].dims.split()
    slots = {
        config.num_experts_per_tok,
        *(other.k for other in edits if isinstance(other, TopK)),
        *(other.experts.shape[2] for other in edits if isinstance(other, ReplayRouting)),
    }
    size = sizes(config, 1, 1, 1) | {"K": max(slots)}
    if edit.index is not None and not 0 <= edit.index < size[dims[indexed(site)]]:
        raise RequestError(f"index {edit.index} is not in 0 to {size[dims[indexed(site)]] - 1}, of {SITES[site].dims}.")
    scalar = edit.index is not None and indexed(site) == len(dims) - 1
    if isinstance(edit, Add) and len(edit.vector) not in {1, 1 if scalar else size[dims[-1]]}:
        raise RequestError(f"the vector has {len(edit.vector)} numbers; {site} takes 1 or {size[dims[-1]]}.")
    if isinstance(edit, Add) and dims[-1] == "K" and len(edit.vector) > 1 and len(slots) > 1:
        raise RequestError("other edits change how many slots there are: add one number, or to one slot by index.")


def indexed(site: str) -> int:
    """The dimension that `index` selects from: the first that is neither batch nor token."""
    dims = SITES[site].dims.split()
    return next(n for n, dim in enumerate(dims) if dim != "B" and dim != ("T" if "T" in dims else "S"))


def _ranges(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 2 else ", ".join(map(str, layers))
