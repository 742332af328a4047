"""Finished plots from tables, each with the table as its text alternative. Drawn offline by JupyterLab."""

import json
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from workbench.errors import RequestError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito: told apart by every eye
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#777777"  # reads on a light and on a dark page
# from clear to solid, halfway in lightness between a white and a black page: on either, equal steps look equal
BLUE, ORANGE = "33, 130, 205", "200, 105, 0"
FAINT = 0.06  # of the lowest value, so that it is told from a cell without one
ROWS, COLUMNS = 64, 40  # of a table that are written out in its text alternative


class Plot(go.Figure):
    """A plotly figure that is also its table, for screen readers, GitHub, and notebooks opened without plotly."""

    def __init__(self, traces: Sequence[BaseTraceType], table: pd.DataFrame, title: str) -> None:
        super().__init__(list(traces))
        self._table, self._heading = table, title
        self.update_layout(
            template="none",
            title={"text": escape(title), "x": 0, "xanchor": "left"},
            font={"color": GREY, "size": 13},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            width=760,  # fixed: JupyterLab saves a picture of each plot, as large as it is drawn
            height=340,
            margin={"l": 60, "r": 20, "t": 60, "b": 70},
            legend={
                "title": {"text": escape(str(table.columns.name or ""))},
                "orientation": "h",
                "x": 0,
                "y": 1,
                "yanchor": "bottom",
            },
            showlegend=len(table.columns) > 1,
        )
        self.update_xaxes(automargin=True, showgrid=False, zeroline=False)
        self.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.5)")

    _ipython_display_ = None  # or plotly would show its own form, of 5 MB in some front ends, without the table

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **kwargs) -> dict:
        form = {"float_format": "{:.3g}".format, "max_rows": ROWS, "max_cols": COLUMNS}
        html, text = self._table.to_html(**form), self._table.to_string(**form)
        return {
            "application/vnd.plotly.v1+json": json.loads(self.to_json()) | {"config": {"displaylogo": False}},
            "text/html": f"<figure><figcaption>{escape(self._heading)}</figcaption>{html}</figure>",
            "text/plain": f"{self._heading}\n{text}",
        }


def bars(table: pd.DataFrame, title: str, axis: str) -> Plot:
    """A group of bars a row, a colour a column. Rows may repeat a name: they are places, not categories."""
    places = list(range(len(table)))
    names = [escape(str(name)) for name in table.index]
    traces = [
        go.Bar(
            x=places, y=table[column].tolist(), name=escape(str(column)), marker={"color": COLOURS[n % len(COLOURS)]},
            customdata=names, hovertemplate="%{customdata}<br>%{y:.3g}",
        )
        for n, column in enumerate(table.columns)
    ]  # fmt: skip
    plot = Plot(traces, table, title)
    plot.update_xaxes(tickvals=places, ticktext=names, title=escape(str(table.index.name or "")))
    plot.update_yaxes(title=escape(axis))
    return plot


def lines(table: pd.DataFrame, title: str, axis: str, log: bool = False) -> Plot:
    """A line a column over the numbers in the index; `log` makes both axes logarithmic."""
    traces = [
        go.Scatter(
            x=table.index.tolist(), y=table[column].tolist(), name=escape(str(column)), mode="lines+markers",
            line={"color": COLOURS[n % len(COLOURS)], "dash": DASHES[n % len(DASHES)]},
        )
        for n, column in enumerate(table.columns)
    ]  # fmt: skip
    plot = Plot(traces, table, title)
    plot.update_xaxes(title=escape(str(table.index.name or "")))
    plot.update_yaxes(title=escape(axis))
    if log:
        plot.update_xaxes(type="log", tickvals=table.index.tolist())
        seen = table.to_numpy(float)
        marks = _marks(seen[np.isfinite(seen) & (seen > 0)])
        plot.update_yaxes(type="log", tickvals=marks, ticktext=[f"{mark:,g}" for mark in marks])
    return plot


