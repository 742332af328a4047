"""Both forms of attention are really run and timed, and the count beside them is the model's own."""

import pytest
import torch

from workbench.benchmarks.forms import forms
from workbench.errors import RequestError
from workbench.model import absorbing_is_cheaper
from workbench.recorder import Recorder


@pytest.fixture
def asked(model):
    small = model("v2")
    seen = Recorder("attn.q_content", "attn.q_rope", "attn.kv_latent", "attn.k_rope", layers=[0])
    small(torch.arange(20)[None] % small.config.vocab_size, probe=seen)
    rows = torch.cat([seen["attn.kv_latent", 0], seen["attn.k_rope", 0]], -1)
    return small.blocks[0].attention, seen["attn.q_content", 0], seen["attn.q_rope", 0], rows


def test_every_point_is_timed(asked):
    points = [(1, 20), (5, 20), (20, 20), (8, 8)]
    table = forms(*asked, points, repeats=3)
    assert list(table.index) == points and table.index.names == ["new", "context"]
    assert (table[["absorbed", "expanded"]] > 0).all().all() and table["won"].between(0, 1).all()
    config = asked[0].config
    cheaper = ["absorbed" if absorbing_is_cheaper(config, *point) else "expanded" for point in points]
    assert table["counted"].tolist() == cheaper


def test_the_last_queries_of_the_first_rows_are_asked(asked, monkeypatch):
    attention, content, position, rows = asked
    given = []
    form = attention.absorbed
    monkeypatch.setattr(attention, "absorbed", lambda *x: given.append(x) or form(*x))
    forms(attention, content, position, rows, [(3, 10)], repeats=1)
    assert len(given) == 2  # the first is not counted
    for found, wanted in zip(given[0], (content[:, 7:10], position[:, 7:10], rows[:, :10]), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("point", [(0, 4), (5, 4), (1, 21)])
def test_a_point_outside_the_recording_is_refused(asked, point):
    with pytest.raises(RequestError, match="cannot be cut from 20 tokens"):
        forms(*asked, [point])
