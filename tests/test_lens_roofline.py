"""What bounds a step: parts that add up to the parameters, and numbers that a reader can check by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.cache import LatentCache
from workbench.config import Config
from workbench.errors import RequestError
from workbench.lens import roofline
from workbench.lens.roofline import CARDS, Card, Work, calls, distinct, step, uniform

V2, LITE, POCKET = (Config.preset(name) for name in ("v2", "v2-lite", "pocket"))
all_shapes = pytest.mark.parametrize("config", [V2, LITE, POCKET], ids=lambda config: config.name)


@all_shapes
def test_one_token_reads_the_active_parameters(config):
    """All of them, but of an embedding of its own one row only."""
    of_words = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    read = step(config, each=1.0).loc["all", "weights"]
    assert read == pytest.approx(config.parameters().active - of_words, rel=1e-12)


@all_shapes
def test_a_batch_without_end_reads_all_parameters(config):
    read = step(config, config.vocab_size, each=1.0, distinct=config.n_routed_experts).loc["all", "weights"]
    assert read == pytest.approx(config.parameters().total, rel=1e-12)
    assert step(config, config.vocab_size, each=1.0).loc["all", "weights"] == pytest.approx(read, rel=1e-9)


@all_shapes
def test_each_token_computes_twice_what_it_reads_alone(config):
    """A multiplication and an addition a weight; norms have four operations a weight, an embedding has none."""
    table = step(config, each=1.0)
    rest = table.drop(["norms", "embedding", "all"])
    assert rest["operations"].to_numpy() == pytest.approx(2 * rest["weights"].to_numpy())
    assert table.loc["all"].drop("operations a byte").to_numpy() == pytest.approx(
        table.drop("all").sum().drop("operations a byte").to_numpy()
    )
    many = step(config, 7, new=3)
    assert many["operations"].to_numpy() == pytest.approx(21 * table["operations"].to_numpy())


@pytest.mark.parametrize(("config", "format", "expected"), [(V2, "bf16", 278_528 / 1_152), (V2, "q6", 278_528 / 436),
                                                            (LITE, "bf16", 34_816 / 1_152)])  # fmt: skip
def test_attention_has_so_many_operations_a_byte(config, format, expected):
    batch, context, new = np.random.default_rng().integers(1, 90, 3).tolist()
    one = roofline.attention(config, batch, context, format, new)
    assert one.intensity == pytest.approx(new * expected) and not one.weights
    assert one.cached == step(config, batch, context, format, new).loc["all", "cached"]


@pytest.mark.parametrize("format", ["bf16", "q6"])
def test_attention_reads_what_a_cache_holds(format):
    cache = LatentCache.for_model(POCKET, format=format)
    cache.reserve(128)
    assert roofline.attention(POCKET, 1, 128, format).cached == cache.nbytes


def test_the_uniform_null_is_what_chance_chooses():
    """Greedy and within groups: every expert is as likely as any other."""
    rng = np.random.default_rng()
    tokens, rounds = 5, 2000
    free = rng.random((tokens, rounds, 32)).argsort(-1)[..., :4]
    groups = rng.random((tokens, rounds, 8)).argsort(-1)[..., :3]
    within = (groups[..., None] * 4 + np.arange(4)).reshape(tokens, rounds, 12)
    grouped = np.take_along_axis(within, rng.random(within.shape).argsort(-1)[..., :4], -1)
    for ids in (free, grouped):
        assert distinct(ids) == pytest.approx(uniform(POCKET, tokens), rel=0.02)
    assert (
        uniform(V2, 1) == pytest.approx(6) and 156 < uniform(V2, 100) < 157 and uniform(V2, 2000) == pytest.approx(160)
    )


def test_distinct_experts_are_counted_once():
    ids = np.array([[[0, 1, 2], [5, -1, -1]], [[2, 1, 9], [5, 4, -1]]])  # two tokens, two layers
    assert distinct(ids) == (4 + 2) / 2
    assert distinct(torch.tensor(ids)) == 3 and distinct(np.full((4, 3, 2), -1)) == 0
    for wrong in (np.zeros(3), np.zeros((0, 4))):
        with pytest.raises(RequestError, match="ids"):
            distinct(wrong)


def test_experts_that_really_came_take_the_place_of_the_null():
    at = {"batch": 16, "each": 1.0}
    assert step(V2, **at, distinct=uniform(V2, 16)).equals(step(V2, **at))
    fewer = step(V2, **at, distinct=40)
    assert fewer.loc["routed experts", "weights"] == 40 * 59 * 3 * 5120 * 1536
    assert fewer.loc["all", "operations"] == step(V2, **at).loc["all", "operations"]


def test_a_model_without_experts_has_none_to_read():
    plain = replace(POCKET, n_routed_experts=None, n_shared_experts=None)
    table = step(plain, plain.vocab_size, each=1.0)
    assert not table.loc[["routed experts", "shared experts", "router"], "bytes"].any()
    assert table.loc["all", "weights"] == pytest.approx(plain.parameters().total)
    with pytest.raises(RequestError, match="no routed experts"):
        uniform(plain, 3)


def test_a_card_is_bound_by_bytes_below_its_ridge():
    card = Card(2e9, 6e9)
    assert card.ridge == 3 and card.rate(1) == 2e9 and card.rate(4) == 6e9
    assert card.seconds(4e9, 1) == 2 and card.seconds(1, 12e9) == 2
    assert Work(2.0, 2.0, 12.0).intensity == 3 and np.isnan(Work().intensity)
    assert {name: round(card.ridge) for name, card in CARDS.items()} == {"A100 80 GB": 153, "H100": 295, "H200": 206}


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"new": 0}, {"context": -1}])
def test_steps_that_are_none_are_refused(wrong):
    with pytest.raises(RequestError, match="1 or more"):
        step(V2, **wrong)


def test_calls_are_what_torch_is_asked_for():
    x = torch.ones(3)
    assert calls(lambda: None) == 0 and calls(lambda: [x + 1 for _ in range(5)]) == 5
    with torch.inference_mode():
        assert calls(lambda: (x * x).sum()) == 2
