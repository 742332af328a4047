"""Two answers to the same prompt side by side: where they part, and how far the routing of each token is shared."""

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from workbench.errors import RequestError
from workbench.lens.difference import Difference, diff
from workbench.trace import Trace
from workbench.widgets import picture
from workbench.widgets.live import whole
from workbench.widgets.tokens import visible
from workbench.widgets.view import View, script, short

if TYPE_CHECKING:
    from workbench.widgets.selection import Selection

NOBODY = -1  # in a Selection: no token or layer
UNKNOWN = 255  # an overlap in one byte: 0 nothing shared, 254 the same experts
SHOWN = 8  # tokens around the first difference in the text of a saved notebook


class SideBySide(View):
    """Traces `a` and `b` of one sequence each, token beside token. Linked to a `selection`, its token is the cursor.

    RequestError for a trace of several sequences, of none, or where no layer is in both. What was compared is
    `difference`; `summary()` are the numbers shown.
    """

    _esm = script("view.js", "pairs.js", "compare.js")
    _css = script("view.css", "compare.css")

    selection: "Selection | None" = None  # also while a refused one is thrown away

    def __init__(
        self,
        a: Trace,
        b: Trace,
        labels: Sequence[str] = ("as it is", "edited"),
        selection: "Selection | None" = None,
    ) -> None:
        for name, trace in zip(labels, (a, b)):
            _check(name, trace)
        self.a, self.b, self.labels = a, b, tuple(labels)
        self.difference: Difference = diff(a, b)
        self.rows = _rows(a, b)
        self.overlap = _overlap(self.difference, self.rows)
        self.row, self.layer, self.selection = NOBODY, NOBODY, selection
        super().__init__()
        if selection is not None:
            selection.observe(self._selected, ["token", "layer"])
            self.row, self.layer = self._row_of(selection.token), self._known(selection.layer)

    def summary(self) -> dict:
        """first: place of the first difference in `rows`, None without one; equal: share of the generated tokens that
        are the same; overlap: of routing, mean over tokens and layers before the texts part and after (None: nothing
        there); logprob: mean change of the log-probability of the same tokens before they part, in nats, without sign.
        """
        rows, first = self.rows, self._first
        generated = rows[rows["generated"]]
        before = rows.iloc[:first] if first is not None else rows
        moved = (before["logprob b"] - before["logprob a"]).abs().dropna()
        return {
            "first": first,
            "equal": float(generated["same"].mean()) if len(generated) else None,
            "generated": len(generated),
            "overlap": [_mean(part) for part in self._parts()],
            "logprob": float(moved.mean()) if len(moved) else None,
            "compared": len(moved),
        }

    def by_layer(self) -> pd.DataFrame:
        """A row a layer: mean routing overlap before the texts part, and after; NaN where there is nothing."""
        columns = [[_mean(part[:, n]) for n in range(part.shape[1])] for part in self._parts()]
        index = pd.Index(self.difference.layers, name="layer")
        return pd.DataFrame(dict(zip(("before", "after"), columns)), index=index, dtype=float)

    def move(self, row: int) -> None:
        """Puts the cursor on this row of `rows`; RequestError if there is none."""
        self._move(row)

    def leave(self) -> None:
        """Takes the view off its selection; it stays where it is shown."""
        if self.selection is not None:
            self.selection.unobserve(self._selected, ["token", "layer"])
            self.selection = None

    def close(self) -> None:
        """Takes the view off the screen and off its selection."""
        self.leave()
        super().close()

    # Behind the view

    @property
    def _first(self) -> int | None:
        differ = np.flatnonzero(~self.rows["same"].to_numpy())
        return int(differ[0]) if len(differ) else None

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows, layers] before the texts part, and from there on."""
        first = len(self.rows) if self._first is None else self._first
        return self.overlap[:first], self.overlap[first:]

    def _obey(self, message: dict) -> None:
        match message:
            case {"kind": "move", "row": int(row), "view": str(view)}:
                self._move(row, view)
            case {"kind": "layer", "layer": int(layer), "view": str(view)}:
                self._choose(self._known(layer), view)

    def _move(self, row: int, view: str | None = None) -> None:
        if not 0 <= row < len(self.rows):
            raise RequestError(f"there is no row {row}; there are {len(self.rows)}, from 0.")
        self.row = row
        self._tell({"kind": "moved", "row": row, "layers": self._layers_of(row), "view": view})
        if self.selection is not None:
            self.selection.token = self._token_of(row)

    def _choose(self, layer: int, view: str | None = None) -> None:
        self.layer = layer
        self._tell({"kind": "layer", "layer": layer, "view": view})
        if self.selection is not None:
            self.selection.layer = layer

    def _selected(self, change: dict) -> None:
        if change["name"] == "layer":
            if self._known(change["new"]) != self.layer:
                self._choose(self._known(change["new"]))
        elif (row := self._row_of(change["new"])) not in (NOBODY, self.row):
            self._move(row)

    def _known(self, layer: int) -> int:
        return layer if layer in self.difference.layers else NOBODY

    def _row_of(self, token: int) -> int:
        found = np.flatnonzero(self.rows["token"].to_numpy() == token)
        return int(found[0]) if len(found) else NOBODY

    def _token_of(self, row: int) -> int:
        return int(self.rows["token"].iloc[row])

    def _layers_of(self, row: int) -> list[list]:
        """A list a layer that both read this token in: [layer, overlap, experts only in a, experts only in b]."""
        table = self.difference.routing
        table = table[table["position"] == self.rows["position"].iloc[row]]
        columns = ("layer", "overlap", "only a", "only b")
        return [
            [int(layer), short(overlap), list(only_a), list(only_b)]
            for layer, overlap, only_a, only_b in zip(*(table[name] for name in columns))
        ]

    def _snapshot(self, view: str | None = None) -> None:
        rows, by_layer = self.rows, self.by_layer()
        settings = self.difference.header
        message = {
            "kind": "show",
            "view": view,
            "labels": self.labels,
            "texts": [
                [text if there else None for text, there in zip(whole(rows[name].fillna("")), rows[name].notna())]
                for name in ("text a", "text b")
            ],
            "same": rows["same"].astype(int).tolist(),
            "positions": rows["position"].tolist(),
            "prompt": int((~rows["generated"]).cumprod().sum()),
            "layers": list(self.difference.layers),
            "by_layer": [[short(value) for value in by_layer[part]] for part in by_layer],
            "summary": {name: _short(value) for name, value in self.summary().items()},
            "settings": [[str(name), _worded(row["a"]), _worded(row["b"])] for name, row in settings.iterrows()],
            "row": self.row,
            "cursor": self._layers_of(self.row) if self.row >= 0 else [],
            "layer": self.layer,
        }
        measured = rows[["logprob a", "logprob b"]].to_numpy("<f4")
        shared = np.where(np.isnan(self.overlap), UNKNOWN, np.nan_to_num(self.overlap) * 254).round().astype("u1")
        self._tell(message, [measured.tobytes(), shared.tobytes()])

    def _heading(self) -> str:
        return f"Side by side: {self.labels[0]} (a), {self.labels[1]} (b)"

    def __repr__(self) -> str:
        return f"{self._heading()}\n{self.difference.summary()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        summary = "".join(f"<li>{escape(line)}</li>" for line in self.difference.summary().splitlines())
        html = f"<section><p>{escape(self._heading())}</p><ul>{summary}</ul>{self._near()}</section>"
        return self._page(repr(self), html, self._picture(), **kwargs)

    def _near(self) -> str:
        """The tokens around the first difference, as a table."""
        if self._first is None:
            return ""
        near = self.rows.iloc[max(0, self._first - SHOWN) : self._first + SHOWN + 1]
        near = near[["position", "text a", "text b", "logprob a", "logprob b"]]
        return near.to_html(index=False, na_rep="", border=0, float_format="{:.2f}".format)

    def _picture(self) -> bytes:
        """Both answers as strips, tinted by how little of their routing is shared."""
        apart = 1 - np.array([_mean(row) if _mean(row) is not None else np.nan for row in self.overlap])
        images = []
        for side, label in zip("ab", self.labels):
            there = self.rows[self.rows[f"text {side}"].notna()]
            title = f"{label}: {len(there)} tokens" + ("" if side == "a" else f"; {self._parting()}")
            prompt = (~there["generated"]).tolist()
            shade = apart[there.index].tolist()
            pieces = [visible(piece) for piece in whole(there[f"text {side}"])]
            drawn = picture.strip(pieces, shade, prompt, title, ("the same experts", "none in common"))
            images.append(Image.open(io.BytesIO(drawn)).convert("RGB"))
        page = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), picture.PAPER)
        page.paste(images[0], (0, 0))
        page.paste(images[1], (0, images[0].height))
        out = io.BytesIO()
        page.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()

    def _parting(self) -> str:
        return "no difference" if self._first is None else f"they part at position {self.rows['position'][self._first]}"


def _check(name: str, trace: Trace) -> None:
    count = len(trace.header["sequences"])
    if count != 1:
        raise RequestError(f"{name!r} has {count} sequences; compare one of them: trace.sequence(n).")
    if not len(trace):
        raise RequestError(f"{name!r} has no tokens.")


def _rows(a: Trace, b: Trace) -> pd.DataFrame:
    """A row a position that either has: position, text a, text b, same, generated (by either), logprobs, token: its
    number in the trace (in b where a has none)."""
    columns = ["position", "id", "text", "phase", "logprob"]
    left, right = (trace.tokens[columns].assign(token=range(len(trace))) for trace in (a, b))
    rows = left.merge(right, on="position", how="outer", suffixes=(" a", " b")).sort_values(
        "position", ignore_index=True
    )
    rows["same"] = rows["id a"] == rows["id b"]
    rows["generated"] = (rows["phase a"] == "decode") | (rows["phase b"] == "decode")
    rows["token"] = rows["token a"].fillna(rows["token b"]).astype(int)
    return rows


def _overlap(difference: Difference, rows: pd.DataFrame) -> np.ndarray:
    """[rows, layers]; NaN where one of the two has not read the token."""
    overlap = np.full((len(rows), len(difference.layers)), np.nan)
    table = difference.routing
    places = np.searchsorted(rows["position"], table["position"])
    overlap[places, np.searchsorted(difference.layers, table["layer"])] = table["overlap"]
    return overlap


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _short(value: object) -> object:
    if isinstance(value, list):
        return [_short(each) for each in value]
    return short(value) if isinstance(value, float) else value


def _worded(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else str(value)
