"""Finished plots from tables, each with the table as its text alternative. Drawn offline by JupyterLab."""

import json
from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito: told apart by every eye
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#777777"  # reads on a light and on a dark page


class Plot(go.Figure):
    """A plotly figure that is also its table, for screen readers, GitHub, and notebooks opened without plotly."""

    def __init__(self, traces: Sequence[go.Bar | go.Scatter], table: pd.DataFrame, title: str) -> None:
        super().__init__(list(traces))
        self._table, self._heading = table, title
        self.update_layout(
            template="none",
            title={"text": escape(title), "x": 0, "xanchor": "left"},
            font={"color": GREY, "size": 13},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            height=360,
            margin={"l": 60, "r": 20, "t": 60, "b": 70},
            legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
            showlegend=len(table.columns) > 1,
        )
        self.update_xaxes(automargin=True, showgrid=False, zeroline=False)
        self.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.5)")

    _ipython_display_ = None  # or plotly would show its own form, of 5 MB in some front ends, without the table

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **kwargs) -> dict:
        table = self._table.to_html(float_format="{:.3g}".format)
        return {
            "application/vnd.plotly.v1+json": json.loads(self.to_json()) | {"config": {"displaylogo": False}},
            "text/html": f"<figure><figcaption>{escape(self._heading)}</figcaption>{table}</figure>",
            "text/plain": f"{self._heading}\n{self._table.to_string(float_format='{:.3g}'.format)}",
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
        plot.update_yaxes(type="log", dtick="D2")  # marks at 1, 2 and 5
    return plot
