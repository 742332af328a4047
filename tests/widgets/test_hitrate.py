"""The figure of hit rates: its lines are the curves of the traffic, and the store's mark is where the store was."""

import numpy as np
import offload
import pytest

from workbench.lens.capacity import belady
from workbench.traffic import Traffic
from workbench.widgets.hitrate import NAMES, OWN, hit_rate_figure


@pytest.fixture
def traffic():
    """Of a few prompts and many answers that favour some experts."""
    store, _ = offload.pages(layers=3, experts=13, chosen=3, slots=17, policy="lru")
    rng = np.random.default_rng()
    favour = rng.dirichlet(np.full(13, 0.5), 3) + 0.01
    favour /= favour.sum(1, keepdims=True)
    for tokens in (5, *[1] * 40, 3, *[1] * 20):
        for layer in store.layers:
            ids = [rng.choice(13, 3, replace=False, p=favour[layer - 1]) for _ in range(tokens)]
            offload.visit(store, layer, np.stack(ids))
    return Traffic.of(store)


def test_lines_are_the_curves_and_the_mark_is_the_store(traffic):
    figure, curve = hit_rate_figure(traffic), traffic.curve()
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces) == [*NAMES.values(), OWN] and set(NAMES) == set(curve.columns) - {"share"}
    for column, name in NAMES.items():
        assert list(traces[name].x) == curve.index.tolist() and list(traces[name].y) == curve[column].tolist()
        assert traces[name].mode == "lines"
    mark = traces[OWN]
    assert list(mark.x) == [traffic.slots] == [17] and list(mark.y) == [traffic.hits.mean()]
    assert mark.mode == "markers", "one point has no line"
    assert mark.y[0] <= belady(traffic.accesses, 17).mean(), "nothing was read ahead, so the perfect cache is above it"
    others = {trace.line.color for trace in figure.data[:-2]}
    assert traces["chance"].line.color not in others and traces["chance"].line.dash == "dash"


def test_pointing_at_a_line_says_slots_share_and_rate(traffic):
    figure, curve = hit_rate_figure(traffic), traffic.curve()
    for trace in figure.data[:-1]:
        assert list(trace.customdata)[-1] == "39<br>1 of all" and len(trace.customdata) == len(curve)
        assert "%{customdata} slots" in trace.hovertemplate and "%{y:.1%}" in trace.hovertemplate
    assert list(figure.layout.xaxis.tickvals) == curve.index.tolist()
    low, high = figure.layout.yaxis.range
    assert low <= min(min(trace.y) for trace in figure.data) and high >= 1


def test_the_text_alternative_is_the_table(traffic):
    bundle = hit_rate_figure(traffic)._repr_mimebundle_()
    curve = traffic.curve()
    for text in (*NAMES.values(), f"this store: {traffic.hits.mean():.1%} of them with 17"):
        assert text in bundle["text/plain"] and text in bundle["text/html"]
    assert f"{len(traffic.hits):,} accesses to 39 experts" in bundle["text/plain"]
    assert f"<td>{curve['belady'].iloc[1]:.3g}</td>" in bundle["text/html"]
