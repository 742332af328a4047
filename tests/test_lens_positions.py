"""What a scheme keeps, what of a score is distance, and where two models part: against values known beforehand."""

import pytest
import torch

from workbench.config import Config
from workbench.errors import RequestError
from workbench.lens.distance import distance
from workbench.lens.drift import drift, nats
from workbench.lens.sampling import surprise
from workbench.lens.schemes import schemes


def test_schemes_agree_with_the_papers_tables():
    v2, lite = (schemes(Config.preset(name), 4) for name in ("v2", "v2-lite"))
    assert v2.loc["MLA", "in all layers"] == 34_560 and lite.loc["MLA", "in all layers"] == 15_552  # table 9
    assert lite.loc["MHA", "in all layers"] == 110_592
    assert v2.loc["MLA", "in a layer"] / v2.loc["MQA", "in a layer"] == 2.25  # GQA groups, section 2.1.4
    assert v2.loc["GQA, 4 groups", "in a layer"] == 4 * v2.loc["MQA", "in a layer"]
    assert v2.loc["MLA", "bytes"] == 69_120 and schemes(Config.preset("v2"), 1, 4).loc["MLA", "bytes"] == 138_240


@pytest.mark.parametrize("groups", [0, 3, 256])
def test_groups_must_divide_the_heads(groups):
    with pytest.raises(RequestError, match="divide the 128 heads"):
        schemes(Config.preset("v2"), groups)


def by_distance(queries: int, keys: int) -> torch.Tensor:
    return (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).clamp(min=0)


@pytest.mark.parametrize("queries", [12, 30])
def test_scores_of_distance_alone_are_explained_wholly(queries):
    values = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    scores = values[:, by_distance(queries, 30)]
    found = distance(scores)
    assert found["observed"].tolist() == pytest.approx([1, 1], abs=1e-9)
    assert (found["null"] < 0.3).all()


def test_what_the_softmax_does_not_see_changes_nothing():
    draw = torch.Generator().manual_seed(0)
    scores, constant = torch.randn(2, 40, 40, generator=draw), 9 * torch.randn(2, 40, 1, generator=draw)
    future = torch.ones(40, 40).triu(1).bool()
    plain, moved = distance(scores), distance((scores + constant).masked_fill(future, torch.nan))
    assert moved["observed"].tolist() == pytest.approx(plain["observed"].tolist(), abs=1e-6)


def test_scores_without_distance_do_not_pass_their_null():
    scores = torch.randn(64, 60, 60, generator=torch.Generator().manual_seed(0))
    found = distance(scores, rounds=20)
    off = (found["observed"] - found["null"]) / found["null_sd"]
    assert abs(off.mean()) < 0.5 and off.abs().max() < 6


def test_half_of_the_variance_is_found_to_be_half():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 300, generator=draw)[:, by_distance(300, 300)] + torch.randn(8, 300, 300, generator=draw)
    assert distance(scores, rounds=2)["observed"].mean() == pytest.approx(0.5, abs=0.05)


def test_a_head_whose_scores_do_not_vary_has_no_share():
    assert distance(torch.ones(1, 5, 5))["observed"].isna().all()


@pytest.mark.parametrize("shape", [(4, 5), (1, 6, 5), (1, 1, 1)])
def test_distance_refuses_what_is_no_table_of_scores(shape):
    with pytest.raises(RequestError, match="heads, queries, keys"):
        distance(torch.zeros(shape))


def test_drift_is_nothing_between_equals_and_counts_what_changed():
    right = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    assert drift(right, right)[["largest", "kl"]].to_numpy().sum() == 0 and drift(right, right)["same"].all()
    wrong = right.clone()
    wrong[1, 0] = 5.0
    found = drift(wrong, right)
    assert found["largest"].tolist() == [0, 5] and found["same"].tolist() == [True, False]
    p, q = right[1].softmax(-1), wrong[1].softmax(-1)
    assert found.loc[1, "kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_a_constant_on_all_logits_costs_nothing():
    right = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = drift(right + 3, right)
    assert found["kl"].max() < 1e-9 and found["same"].all() and found["largest"].min() == pytest.approx(3, abs=1e-5)


def test_drift_refuses_unequal_texts():
    with pytest.raises(RequestError, match="alike"):
        drift(torch.zeros(3, 9), torch.zeros(4, 9))


def test_nats_are_those_of_the_whole_text():
    logits, tokens = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), [3, 1, 4, 1, 5, 8]
    found = nats(logits, tokens)
    assert found.index.tolist() == [1, 2, 3, 4, 5] and found.sum() == pytest.approx(surprise(logits, tokens, 1).nats)
    assert found.loc[3:].sum() == pytest.approx(surprise(logits, tokens, 3).nats)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3]])
def test_nats_refuse_a_text_that_does_not_fit(tokens):
    with pytest.raises(RequestError, match="two tokens or more"):
        nats(torch.zeros(1 if len(tokens) == 1 else 2, 9), tokens)
