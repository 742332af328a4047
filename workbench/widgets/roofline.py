"""The roofline: how many operations a second a device allows, over how many operations work has for a byte."""

from collections.abc import Mapping
from html import escape
from math import isfinite, log10

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.lens.roofline import Card
from workbench.widgets.figures import COLOURS, DASHES, GREY, Plot

DECADE, LINE = 55, 19  # pixels of a factor of ten up the page, and of a line of text
ABOVE, BELOW, ACROSS = 90, 60, 620  # pixels around the plot, and of its width
LETTER, ASIDE = 7.2, 2.0  # pixels of a letter; how far lines go on beyond the outermost points, a factor
PREFIXES = {6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


def roofline_figure(cards: Mapping[str, Card], points: Mapping[str, float], on: str, title: str) -> Plot:
    """A line for each of the cards: bytes bind where it rises, operations where it is level.

    `points` are operations a byte of kinds of work by name. Each stands on the line of the card called `on`, and has
    its name below: the one farthest left lowest, so that no name crosses the stem of another. The text alternative is a
    row a point, with what binds it on each card. RequestError where there is nothing to draw, an intensity is not above
    0, or `on` is no card.
    """
    values = {name: float(value) for name, value in sorted(points.items(), key=lambda point: point[1])}
    if not values or not all(isfinite(value) and value > 0 for value in values.values()):
        raise RequestError(f"{title}: a roofline wants points of more than 0 operations a byte; got {dict(points)}.")
    if on not in cards:
        raise RequestError(f"{title}: points stand on one of {', '.join(cards)}; got {on!r}.")
    ridges = [card.ridge for card in cards.values()]
    low, high = min(*values.values(), *ridges) / ASIDE, max(*values.values(), *ridges) * ASIDE
    high = 10 ** max(log10(high), *(_end(name, log10(value), log10(low)) for name, value in values.items()))
    floor = log10(min(card.rate(min(values.values())) for card in cards.values()))  # names lie below all lines
    bottom = floor - (len(values) + 1) * LINE / DECADE
    top = log10(max(card.operations for card in cards.values())) + 0.2
    place = {name: 10 ** (floor - (len(values) - n) * LINE / DECADE) for n, name in enumerate(values)}

    plot = Plot([_stems(values, place, cards[on])], _table(cards, values), title)
    for n, (name, card) in enumerate(cards.items()):
        plot.add_trace(_line(name, card, low, high, n))
    plot.add_trace(_marks(values, cards[on], on))
    plot.add_trace(_names(values, place))
    plot.update_layout(
        height=round((top - bottom) * DECADE) + ABOVE + BELOW, margin={"t": ABOVE, "b": BELOW}, showlegend=True
    )
    plot.update_xaxes(type="log", title="operations a byte", range=[log10(low), log10(high)], dtick=1, tickformat=",")
    powers = [power for power in range(int(floor), int(top) + 1) if power >= floor]
    plot.update_yaxes(
        type="log", title="operations a second", range=[bottom, top], tickvals=[10.0**power for power in powers],
        ticktext=[_power(power) for power in powers],
    )  # fmt: skip
    return plot


def _end(name: str, at: float, left: float) -> float:
    """Where the page has to end, as a power of ten, so that a name that begins at `at` fits on it."""
    share = min(0.7, LETTER * (len(name) + 2) / ACROSS)
    return (at - share * left) / (1 - share)


def _line(name: str, card: Card, low: float, high: float, n: int) -> go.Scatter:
    across = [low, card.ridge, high]
    said = f"{card.bandwidth / 1e9:,.4g} GB/s, {card.operations / 1e12:,.3g} TFLOP/s; ridge at {card.ridge:,.3g}"
    return go.Scatter(
        x=across, y=[card.rate(one) for one in across], name=escape(name), mode="lines",
        line={"color": COLOURS[n % len(COLOURS)], "dash": DASHES[n % len(DASHES)]},
        text=[said] * 3, hovertemplate="%{text}",
    )  # fmt: skip


def _stems(values: Mapping[str, float], place: Mapping[str, float], card: Card) -> go.Scatter:
    across, up = [], []
    for name, value in values.items():
        across += [value, value, None]
        up += [place[name], card.rate(value), None]
    return go.Scatter(
        x=across, y=up, mode="lines", line={"color": GREY, "width": 1}, opacity=0.6, hoverinfo="skip", showlegend=False
    )


def _marks(values: Mapping[str, float], card: Card, on: str) -> go.Scatter:
    return go.Scatter(
        x=list(values.values()), y=[card.rate(value) for value in values.values()], name=f"at most, {escape(on)}",
        mode="markers", marker={"color": COLOURS[5], "size": 9}, text=[escape(name) for name in values],
        hovertemplate="%{text}<br>%{x:,.4g} operations a byte<br>at most %{y:.3s}FLOP/s<extra></extra>",
    )  # fmt: skip


def _names(values: Mapping[str, float], place: Mapping[str, float]) -> go.Scatter:
    return go.Scatter(
        x=list(values.values()), y=list(place.values()), mode="text", textposition="middle right",
        text=[f" {escape(name)}" for name in values], hoverinfo="skip", showlegend=False, cliponaxis=False,
    )  # fmt: skip


def _table(cards: Mapping[str, Card], values: Mapping[str, float]) -> pd.DataFrame:
    table = pd.DataFrame({"operations a byte": values})
    for name, card in cards.items():
        table[name] = ["bytes" if value < card.ridge else "operations" for value in values.values()]
    return table.rename_axis(index="work", columns="device")


def _power(power: int) -> str:
    """1 TFLOP/s for 12."""
    prefix = max((known for known in PREFIXES if known <= power), default=0)
    return f"{10 ** (power - prefix):,} {PREFIXES.get(prefix, '')}FLOP/s"
