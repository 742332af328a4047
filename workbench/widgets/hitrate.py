"""Hit rates of a cache of experts at every size, beside the best there can be and beside chance: a finished plot."""

from html import escape

import plotly.graph_objects as go

from workbench.traffic import Traffic
from workbench.widgets.figures import COLOURS, GREY, Plot, lines

NAMES = {  # column of Traffic.curve: what it is called
    "belady": "perfect cache",
    "lru": "least recently used",
    "lfu": "least frequently used",
    "blended": "blended",
    "static": "best fixed set",
    "random": "chance",
}
OWN = "this store"


def hit_rate_figure(traffic: Traffic) -> Plot:
    """Share of the accesses that hit, over slots, a line a policy; and where the store really was, at its slots.

    All count the same accesses, those of prompts too. What the store had read ahead is no hit of its, see Traffic.of.
    The text alternative is the table.
    """
    curve, own = traffic.curve(), float(traffic.hits.mean())
    table = curve[list(NAMES)].rename(columns=NAMES).rename_axis(index="slots", columns="policy")
    count = f"{len(traffic.hits):,} accesses to {traffic.accesses.blocks:,} experts"
    title = f"Hit rate over slots, {count}; {OWN}: {own:.1%} of them with {traffic.slots:,}"
    plot = lines(table, title, "share of accesses that hit")
    ends = [f"{capacity:,}<br>{share:.3g} of all" for capacity, share in curve["share"].items()]
    for trace in plot.data:
        chance = trace.name == NAMES["random"]
        trace.update(mode="lines", customdata=ends, hovertemplate="%{customdata} slots<br>%{y:.1%}")
        if chance:
            trace.line.update(color=GREY, dash="dash")
    plot.add_trace(
        go.Scatter(
            x=[traffic.slots], y=[own], name=escape(OWN), mode="markers",
            marker={"color": COLOURS[5], "size": 12, "symbol": "star"}, hovertemplate="%{x:,} slots<br>%{y:.1%}",
        )
    )  # fmt: skip
    plot.update_xaxes(type="log", tickvals=table.index.tolist(), ticktext=[f"{n:,}" for n in table.index])
    plot.update_yaxes(range=[0, 1.03], tickformat=".0%")
    beside = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}  # seven do not fit above
    plot.update_layout(height=420, legend=beside)
    return plot
