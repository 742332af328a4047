"""Whether an edit has a place in a model: checked before anything is computed."""

from collections.abc import Sequence

from workbench.config import Config
from workbench.edits import Ablate, Add, Bias, Edit, Force, ReplayRouting, Scale, TopK, describe
from workbench.errors import RequestError
from workbench.probe import OUTSIDE, SITES, known, layers_with, sizes

ROUTING = (Ablate, Bias, Force, TopK, ReplayRouting)


def check(edits: Sequence[Edit], config: Config) -> None:
    """RequestError for an edit that this model has no place for."""
    moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    for edit in edits:
        if not isinstance(edit, Edit):
            raise RequestError(f"edits are made with wb.Ablate, wb.TopK and so on; got {edit!r}.")
        try:
            if isinstance(edit, ROUTING):
                _check_routing(edit, config, moe)
            else:
                _check_site(edit, config)
        except RequestError as error:
            raise RequestError(f"{describe(edit)}: {error}") from None


def _check_routing(edit: Edit, config: Config, moe: list[int]) -> None:
    if not moe:
        raise RequestError("this model has no routed experts.")
    layer = getattr(edit, "layer", None)
    if layer is not None and layer not in moe:
        what = "is dense: it has no router" if 0 <= layer < config.num_hidden_layers else "does not exist"
        raise RequestError(f"layer {layer} {what}. Layers with experts: {_ranges(moe)}.")
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    named = edit.experts if isinstance(edit, Ablate | Force) else (edit.expert,) if isinstance(edit, Bias) else ()
    if any(expert >= experts for expert in named):
        raise RequestError(f"there is no expert {max(named)}; there are {experts}, counted from 0.")
    if isinstance(edit, Ablate) and experts - len(named) < chosen:
        raise RequestError(f"{experts - len(named)} experts would be left, and {chosen} are chosen for each token.")
    if isinstance(edit, Force) and len(named) > chosen:
        raise RequestError(f"{len(named)} experts cannot be forced where {chosen} are chosen.")
    if isinstance(edit, TopK):
        grouped = config.topk_method == "group_limited_greedy"
        most = config.topk_group * experts // config.n_group if grouped else experts
        if edit.k > most:
            raise RequestError(f"at most {most} experts can be chosen for a token.")
    if isinstance(edit, ReplayRouting):
        if not set(edit.layers) <= set(moe) or edit.experts.max() >= experts:
            raise RequestError("this trace is of another model: its layers or experts are not those of this one.")
        if edit.experts.shape[2] > experts:
            raise RequestError("this trace is of another model: more experts a token than there are here.")


def _check_site(edit: Scale | Add, config: Config) -> None:
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
    size = sizes(config, 1, 1, 1)
    size = {**size, "S": 1}
    if edit.index is not None and not 0 <= edit.index < size[dims[indexed(site)]]:
        raise RequestError(f"index {edit.index} is not in 0 to {size[dims[indexed(site)]] - 1}, of {SITES[site].dims}.")
    scalar = edit.index is not None and indexed(site) == len(dims) - 1
    if isinstance(edit, Add) and len(edit.vector) not in {1, 1 if scalar else size[dims[-1]]}:
        raise RequestError(f"the vector has {len(edit.vector)} numbers; {site} takes 1 or {size[dims[-1]]}.")


def indexed(site: str) -> int:
    """The dimension that `index` selects from: the first that is neither batch nor token."""
    dims = SITES[site].dims.split()
    return next(n for n, dim in enumerate(dims) if dim != "B" and dim != ("T" if "T" in dims else "S"))


def _ranges(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 2 else ", ".join(map(str, layers))
