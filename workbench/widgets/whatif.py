"""What if: a model, a context, a batch and a format, and the bytes they take. Arithmetic; nothing is allocated."""

import threading
from dataclasses import replace
from html import escape

import pandas as pd
import torch

from workbench.config import PRESETS, Config
from workbench.errors import RequestError
from workbench.footprint import TABLE, Footprint
from workbench.formats import CACHE_FORMATS, cache_format
from workbench.lens.baselines import Ratio, baselines
from workbench.widgets import picture
from workbench.widgets.cachemeter import usual
from workbench.widgets.view import View, script

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MOST = 1024  # sequences
CLAIM = 131_072  # tokens: the 128K that the paper names, less than the context of the configuration


class WhatIf(View):
    """Bytes of weights and cache, by the arithmetic of the meter's theoretical part (see Footprint).

    `choose` does what the controls do. `config` is offered beside the released shapes, and chosen.
    """

    _esm = script("view.js", "bars.js", "whatif.js")
    _css = script("view.css", "memory.css")

    def __init__(
        self, model: str = "v2", context: int | None = None, batch: int = 1, format: str = "q6", dtype: str = "bf16",
        *, config: Config | None = None,
    ) -> None:  # fmt: skip
        self.models = {name: Config.preset(name) for name in sorted(PRESETS, reverse=True)}
        if config is not None:
            model = config.name or "this model"
            self.models = {model: config} | self.models
        self._lock = threading.RLock()
        self._model, self.footprint = model, self._footprint(model, context, batch, format, dtype)
        super().__init__()

    def choose(
        self,
        *,
        model: str | None = None,
        context: int | None = None,
        batch: int | None = None,
        format: str | None = None,
        dtype: str | None = None,
    ) -> Footprint:
        """Changes what is given and keeps the rest; a context that another model does not hold becomes its longest.
        RequestError for what there is not.
        """
        with self._lock:
            now, name = self.footprint, model or self._model
            if context is None and name in self.models:
                context = min(now.tokens, self.models[name].max_position_embeddings)
            self.footprint = self._footprint(
                name, context, now.batch if batch is None else batch, format or now.format.name, dtype or self.dtype
            )
            self._model = name
            self._tell({"kind": "result"} | self._result())
            return self.footprint

    @property
    def model(self) -> str:
        return self._model

    @property
    def dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.footprint.dtype)

    @property
    def ratio(self) -> Ratio:
        """The cache of a token beside the usual baseline of the model, which `str` names."""
        return usual(self.footprint.config).ratio(self.footprint.per_token)

    def table(self) -> pd.DataFrame:
        """A row a part: bytes, and its share of all."""
        return self.footprint.to_frame()

    def schemes(self) -> pd.DataFrame:
        """Bytes that the same tokens take in every scheme, and in this cache."""
        footprint = self.footprint
        tokens = footprint.tokens * footprint.batch
        rows = {name: (one.nbytes, one.nbytes * tokens) for name, one in baselines(footprint.config).items()}
        rows[f"this cache ({footprint.format.name})"] = (footprint.per_token, sum(footprint.cache.values()))
        return pd.DataFrame.from_dict(rows, orient="index", columns=["bytes per token", "bytes"]).rename_axis("scheme")

    # Behind the view

    def _footprint(self, model: str, context: int | None, batch: int, format: str, dtype: str) -> Footprint:
        if model not in self.models:
            raise RequestError(f"no model called {model!r}; there are {', '.join(self.models)}.")
        if dtype not in DTYPES:
            raise RequestError(f"weights are in {' or '.join(DTYPES)}; got {dtype!r}.")
        if batch > MOST:
            raise RequestError(f"a batch of at most {MOST:,} sequences; got {batch:,}.")
        config = self.models[model]
        context = min(CLAIM, config.max_position_embeddings) if context is None else context
        return Footprint(replace(config, name=model), context, batch, format, dtype=DTYPES[dtype])

    def _result(self) -> dict:
        footprint = self.footprint
        tokens = footprint.tokens * footprint.batch
        known = dict.fromkeys((*CACHE_FORMATS, footprint.format.name))  # one with a window too, if it is chosen
        return {
            "model": self._model,
            "context": footprint.tokens,
            "most": footprint.config.max_position_embeddings,
            "batch": footprint.batch,
            "format": footprint.format.name,
            "dtype": self.dtype,
            "weights": list(footprint.weights.items()),
            "table": [TABLE, footprint.table],
            "cache": list(footprint.cache.items()),
            "per_token": footprint.per_token,
            "ratio": str(self.ratio),
            "formats": [[name, cache_format(name).nbytes(footprint.row)] for name in known],
            "parameters": list(footprint.config.parameters()),
            "baselines": [[b.name, b.doc, b.nbytes * tokens, b.own] for b in baselines(footprint.config).values()],
        }

    def _snapshot(self, view: str | None = None) -> None:
        with self._lock:
            facts = {
                "models": list(self.models),
                "dtypes": list(DTYPES),
                "batch": MOST,
            }
            self._tell({"kind": "show", "view": view, "facts": facts} | self._result())

    def _obey(self, message: dict) -> None:
        match message:
            case {"kind": "choose", "model": str(name)}:
                self.choose(model=name)
            case {"kind": "choose", "context": int(tokens)}:
                self.choose(context=tokens)
            case {"kind": "choose", "batch": int(batch)}:
                self.choose(batch=batch)
            case {"kind": "choose", "format": str(name)}:
                self.choose(format=name)
            case {"kind": "choose", "dtype": str(name)}:
                self.choose(dtype=name)

    def __repr__(self) -> str:
        cache, weights = sum(self.footprint.cache.values()), sum(self.footprint.weights.values())
        sizes = f"cache {cache:,} B, weights {weights:,} B in {self.dtype}"
        return f"<WhatIf {self.footprint}: {sizes}; a token takes {self.ratio}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run both tables, and the schemes as a picture."""
        parts, schemes = self.table(), self.schemes()
        rows = [(name, float(size)) for name, size in schemes["bytes"].items() if size]
        png = picture.bars(rows, f"{self.footprint} (bytes, log scale)", mine="this cache") if rows else None
        shares = {"share": "{:.2%}".format}
        tables = parts.to_html(formatters=shares, border=0) + schemes.to_html(border=0)
        html = f"<section><p>{escape(repr(self))}</p>{tables}</section>"
        text = f"{self!r}\n{parts.to_string(formatters=shares)}\n{schemes.to_string()}"
        return self._page(text, html, png, **kwargs)
