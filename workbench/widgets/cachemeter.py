"""The cache meter: what the latent cache holds while it grows, what others would have held, and its format."""

import threading
from collections.abc import Callable
from html import escape
from time import monotonic
from typing import NamedTuple

import pandas as pd

from workbench.cache import BLOCK
from workbench.config import Config
from workbench.errors import RequestError
from workbench.footprint import Footprint, RowBytes
from workbench.formats import CACHE_FORMATS, Packed, cache_format
from workbench.lens.baselines import DEEPSEEK_67B, Baseline, Ratio, baselines
from workbench.meter import Meter
from workbench.storages import Held, measure
from workbench.timeline import Sampler
from workbench.widgets import picture
from workbench.widgets.view import View, script, short
from workbench.workbench import Workbench

INTERVAL = 1 / 2  # seconds between two messages, so that a whole panel stays below twenty a second
WIDE = (64, 128, 256, 512)  # choices of how many recent tokens are kept wide

Errors = list[tuple[float, float]]


class Switch(NamedTuple):
    """A change of format: bytes held before and after it, and the relative error of (latent, rotary key) that it added
    to each layer; no errors where nothing was cached, or where the rows were `dropped`, to be computed anew.
    """

    before: str
    after: str
    held: tuple[int, int]
    errors: Errors
    dropped: bool


