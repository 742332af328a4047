"""Answers under edits: the same numbers as a model with these edits gives, and nulls for what is found."""

import numpy as np
import pytest
import torch

from workbench.editing import Editing
from workbench.edits import Ablate, Force, Scale, TopK
from workbench.errors import RequestError
from workbench.lens.answers import Answers
from workbench.lens.null import alike, correlation

PAIRS = [([1, 5, 9, 2], [7, 3]), ([1, 8], [4, 4, 6, 3, 2]), ([1, 2, 3, 4, 5, 6], [9])]


@pytest.fixture(scope="module")
def answers(model):
    return Answers(model("v2"), PAIRS)


@pytest.mark.parametrize("edits", [(), (Ablate(None, (0, 3)),), (TopK(None, 1), Scale("attn.out", 0.5, layer=0))])
def test_each_number_is_that_of_the_text_read_alone(answers, edits):
    """The batch is padded; nothing of that may be seen."""
    model, found = answers.model, answers.under(edits)
    for number, (question, answer) in enumerate(PAIRS):
        tokens = torch.tensor([[*question, *answer]])
        with torch.inference_mode():
            before, after = (
                model(tokens, probe=Editing(each, model.config))[0].log_softmax(-1) for each in ((), edits)
            )
        places = torch.arange(len(question) - 1, len(tokens[0]) - 1)
        target = torch.tensor(answer)
        row = found.loc[number]
        nats = -after[places, target].mean()
        assert row["nats"] == pytest.approx(float(nats), abs=1e-5)
        assert row["change"] == pytest.approx(float(nats + before[places, target].mean()), abs=1e-5)
        kl = (before.exp() * (before - after)).sum(-1)[places].mean()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-5)
        assert row["same"] == pytest.approx(float((before.argmax(-1) == after.argmax(-1))[places].float().mean()))
        assert row["exact"] == bool((after.argmax(-1)[places] == target).all())


def test_without_edits_nothing_changes(answers):
    found = answers.under()
    assert (found[["change", "kl"]] == 0).all().all() and (found["same"] == 1).all()


def test_an_answer_the_model_would_give_is_exact(model):
    tokens = [1, 5, 9, 2]
    for _ in range(3):
        with torch.inference_mode():
            tokens.append(int(model("v2")(torch.tensor([tokens]))[0, -1].argmax()))
    other = [*tokens[4:6], (tokens[6] + 1) % 100]
    found = Answers(model("v2"), [(tokens[:4], tokens[4:]), (tokens[:4], other)]).under()
    assert found["exact"].tolist() == [True, False]


def test_an_edit_of_one_phase_meets_only_its_tokens(answers):
    """What is done to the prompt changes the first token of an answer; what is done to the answer cannot."""
    short = Answers(answers.model, [([1, 5, 9, 2], [7])])
    assert short.under([Ablate(None, (0, 1, 2, 8), phase="prefill")])["kl"].item() > 1e-4
    assert short.under([Ablate(None, (0, 1, 2, 8), phase="decode")])["kl"].item() < 1e-6


def test_use_counts_every_token_once_and_no_padding(answers):
    use, k = answers.use(), answers.model.config.num_experts_per_tok
    assert use.sum(axis=1).tolist() == pytest.approx([k] * len(use))
    assert (answers.use([Ablate(None, (2,))])[2] == 0).all()
    assert (answers.use([Force(None, (2,))])[2] == 1).all()


def test_what_cannot_be_is_refused(answers):
    for pairs in ([], [([], [1])], [([1], [])]):
        with pytest.raises(RequestError, match="none of them empty"):
            Answers(answers.model, pairs)
    with pytest.raises(RequestError, match="no token met .*positions 500"):
        answers.under([Ablate(None, (1,), positions=(500, 501))])
    with pytest.raises(RequestError, match="dense"):
        answers.under([Ablate(0, (1,))])


def test_rank_correlation_and_its_null():
    up = correlation([1, 2, 3, 4, 10, 30], [0, 5, 6, 7, 8, 9])
    assert up.observed == pytest.approx(1) and up.chance < 0.02 and abs(up.null_mean) < 0.1
    assert correlation([1, 2, 3], [9, 8, 1]).observed == pytest.approx(-1)
    ties = correlation([1, 1, 2, 3], [1, 2, 2, 3]).observed
    assert ties == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    random = np.random.default_rng(0)
    alarms = sum(correlation(*random.normal(size=(2, 12)), rounds=99, seed=n).chance <= 0.05 for n in range(200))
    assert 2 <= alarms <= 20  # 10 expected


@pytest.mark.parametrize("x", [[1, 2], [1, 1, 1], [1, 2, 3, 4]])
def test_no_correlation_where_there_is_no_order(x):
    with pytest.raises(RequestError):
        correlation(x, [1, 2, 3])


def test_sets_of_equal_weight():
    weights = np.random.default_rng(1).random(32)
    sets = alike(weights, [3, 17, 20], rounds=50)
    wanted = weights[[3, 17, 20]].sum()
    assert len(sets) == 50 and len(set(map(frozenset, sets))) > 40
    for each in sets:
        assert not {3, 17, 20} & set(each) and len(set(each)) == len(each) <= 8
        assert abs(weights[list(each)].sum() - wanted) <= 0.1 * wanted + 1e-9
    assert sets == alike(weights, [3, 17, 20], rounds=50)
    with pytest.raises(RequestError, match="choose fewer"):
        alike([9, 1, 1, 1], [0], rounds=5)
