"""Every picture can also be read: as a table, as text, and without colours."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.widgets.figures import COLUMNS, ROWS, bars, heat, histogram, lines
from workbench.widgets.strip import Strip

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def table():
    tokens = pd.Index(["the", "<b>", "the"], name="token")
    return pd.DataFrame({"T = 1": [0.5, 0.25, 0.125], "T = 2": [0.4, 0.3, 0.2]}, index=tokens)


@pytest.mark.parametrize("draw", [bars, lines, heat])
def test_a_plot_is_also_its_table(table, draw):
    page = draw(table, "Two temperatures", "probability")._repr_mimebundle_()
    assert set(page) == {PLOTLY, "text/html", "text/plain"}
    for text in (page["text/html"], page["text/plain"]):
        assert "Two temperatures" in text and "T = 2" in text and "0.125" in text
    assert "<b>" not in page["text/html"]


@pytest.mark.parametrize("draw", [bars, lines, heat])
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


def cells(*args, **options):
    """The heatmap and the layout of what `heat` draws, as the browser gets them."""
    page = heat(*args, **options)._repr_mimebundle_()[PLOTLY]
    return page["data"][0], page["layout"]


def test_a_heat_map_keeps_the_table_as_it_stands(table):
    data, layout = cells(table, "a < b", "p < 1")
    assert data["z"] == table.to_numpy().tolist()
    assert layout["yaxis"]["autorange"] == "reversed"  # the first row is on top
    assert data["y"] == ["0 the", "1 &lt;b&gt;", "2 the"] and data["x"] == ["T = 1", "T = 2"]
    assert data["colorbar"]["title"]["text"] == "p &lt; 1"


def test_numbers_that_name_rows_stay_names():
    data, layout = cells(pd.DataFrame([[1.0, 2.0]], index=pd.Index([3], name="layer"), columns=[10, 30]), "t", "a")
    assert (data["y"], data["x"]) == (["3"], ["10", "30"])
    assert (
        layout["xaxis"]["type"] == layout["yaxis"]["type"] == "category" and layout["yaxis"]["title"]["text"] == "layer"
    )


def test_names_of_several_parts_are_said_in_full():
    index = pd.MultiIndex.from_product([["en", "fr"], [1, 2]], names=["label", "layer"])
    data, layout = cells(pd.DataFrame({"x": [1.0, 2, 3, 4]}, index=index), "t", "a")
    assert data["y"] == ["en 1", "en 2", "fr 1", "fr 2"] and layout["yaxis"]["title"]["text"] == "label, layer"


@pytest.mark.parametrize(
    ("values", "centre", "scale"),
    [
        ([0.25, 0.5], None, (0, 0.5)),
        ([-1.0, 3.0], None, (-1, 3)),
        ([0.5, 3.0], 1, (-1, 3)),
        ([0.0, 0.0], None, (0, 1)),
    ],
    ids="positive negative centre zeros".split(),
)
def test_the_colours_of_a_heat_map_begin_where_it_says(values, centre, scale):
    data, _ = cells(pd.DataFrame({"x": values}), "t", "a", centre=centre)
    assert (data["zmin"], data["zmax"]) == scale


def test_what_was_not_measured_is_not_zero():
    data, _ = cells(pd.DataFrame({"x": [np.nan, 0.0, np.inf]}), "t", "a")
    assert data["z"] == [[None], [0.0], [None]]
    assert opacity(data["colorscale"][0][1]) > 0  # zero is seen, and nothing is not
    with pytest.raises(RequestError, match="no value to show"):
        heat(pd.DataFrame({"x": [np.nan]}), "t", "a")


def test_a_large_heat_map_does_not_fill_the_notebook():
    rng = np.random.default_rng(0)
    page = heat(pd.DataFrame(rng.random((60, 160))), "V2", "share")._repr_mimebundle_()
    assert len(json.dumps(page)) < 250_000
    assert page["text/html"].count("<tr") <= ROWS + 4 and page["text/html"].count("<th>") <= COLUMNS + ROWS + 4


def opacity(colour):
    return float(re.fullmatch(r"rgba\(.*, ([\d.]+)\)", colour)[1])


def lightness(colour, page):
    """CIE L* of an rgba colour on a page of this grey."""
    *rgb, alpha = map(float, re.findall(r"[\d.]+", colour))
    linear = [((c + 14.025) / 269.025) ** 2.4 for c in (alpha * c + (1 - alpha) * page for c in rgb)]
    return 116 * (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]) ** (1 / 3) - 16


@pytest.mark.parametrize("page", [255, 17], ids=["light", "dark"])
@pytest.mark.parametrize("side", [0, -1], ids=["orange", "blue"])
def test_equal_steps_look_equal_on_a_light_and_on_a_dark_page(page, side):
    scale = cells(pd.DataFrame({"x": [-1.0, 1.0]}), "t", "a", centre=0)[0]["colorscale"]
    ends = scale[side][1], scale[2 if side else 1][1]
    strong, faint = (opacity(colour) for colour in ends)
    shades = [ends[0].replace(f" {strong:g})", f" {alpha})") for alpha in np.linspace(faint, strong, 9)]
    steps = np.diff([lightness(shade, page) for shade in shades])
    assert (np.sign(steps) == np.sign(steps[0])).all() and np.abs(steps).max() < 1.5 * np.abs(steps).min()
    assert abs(steps.sum()) > 35  # of 100 from black to white


def test_marks_of_a_logarithmic_axis_are_said_in_full():
    axis = lines(pd.DataFrame({"x": [0.03, 40.0]}, index=[1, 10]), "t", "a", log=True).layout.yaxis
    named = dict(zip(axis.tickvals, axis.ticktext))
    assert named[0.02] == "0.02" and named[50.0] == "50" and min(named) <= 0.03 and max(named) >= 40


def test_the_legend_says_what_the_colours_are():
    layers = pd.DataFrame({1: [0.5], 2: [0.25]}).rename_axis(columns="layer")
    assert bars(layers, "t", "a").layout.legend.title.text == "layer"


def test_a_strip_shows_every_piece_in_a_box_of_its_own():
    html = Strip(["a", "<i>", "␣b"], shade=[0.0, 1.0, 0.5], label="surprise")._repr_html_()
    assert html.count("<code") == 3 and "&lt;i&gt;" in html and "<i>" not in html
    assert 'title="surprise 0.500"' in html
    assert repr(Strip(["a", "␣b"])) == "a | ␣b"


def test_a_strip_needs_a_shade_for_every_piece():
    with pytest.raises(RequestError, match="2 pieces need as many shades; got 1"):
        Strip(["a", "b"], shade=[0.5])


def test_a_histogram_counts_every_value_once_and_shows_the_mark():
    values = {"null": [0.0, 0.0, 0.1, 0.2], "other": [0.2, 0.4]}
    plot = histogram(values, "a < b", "bits", bins=5, marks={"observed": 1.0})
    page = plot._repr_mimebundle_()
    first, second = page[PLOTLY]["data"]
    assert first["y"] == [3, 1, 0, 0, 0] and second["y"] == [0, 1, 1, 0, 0]  # 0 to 1, as the mark is at 1
    assert page[PLOTLY]["layout"]["shapes"][0]["x0"] == 1.0
    assert "observed: 1" in page["text/plain"] and "null" in page["text/html"] and "a &lt; b" in page["text/html"]


def test_a_histogram_of_one_value_is_one_bar():
    [bar] = histogram({"null": [2.0, 2.0]}, "Twice", "bits", bins=3).data
    assert sum(bar.y) == 2


def test_a_histogram_may_be_given_its_range():
    [bar] = histogram({"p": [0.04, 0.06, 0.96, 1.0]}, "p", "p", bins=20, span=(0, 1)).data
    assert list(bar.y)[:2] == [1, 1] and bar.y[-1] == 2 and bar.x[0] == pytest.approx(0.025)
