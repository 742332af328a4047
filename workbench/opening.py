"""Opening a model: plain or packed, whole in memory or with its experts on disk, within what it may take."""

import traceback
from pathlib import Path
from types import TracebackType

import torch

from workbench.checkpoint import Safetensors, directory_of
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.experts import Store
from workbench.model import Model
from workbench.offloaded import Offloaded
from workbench.pack import Pack, PackedSource, Shelf
from workbench.plan import Plan
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.shards import some

Size = int | str  # bytes, or such as "16GiB" and "4GB"


def open_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    recipe: str | Recipe | None = None,
    vram: Size | None = None,
    ram: Size | None = None,
    context: int | None = None,
    cache: str = "auto",
    policy: str | float = "blended",
    ahead: int | None = None,
    computed: bool | str = "auto",
) -> Model:
    """The model of a checkpoint directory, plain or packed (or of a .safetensors file beside its config.json).

    All names and shapes are checked before the first byte of a weight is read or allocated. CheckpointError says which
    file or tensor is wrong; whatever the error, an interrupt included, no part of a model stays in memory.

    recipe   packs plain weights as they are read, see recipe.Recipe
    vram, ram    what may be taken of either at any moment, cache for `context` tokens in format `cache` included. What
        is left of it holds experts, the others stay on disk, which takes a packed checkpoint. On device "cpu" `ram` is
        all there is; with `vram` too, that part of main memory stands in for a GPU's. BudgetError names the smallest
        that works. Where neither is given, a packed model takes what is free.
    policy, ahead, computed    see Offloaded
    """
    path, device = Path(path), torch.device(device)
    budget = {"vram": vram, "ram": ram, "context": context, "cache": cache}
    if Pack.is_one(path):
        if recipe is not None:
            raise RequestError(f"{path} is packed already, by recipe {Pack.open(path).recipe.name}: give no recipe.")
        return _open_packed(path, device, dtype, budget, {"policy": policy, "ahead": ahead, "computed": computed})
    config = Config.from_json(directory_of(path) / "config.json")
    rehearsal = Safetensors(path, dtype, device="meta")
    Model(config, _as_packed(rehearsal, recipe))
    if extra := rehearsal.unused():
        raise CheckpointError(
            f"{path}: {len(extra)} tensors have no place in the model that config.json describes: {some(extra, 5)}. "
            "Either config.json is not the one of these weights (compare num_hidden_layers, n_routed_experts and "
            "q_lora_rank; download both from the same repository), or this is a later model than DeepSeek-V2."
        )
    plan = None
    if vram is not None or ram is not None:
        plan = _planned(config, recipe, device, rehearsal.dtype, budget)
        if not plan.whole:
            raise BudgetError(
                f"{path}: its experts do not all fit into what is given, and to be read from disk when they are asked "
                "for they must be packed first: workbench pack."
            )
    with _Whole():
        model = Model(config, _as_packed(Safetensors(path, rehearsal.dtype, device), recipe))
    model.plan = plan
    return model


def _open_packed(path: Path, device: torch.device, dtype: torch.dtype | str, budget: dict, how: dict) -> Model:
    pack = Pack.open(path)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plan = _planned(pack.config, pack.recipe, device, dtype, budget)
    rehearsal = PackedSource(pack, dtype, "meta")
    store: Store | None = None
    if not plan.whole:
        if pack.layout is None:
            raise BudgetError(
                f"{path}: recipe {pack.recipe.name} left its experts plain, so they cannot be read from disk when they "
                "are asked for, and they do not all fit. Pack it by one that packs them, such as int4."
            )
        store = Offloaded(pack.config, Shelf(pack), plan.slots, plan.far, device, **how)
    Model(pack.config, rehearsal, _Noted() if store else None)
    if extra := rehearsal.unused():
        raise CheckpointError(f"{path}: {len(extra)} tensors have no place in the model: {some(extra, 5)}.")
    with _Whole():
        model = Model(pack.config, PackedSource(pack, dtype, device), store)
    model.plan, model.checksum = plan, pack.checksum
    return model


def _planned(
    config: Config, recipe: str | Recipe | None, device: torch.device, dtype: torch.dtype, budget: dict
) -> Plan:
    given = {name: value for name, value in budget.items() if value is not None}
    return Plan.make(config, recipe, device=device.type, dtype=dtype, **given)


def _as_packed(source: Safetensors, recipe: str | Recipe | None) -> Safetensors | Quantising:
    return source if recipe is None else Quantising(source, Recipe.named(recipe))


class _Noted:
    """A store for a rehearsal: the experts stay where they are."""

    def take(self, config: Config, layer: int, weights: object) -> None:
        pass

    def opened(self, blocks: object) -> None:
        pass


class _Whole:
    """Lets a body finish or leaves nothing of it: a notebook keeps the last error, the error its frames, and they would
    keep a half-loaded model. An error nobody foresaw carries its frames on as text."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, frames: TracebackType | None) -> None:
        if error is None:
            return
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            error.add_note("".join(traceback.format_tb(frames)))
        error.__traceback__ = None