class CacheMeter(View):
    """The cache of the last conversation or stream of `bench`, measured, in the browser and as methods.

    sampler   looks at the same times; by default one of its own, from the first display on
    convert   carries out a switch of format; by default the engine's own, which does not wait for a stream that runs
    """

    _esm = script("view.js", "bars.js", "tanks.js", "cachemeter.js")
    _css = script("view.css", "memory.css")

    def __init__(
        self, bench: Workbench, sampler: Sampler | None = None, convert: Callable[[str], Errors] | None = None
    ) -> None:
        self.bench, self.config = bench, bench.config
        self.baselines = baselines(self.config)
        self._name = bench.name.rsplit("/", 1)[-1]
        self._convert = convert or bench.engine.convert_cache
        self._lock = threading.RLock()
        self._told: dict = {}
        self._last = 0.0
        self._own = sampler is None
        self._baseline = usual(self.config).name
        self.switched: Switch | None = None
        super().__init__()
        self.sampler = Sampler(Meter(bench), INTERVAL) if sampler is None else sampler
        self.sampler.listeners.append(self._look)

    @property
    def held(self) -> Held:
        """What the cache holds at this moment; no tokens before the first reply."""
        cache = self.bench.engine.cache if self.bench else None
        if cache is not None:
            return measure(cache.pool)
        format = cache_format(self._format)
        return Held(format.name, 0, 0, format.nbytes(self._row), (0,) * self.config.num_hidden_layers, 0, 0)

    @property
    def format(self) -> str:
        """Of the cache. Setting it is `switch`."""
        return self.held.format

    @format.setter
    def format(self, name: str) -> None:
        self.switch(name)

    @property
    def baseline(self) -> str:
        """Whose name the large ratio carries: one of `baselines`."""
        return self._baseline

    @baseline.setter
    def baseline(self, name: str) -> None:
        if name not in self.baselines:
            raise RequestError(f"no baseline called {name!r}; there are {', '.join(self.baselines)}.")
        self._baseline = name
        self._tell({"kind": "baseline", "name": name})

    @property
    def ratio(self) -> Ratio:
        """Bytes per token, of the rows written and of windows, beside the baseline; `str` names it."""
        return self._ratio(self.baselines[self._baseline], self.held)

    def switch(self, format: str) -> pd.DataFrame:
        """Keeps the cache, and what comes, in another format; returns its `loss`. RequestError while answering."""
        name = cache_format(format).name
        if self.bench is None:
            raise RequestError("the bench of this meter was let go: make another one with CacheMeter(bench).")
        with self._lock:  # no look in the middle of it
            before = self.held
            errors = self._convert(name)
            after = self.held
            dropped = bool(before.tokens) and not after.tokens
            self.switched = Switch(before.format, name, (before.nbytes, after.nbytes), errors, dropped)
            self._tell({"kind": "switched"} | self._state() | {"switched": self._cost()})
        self.sampler.sample()
        return self.loss()

    def loss(self) -> pd.DataFrame:
        """Of the last switch, a row a layer: relative error (root mean square) added to latent and rotary key."""
        errors = self.switched.errors if self.switched else []
        return pd.DataFrame(errors, columns=["latent", "rotary key"], dtype=float).rename_axis("layer")

    def table(self) -> pd.DataFrame:
        """Bytes the same tokens take in every scheme and in this cache, as allocated too; and of what share this is."""
        held = self.held
        mine = self._per_token(held)
        rows = {name: (one.nbytes, one.nbytes * held.tokens, mine / one.nbytes) for name, one in self.baselines.items()}
        rows[f"this cache ({held.format}), rows written"] = (mine, held.written + held.windows, 1.0)
        rows["this cache, allocated"] = (pd.NA, held.nbytes, pd.NA)
        columns = ["bytes per token", f"bytes of {held.tokens} tokens", "this cache's share"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("scheme")

    def refresh(self) -> None:
        """Tells the browser what there is now, if it is news."""
        self._last = 0.0
        self._look()

    def retire(self) -> None:
        """Lets the bench go; what was seen stays."""
        with self._lock:
            if self._look in self.sampler.listeners:
                self.sampler.listeners.remove(self._look)
            if self._own:
                self.sampler.retire()
            self._final, self.bench, self._convert = self._state(), None, None

    def close(self) -> None:
        """Lets the bench go and takes the meter off the screen."""
        if self.bench is not None:
            self.retire()
        super().close()

    # Behind the view

    @property
    def _row(self):
        return Footprint(self.config, 0).row

    @property
    def _format(self) -> str:
        return self.bench.engine.cache_format if self.bench else "bf16"

    def _per_token(self, held: Held) -> float:
        """Windows are shared out among the tokens there are."""
        per_token = held.row * len(held.layers)
        return (held.written + held.windows) / held.tokens if held.tokens else per_token

    def _ratio(self, baseline: Baseline, held: Held) -> Ratio:
        return baseline.ratio(self._per_token(held))

    def _look(self) -> None:
        with self._lock:
            if self.bench is None or monotonic() - self._last < INTERVAL:
                return
            state = self._state()
            if state != self._told:
                self._last = monotonic()
                self._told = state
                self._tell({"kind": "grow"} | state)

    def _state(self) -> dict:
        if self.bench is None:
            return self._final
        held = self.held
        even = len(set(held.layers)) == 1
        return {
            "format": held.format,
            "next": self._format,
            "tokens": held.tokens,
            "blocks": held.blocks,
            "packed": held.packed,
            "windows": held.windows,
            "layers": None if even else list(held.layers),
        }

    def _cost(self) -> dict | None:
        if self.switched is None:
            return None
        errors = [[short(value) for value in pair] for pair in self.switched.errors]
        return self.switched._asdict() | {"errors": errors}

    def _snapshot(self, view: str | None = None) -> None:
        if self._own and self.bench is not None:
            self.sampler.start()
        with self._lock:
            self._told = self._state()
            facts = {
                "model": self._name,
                "layers": self.config.num_hidden_layers,
                "row": list(self._row),
                "block": BLOCK,
                "wide": WIDE,
                "formats": [self._said(name) for name in CACHE_FORMATS],
                "baselines": [[one.name, one.doc, one.nbytes, one.own] for one in self.baselines.values()],
            }
            show = {"kind": "show", "view": view, "facts": facts, "baseline": self._baseline, "switched": self._cost()}
            self._tell(show | self._told)

    def _said(self, name: str) -> dict:
        format = CACHE_FORMATS[name]
        parts = RowBytes.of(format, self._row)
        return {"name": name, "doc": format.doc, "parts": list(parts), "packed": isinstance(format, Packed)}

    def _obey(self, message: dict) -> None:
        match message:
            case {"kind": "switch", "format": str(name)}:
                self.switch(name)
            case {"kind": "baseline", "name": str(name)}:
                self.baseline = name

    def __repr__(self) -> str:
        held = self.held if self.bench else None
        if held is None:
            return f"<CacheMeter of {self._name}, which was let go>"
        return (
            f"<CacheMeter of {self._name}: {held.tokens} tokens in {held.format}, "
            f"{held.written + held.windows:,} B written, {held.nbytes:,} B allocated, {self.ratio} per token>"
        )

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the comparison as a table and a picture."""
        if self.bench is None:
            return self._page(repr(self), f"<p>{escape(repr(self))}</p>", **kwargs)
        held, table = self.held, self.table()
        title = f"Cache of {self._name}: {held.tokens} tokens in {held.format}"
        column = table.columns[1 if held.tokens else 0]
        rows = [(name, float(size)) for name, size in table[column].items() if not pd.isna(size) and size]
        png = picture.bars(rows, f"{title} ({column}, log scale)", mine="this cache")
        said = f"{title}: {self.ratio}"
        html = f"<section><p>{escape(said)}</p>{table.to_html(na_rep='', border=0)}</section>"
        return self._page(f"{said}\n{table.to_string(na_rep='')}", html, png, **kwargs)


def usual(config: Config) -> Baseline:
    """The baseline people mean: for V2 the paper's, which would be a comparison of two sizes for any other model."""
    if config in map(Config.preset, ("v2", "v2.5")):
        return DEEPSEEK_67B
    return next(one for name, one in baselines(config).items() if name.startswith("MHA"))
