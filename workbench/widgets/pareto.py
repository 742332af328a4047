"""The Pareto plot: what each choice costs against what it saves, and which choices nothing else beats on both."""

from collections.abc import Collection
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.widgets.figures import COLOURS, GREY, Plot

FRONTIER = "on the frontier"
FEW = 12  # points that can all carry their names


def frontier(table: pd.DataFrame) -> pd.Series:
    """Whether each row is on the frontier of the two columns, less being better: no other is as good in both and better
    in one."""
    values = table.to_numpy(float)
    no_worse = (values[:, None] <= values[None]).all(-1)
    better = (values[:, None] < values[None]).any(-1)
    return pd.Series(~(no_worse & better).any(0), index=table.index, name=FRONTIER)


def pareto(table: pd.DataFrame, title: str, mark: Collection[str] = ()) -> Plot:
    """A point for each row of a table of two columns, less being better in both: the first across, the second up and
    logarithmic.

    The frontier is a line of steps: between two choices there is none. Written beside their points are the names in
    `mark`; without it all where they are few, else those of the frontier; any is shown when pointed at. A zero, which a
    logarithm has no place for, is drawn below all others and says so. The text alternative is the table, with a column
    that says which are on the frontier. RequestError for a table that has not two columns of finite numbers, none of
    them negative, or no row.
    """
    values = table.to_numpy(float) if table.shape[1] == 2 else np.array([np.nan])
    if not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise RequestError(f"{title}: a Pareto plot wants rows of two numbers, finite and from 0 on.")
    across, up = (escape(str(column)) for column in table.columns)
    positive = values[values[:, 1] > 0, 1]
    lowest = float(positive.min()) / 2 if positive.size else 1.0
    best = frontier(table)
    names = [escape(str(name)) + ("" if y else " (0)") for name, y in zip(table.index, values[:, 1], strict=True)]
    shown = [str(name) in mark if mark else len(table) <= FEW or said for name, said in best.items()]

    def points(chosen: pd.Series, name: str, position: str, **look) -> go.Scatter:
        places = sorted(np.flatnonzero(chosen), key=lambda place: tuple(values[place]))
        return go.Scatter(
            x=[float(values[place, 0]) for place in places],
            y=[max(lowest, float(values[place, 1])) for place in places],
            text=[names[place] if shown[place] else "" for place in places],
            customdata=[[names[place], float(f"{values[place, 1]:.3g}")] for place in places],
            hovertemplate=f"%{{customdata[0]}}<br>{across}: %{{x:,.4g}}<br>{up}: %{{customdata[1]}}<extra></extra>",
            name=name, textposition=position, cliponaxis=False, **look,
        )  # fmt: skip

    traces = [
        points(~best, "beaten", "top right", mode="markers+text", marker={"color": GREY, "symbol": "circle-open"}),
        points(
            best, FRONTIER, "bottom left", mode="lines+markers+text", marker={"color": COLOURS[0], "size": 9},
            line={"color": COLOURS[0], "dash": "dot", "shape": "hv"},
        ),
    ]  # fmt: skip
    plot = Plot(traces, table.assign(**{FRONTIER: best.map({True: "yes", False: ""})}), title)
    plot.update_layout(height=420)
    low, high = float(values[:, 0].min()), float(values[:, 0].max())
    if low > high / 2:  # from 0 on there would be little to see; what is left of the points is for their names
        low, high = low - 0.4 * (high - low), high + 0.1 * (high - low)
    else:
        low, high = 0.0, 1.05 * high
    plot.update_xaxes(title=across, range=[low, high] if high > low else None)
    plot.update_yaxes(title=up, type="log", dtick=1, exponentformat="power")
    return plot
