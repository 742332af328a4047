"""Every picture can also be read: as a table, as text, and without colours."""

import json

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.widgets.figures import bars, lines
from workbench.widgets.strip import Strip

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def table():
    tokens = pd.Index(["the", "<b>", "the"], name="token")
    return pd.DataFrame({"T = 1": [0.5, 0.25, 0.125], "T = 2": [0.4, 0.3, 0.2]}, index=tokens)


@pytest.mark.parametrize("draw", [bars, lines])
def test_a_plot_is_also_its_table(table, draw):
    page = draw(table, "Two temperatures", "probability")._repr_mimebundle_()
    assert set(page) == {PLOTLY, "text/html", "text/plain"}
    for text in (page["text/html"], page["text/plain"]):
        assert "Two temperatures" in text and "T = 2" in text and "0.125" in text
    assert "<b>" not in page["text/html"]


@pytest.mark.parametrize("draw", [bars, lines])
def test_a_plot_stays_small_in_the_notebook(table, draw):
    assert len(json.dumps(draw(table, "Two temperatures", "probability")._repr_mimebundle_())) < 20_000


def test_tokens_of_the_same_text_keep_their_own_bars(table):
    first = bars(table, "Two temperatures", "probability").data[0]
    assert list(first.x) == [0, 1, 2] and list(first.y) == [0.5, 0.25, 0.125]


def test_labels_are_not_markup(table):
    plot = bars(table, "a < b", "probability")
    assert plot.layout.xaxis.ticktext == ("the", "&lt;b&gt;", "the") and plot.layout.title.text == "a &lt; b"


def test_columns_differ_in_more_than_colour(table):
    assert len({trace.line.dash for trace in lines(table, "Two temperatures", "probability").data}) == 2


def test_a_strip_shows_every_piece_in_a_box_of_its_own():
    html = Strip(["a", "<i>", "␣b"], shade=[0.0, 1.0, 0.5], label="surprise")._repr_html_()
    assert html.count("<code") == 3 and "&lt;i&gt;" in html and "<i>" not in html
    assert 'title="surprise 0.500"' in html
    assert repr(Strip(["a", "␣b"])) == "a | ␣b"


def test_a_strip_needs_a_shade_for_every_piece():
    with pytest.raises(RequestError, match="2 pieces need as many shades; got 1"):
        Strip(["a", "b"], shade=[0.5])
