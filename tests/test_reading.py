"""The experiments on reading count what they say they count. How fast it was is never asserted."""

from dataclasses import replace

import pytest

from workbench.benchmarks.reading import growth, reading
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.model import Model
from workbench.workbench import Workbench


@pytest.fixture(scope="module")
def bench(tokenizer, vocabulary):
    config = replace(Config.preset("pocket"), vocab_size=600, hidden_size=48, num_hidden_layers=2)
    return Workbench(Model(config, Random(config)), tokenizer, vocabulary, "small", "fp32")


def test_every_way_of_reading_reads_the_same_tokens(bench, monkeypatch):
    read = []
    forward = bench.model.forward
    monkeypatch.setattr(
        bench.model, "forward", lambda tokens, **how: read.append(tokens[0].tolist()) or forward(tokens, **how)
    )
    table = reading(bench, list(range(12)), at_once=(1, 5, 12), repeats=2)
    assert [len(chunk) for chunk in read] == ([1] * 12 + [5, 5, 2] + [12]) * 3  # one round is not counted
    assert sum(read, []) == list(range(12)) * 9
    assert table.index.tolist() == [1, 5, 12]
    assert ((table["fastest"] <= table["median"]) & (table["median"] <= table["slowest"])).all()


def test_growth_is_what_the_cache_holds(bench):
    table = growth(bench, list(range(100)), at_once=16)
    assert table.index.tolist() == [0, 16, 32, 48, 64, 80, 96, 100]
    block = 64 * bench.config.latent_width * 4 * bench.config.num_hidden_layers
    assert table["latent cache"].tolist() == [0] + [block] * 4 + [2 * block] * 3
