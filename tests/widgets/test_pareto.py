"""The Pareto plot: who is on the frontier, and that the plot and its text say the same."""

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.widgets.pareto import FRONTIER, frontier, pareto


def table(points: dict[str, tuple[float, float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(points, orient="index", columns=["bytes", "KL"]).rename_axis("format")


FORMATS = table(
    {"wide": (10, 0.0), "odd": (8, 0.3), "middle": (6, 0.1), "small": (3, 0.5), "twin": (3, 0.5), "bad": (4, 0.6)}
)


def test_the_frontier_is_what_nothing_beats_on_both():
    assert frontier(FORMATS).tolist() == [True, False, True, True, True, False]


def test_as_good_in_one_and_better_in_the_other_is_enough_to_beat():
    assert frontier(table({"a": (1, 2.0), "b": (1, 1.0), "c": (2, 1.0)})).tolist() == [False, True, False]


def test_the_plot_draws_every_row_once_and_marks_the_frontier():
    plot = pareto(FORMATS, "formats")
    beaten, best = plot.data
    drawn = {row[0]: x for trace in plot.data for row, x in zip(trace.customdata, trace.x, strict=True)}
    assert drawn == {"wide (0)": 10, "odd": 8, "middle": 6, "small": 3, "twin": 3, "bad": 4}
    assert [row[0] for row in best.customdata] == ["small", "twin", "middle", "wide (0)"]
    assert list(best.x) == sorted(best.x) and best.name == FRONTIER and len(beaten.x) == 2
    assert plot.layout.yaxis.type == "log" and plot.layout.xaxis.title.text == "bytes"


def test_a_zero_is_drawn_below_all_others_and_says_so():
    best = pareto(FORMATS, "formats").data[1]
    place = [row[0] for row in best.customdata].index("wide (0)")
    assert 0 < best.y[place] < 0.1 and best.customdata[place][1] == 0


def test_many_points_show_the_names_of_the_frontier_or_those_marked():
    many = table({f"scheme {n}": (n, 1.0 + n) for n in range(20)} | {"best": (0, 0.5)})
    for mark, written in (((), ["best"]), (["scheme 3"], ["scheme 3"])):
        assert [text for trace in pareto(many, "schemes", mark).data for text in trace.text if text] == written


def test_the_text_says_which_are_on_the_frontier():
    bundle = pareto(FORMATS, "bytes < KL")._repr_mimebundle_()
    rows = {line.split()[0]: line for line in bundle["text/plain"].splitlines()[3:]}
    assert rows["middle"].endswith("yes") and not rows["odd"].endswith("yes")
    assert "bytes &lt; KL" in bundle["text/html"] and "<b>" not in bundle["text/html"]


@pytest.mark.parametrize(
    "wrong",
    [FORMATS.iloc[:0], FORMATS[["KL"]], FORMATS * np.nan, -FORMATS, FORMATS.assign(more=1)],
    ids=["no row", "one column", "nan", "negative", "three columns"],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(RequestError, match="Pareto"):
        pareto(wrong, "formats")
