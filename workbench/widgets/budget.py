"""The budget slider: what fits where as memory, context and cache format change. Arithmetic; nothing is allocated."""

import math
import threading
from html import escape
from pathlib import Path

from workbench.bandwidth import Measured
from workbench.config import Config
from workbench.errors import BudgetError, RequestError
from workbench.formats import CACHE_FORMATS, cache_format
from workbench.pack import Pack
from workbench.plan import Plan
from workbench.recipe import Recipe
from workbench.sizes import parse_bytes, show_bytes
from workbench.widgets import picture
from workbench.widgets.view import View, script, short

EVERY = 1 << 50  # bytes: room for all of it
STEPS = (1.0, 1.25, 1.5, 1.75)  # times powers of two: the sizes that memory is sold in are among them
SPAN = 64  # a slider begins at so small a part of what all of it takes
VRAM, RAM = "16GiB", "64GiB"  # where nothing is said
RECIPES = ("bf16", "fp8", "int8", "int6", "int4", "int3")


class BudgetSlider(View):
    """The plan (see plan.Plan) of a released shape, a checkpoint directory, a config.json or a Config.

    `choose` does what the controls do. `plan` is the last that fitted, None before one did; `error` says why what is
    chosen now does not. With device "cpu" and no `vram` there is only main memory. A packed checkpoint keeps its
    recipe.
    """

    _esm = script("view.js", "bars.js", "budget.js")
    _css = script("view.css", "memory.css", "budget.css")

    def __init__(
        self,
        what: str | Path | Config = "v2",
        recipe: str | Recipe | None = None,
        *,
        device: str = "cuda",
        vram: int | str | None = None,
        ram: int | str = RAM,
        context: int | None = None,
        cache: str = "auto",
        measured: Measured | None = None,
    ) -> None:
        unlimited = {"device": "cpu", "ram": EVERY}
        whole = (
            Plan.make(what, recipe or "int4", **unlimited)
            if isinstance(what, Config)
            else Plan.of(what, recipe, **unlimited)
        )
        self.config, self.device = whole.config, device
        self._fixed = {"device": device, "process": whole.process, "measured": measured or whole.measured}
        if vram is None and device == "cuda":
            vram = VRAM
        self.wanted = {
            "vram": None if vram is None else parse_bytes(vram),
            "ram": parse_bytes(ram),
            "context": min(context or whole.context, self.config.max_position_embeddings),
            "cache": _cache(device) if cache == "auto" else cache_format(cache).name,
            "recipe": whole.recipe.name,
        }
        self.plan: Plan | None = None
        self.error: str | None = None
        self._lock = threading.RLock()
        every = self._make(self.wanted | {"ram": EVERY} | ({} if vram is None else {"vram": EVERY}))
        self._stops = {"ram": _stops(sum((every.host or every.near).values()) + every.experts * every.block)}
        if vram is not None:
            self._stops["vram"] = _stops(sum(every.near.values()))
        self._recipes = list(dict.fromkeys([whole.recipe.name, *([] if _is_pack(what) else RECIPES)]))
        super().__init__()
        self._try(self.wanted)

    def choose(
        self,
        *,
        vram: int | str | None = None,
        ram: int | str | None = None,
        context: int | None = None,
        cache: str | None = None,
        recipe: str | None = None,
    ) -> Plan:
        """Changes what is given and keeps the rest. BudgetError where it does not fit: what was chosen stays chosen, as
        the next choice may make it fit, and the plan before stays too. RequestError, and no change, for what there is
        not. A context is at most the model's.
        """
        if vram is not None and self.wanted["vram"] is None:
            raise RequestError("there is only main memory here: make a BudgetSlider with `vram` to plan for two kinds.")
        given = {
            "vram": vram and parse_bytes(vram),
            "ram": ram and parse_bytes(ram),
            "context": context and min(context, self.config.max_position_embeddings),
            "cache": cache and cache_format(cache).name,
            "recipe": recipe and Recipe.named(recipe).name,
        }
        with self._lock:
            error = self._try(self.wanted | {name: value for name, value in given.items() if value is not None})
            if error is not None:
                raise error
            return self.plan

    # Behind the view

    def _make(self, wanted: dict) -> Plan:
        given = {name: value for name, value in wanted.items() if value is not None}
        return Plan.make(self.config, given.pop("recipe"), **given, **self._fixed)

    def _try(self, wanted: dict) -> BudgetError | None:
        try:
            self.plan, error = self._make(wanted), None
        except BudgetError as refused:
            error = refused
        self.wanted, self.error = wanted, error and str(error)
        self._tell({"kind": "result"} | self._result())
        return error

    def _result(self) -> dict:
        plan = self.plan
        if plan is None:
            return {"wanted": self.wanted, "error": self.error, "plan": None}
        speeds = plan.speed_range()
        tiers = {"near": plan.near, "host": plan.host, "disk": plan.disk}
        said = {
            "vram": plan.vram,
            "ram": plan.ram,
            "chunk": plan.chunk,
            "slots": plan.slots,
            "far": plan.far,
            "experts": plan.experts,
            "block": plan.block,
            "capacity": list(plan.context_capacity().items()),
            "speed": speeds and [[short(one.tokens_per_second), short(one.hit), one.binds] for one in speeds],
        }
        said |= {name: [[part, size] for part, size in parts.items() if size] for name, parts in tiers.items()}
        return {"wanted": self.wanted, "error": self.error, "plan": said}

    def _snapshot(self, view: str | None = None) -> None:
        with self._lock:
            facts = {
                "model": self.config.name or "this model",
                "near": "VRAM" if self.device == "cuda" else "main memory in place of VRAM",
                "stops": self._stops,
                "most": self.config.max_position_embeddings,
                "formats": list(CACHE_FORMATS),
                "recipes": self._recipes,
            }
            self._tell({"kind": "show", "view": view, "facts": facts} | self._result())

    def _obey(self, message: dict) -> None:
        try:
            match message:
                case {"kind": "choose", "vram": int(size)}:
                    self.choose(vram=size)
                case {"kind": "choose", "ram": int(size)}:
                    self.choose(ram=size)
                case {"kind": "choose", "context": int(tokens)}:
                    self.choose(context=tokens)
                case {"kind": "choose", "cache": str(name)}:
                    self.choose(cache=name)
                case {"kind": "choose", "recipe": str(name)}:
                    self.choose(recipe=name)
        except BudgetError:
            pass  # it was told with the result

    def __repr__(self) -> str:
        if self.plan is None:
            return f"<BudgetSlider of {self.config.name}: {self.error}>"
        plan, limit = self.plan, f"{show_bytes(self.plan.ram)} of main memory"
        if plan.staged:
            limit = f"{show_bytes(plan.vram)} near, {limit}"
        return f"<BudgetSlider of {self.config.name}: {plan.slots:,} of {plan.experts:,} experts near, within {limit}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the plan as text, as a table and as a picture."""
        lost = f"<p>{escape(self.error)}</p>" if self.error else ""
        if self.plan is None:
            return self._page(repr(self), lost, **kwargs)
        rows = [(part, float(size)) for part, size in self.plan.near.items() if size]
        png = picture.bars(rows, f"{self.config.name}: what is near (bytes, log scale)", mine="expert slots")
        table = self.plan.to_frame().to_html(border=0)
        text = "\n".join(filter(None, [str(self.plan), self.error]))
        return self._page(text, f"<section>{lost}<pre>{escape(str(self.plan))}</pre>{table}</section>", png, **kwargs)


def _cache(device: str) -> str:
    return "bf16" if device == "cuda" else "fp32"


def _is_pack(what: str | Path | Config) -> bool:
    return not isinstance(what, Config) and Pack.is_one(Path(what))


def _stops(all: int) -> list[int]:
    """Bytes that a slider stops at, from a small part to the first that all of it fits into."""
    powers = range(int(math.log2(all / SPAN)), int(math.log2(all)) + 2)
    stops = [int(step * 2**power) for power in powers for step in STEPS]
    return stops[: next(n for n, stop in enumerate(stops) if stop >= all) + 1]
