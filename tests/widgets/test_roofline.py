"""The roofline: lines that bend at the ridge, points that stand on the line they say, names that cross nothing."""

import random
from math import log10

import pytest

from workbench.errors import RequestError
from workbench.lens.roofline import CARDS, Card
from workbench.widgets.roofline import roofline_figure

CARDS = CARDS | {"this <CPU>": Card(17e9, 0.3e12)}


@pytest.fixture
def points():
    return {f"work {n}": 10 ** random.uniform(-1, 3.5) for n in range(7)}


def traces(figure):
    return {trace.name: trace for trace in figure.data if trace.name}


def test_lines_rise_to_the_ridge_and_stay(points):
    drawn = traces(roofline_figure(CARDS, points, "H100", "title"))
    for name, card in CARDS.items():
        line = drawn[name.replace("<", "&lt;").replace(">", "&gt;")]
        (x0, x1, x2), (y0, y1, y2) = line.x, line.y
        assert x1 == card.ridge and y2 == card.operations == pytest.approx(y1)
        assert y0 == pytest.approx(x0 * card.bandwidth)
        assert x0 <= min(points.values()) and x2 >= max(points.values())
    assert len({(trace.line.color, trace.line.dash) for trace in drawn.values() if trace.mode == "lines"}) == 4


@pytest.mark.parametrize("on", ["H200", "this <CPU>"])
def test_points_stand_on_the_line_of_their_card(points, on):
    [marks] = [trace for trace in roofline_figure(CARDS, points, on, "title").data if trace.mode == "markers"]
    for name, x, y in zip(marks.text, marks.x, marks.y, strict=True):
        assert x == points[name] and y == CARDS[on].rate(x)


def test_names_lie_below_all_lines_and_cross_no_stem(points):
    figure = roofline_figure(CARDS, points, "H100", "title")
    [names] = [trace for trace in figure.data if trace.mode == "text"]
    assert list(names.x) == sorted(points.values()) and list(names.y) == sorted(names.y), "farther right is higher"
    lowest = min(card.rate(min(points.values())) for card in CARDS.values())
    assert max(names.y) < lowest and len(set(names.y)) == len(points)
    bottom, top = figure.layout.yaxis.range
    assert bottom < log10(min(names.y)) and top > log10(max(card.operations for card in CARDS.values()))


def test_the_longest_name_has_room(points):
    short = roofline_figure(CARDS, points, "H100", "title").layout.xaxis.range[1]
    far = max(points, key=points.get)
    long = {f"{name} which goes on and on" if name == far else name: value for name, value in points.items()}
    assert roofline_figure(CARDS, long, "H100", "title").layout.xaxis.range[1] > short


def test_the_text_says_what_binds_where():
    bundle = roofline_figure(CARDS, {"attention": 242.0, "head": 1.0}, "H100", "a < b")._repr_mimebundle_()
    rows = {line.split()[0]: line.split()[1:] for line in bundle["text/plain"].splitlines()[3:]}
    assert rows["attention"] == ["242", "operations", "bytes", "operations", "operations"]
    assert rows["head"] == ["1"] + ["bytes"] * 4
    assert "a &lt; b" in bundle["text/html"] and "this &lt;CPU&gt;" in bundle["text/html"]


@pytest.mark.parametrize("wrong", [{}, {"a": 0.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(RequestError, match="operations a byte"):
        roofline_figure(CARDS, wrong, "H100", "title")


def test_an_unknown_card_is_refused():
    with pytest.raises(RequestError, match="H200"):
        roofline_figure(CARDS, {"a": 1.0}, "B200", "title")