def histogram(
    values: Mapping[str, Sequence[float]],
    title: str,
    axis: str,
    bins: int = 30,
    marks: Mapping[str, float] | None = None,
    span: tuple[float, float] | None = None,
) -> Plot:
    """How often values fall into each of `bins` equal parts of `span`, a colour a name; `axis` is what they are.

    `marks` are single values to be seen beside them, as dashed lines with their names. `span` is by default from the
    lowest to the highest of all, marks included; what lies outside is not drawn.
    """
    marks = dict(marks or {})
    every = np.concatenate([np.asarray(list(each), float) for each in (*values.values(), marks.values())])
    low, high = span or (float(every.min()), float(every.max()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    counts = {name: np.histogram(each, edges)[0] for name, each in values.items()}
    table = pd.DataFrame(counts, index=pd.Index([float(f"{middle:.3g}") for middle in middles], name=axis))
    traces = [
        go.Bar(
            x=middles.tolist(), y=count.tolist(), name=escape(name), marker={"color": COLOURS[n % len(COLOURS)]},
            hovertemplate="%{x:.3g}<br>%{y}",
        )
        for n, (name, count) in enumerate(counts.items())
    ]  # fmt: skip
    said = "".join(f"; {name}: {value:.3g}" for name, value in marks.items())
    plot = Plot(traces, table, title + said)
    for name, value in marks.items():
        plot.add_vline(value, line={"dash": "dash", "color": GREY}, annotation_text=escape(name), annotation_x=value)
    plot.update_layout(bargap=0.05)
    plot.update_xaxes(title=escape(axis))
    plot.update_yaxes(title="how many")
    return plot


def heat(table: pd.DataFrame, title: str, axis: str, centre: float | None = None) -> Plot:
    """A cell for every value, rows from the top down; `axis` says what the colour stands for. NaN is left empty.

    Blue, stronger for larger values: from 0 where none is negative, else from the lowest. With `centre` (1 for a ratio,
    0 for a difference) orange below it and blue above it, equally strong at equal distance. RequestError for a table
    without any value.
    """
    values = table.to_numpy(float)
    seen = values[np.isfinite(values)]
    if not seen.size:
        raise RequestError(f"{title}: there is no value to show.")
    low, high = min(0.0, float(seen.min())), float(seen.max())
    scale = _ramp(BLUE, 0, 1)
    if centre is not None:
        reach = float(np.abs(seen - centre).max())
        low, high = centre - reach, centre + reach
        scale = [*_ramp(ORANGE, 0.5, 0)[::-1], *_ramp(BLUE, 0.5, 1)]
    cells = go.Heatmap(
        x=_names(table.columns), y=_names(table.index), z=[[_short(value) for value in row] for row in values],
        zmin=low, zmax=high if high > low else low + 1, colorscale=scale, xgap=1, ygap=1, hoverongaps=False,
        hovertemplate="%{y}, %{x}<br>%{z:.3g}<extra></extra>",
        colorbar={"title": {"text": escape(axis), "side": "right"}, "outlinewidth": 0, "thickness": 14},
    )  # fmt: skip
    plot = Plot([cells], table, title)
    plot.update_layout(height=min(900, max(220, 150 + 22 * len(table))))
    plot.update_xaxes(type="category", title=escape(_said(table.columns)))
    plot.update_yaxes(type="category", title=escape(_said(table.index)), autorange="reversed", showgrid=False)
    return plot


def _marks(values: np.ndarray) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the smallest of the values to above the largest."""
    if not values.size:
        return []
    powers = range(int(np.floor(np.log10(values.min()))), int(np.ceil(np.log10(values.max()))) + 1)
    return [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]


def _ramp(colour: str, clear: float, solid: float) -> list[list]:
    return [[clear, f"rgba({colour}, {FAINT})"], [solid, f"rgba({colour}, 1)"]]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _names(index: pd.Index) -> list[str]:
    """A name for each place; with its number where names repeat, because to plotly equal names are one place."""
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in index]
    if len(set(names)) < len(names):
        names = [f"{place} {name}" for place, name in enumerate(names)]
    return [escape(name) for name in names]


def _said(index: pd.Index) -> str:
    return ", ".join(str(name) for name in index.names if name is not None)
