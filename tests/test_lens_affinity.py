"""Specialisation: found where it was put, not found where labels are shuffled, and never without its numbers."""

import math

import numpy as np
import pytest
from routings import choose, routed
from traces import random_trace

from workbench.errors import RequestError
from workbench.lens.affinity import affinity, shuffled, specialisation


def texts(seed, labels, *, tokens=40, layers=2, experts=16, k=2, effect=0.0, text=0.3, words=30, own_words=False):
    """A trace in which a token's experts depend on the token, a little on the text, and by `effect` on its label.

    own_words: the labels use the words of one vocabulary with different frequency.
    """
    rng = np.random.default_rng(seed)
    names = sorted(set(labels))
    by_word = rng.normal(size=(words, layers, experts))
    by_label = effect * rng.normal(size=(len(names), layers, experts))
    use = rng.dirichlet(np.full(words, 0.5), len(names))
    parts, ids = [], []
    for label in labels:
        n = names.index(label)
        word = rng.choice(words, tokens, p=use[n if own_words else 0])
        logits = by_word[word] + by_label[n] + text * rng.normal(size=(layers, experts))
        parts.append(choose(logits + rng.gumbel(size=(tokens, layers, experts)), k))
        ids.append(word)
    return routed(*parts, experts=experts, labels=labels, tokens=np.concatenate(ids))


THREE = ["en", "zh", "de"] * 5


def bits(counts):
    """Mutual information of a table, by its definition."""
    total, out = counts.sum(), 0.0
    for row, column in np.argwhere(counts):
        joint = counts[row, column] / total
        out += joint * math.log2(joint * total**2 / (counts[row].sum() * counts[:, column].sum()))
    return out


def table_of(trace, labels, layer):
    names = sorted(set(labels))
    counts = np.zeros((len(names), trace.n_experts))
    for sequence, row in zip(trace.tokens["sequence"], trace.experts[:, layer]):
        for expert in row[row >= 0]:
            counts[names.index(labels[sequence]), expert] += 1
    return counts


def test_the_two_scores_of_esft_by_hand():
    ids = [np.array([[[0, 1]], [[0, 2]]]), np.array([[[3, 0]]]), np.array([[[4, 5]], [[-1, -1]]])]
    gates = np.array([[[0.4, 0.1]], [[0.3, 0.2]], [[0.5, 0.2]], [[0.6, 0.1]], [[0, 0]]])
    trace = routed(*ids, gates=gates, labels=["a", "a", "b"])
    count, gate = affinity(trace), affinity(trace, by="gate")
    # first text: expert 0 has 2 of 4 slots; second: 1 of 2. Each text weighs the same, however long
    assert count.loc[("a", 1), [0, 1, 2, 3]].tolist() == [0.5, 0.125, 0.125, 0.25]
    assert gate.loc[("a", 1), [0, 3]].tolist() == pytest.approx([(0.35 + 0.2) / 2, 0.25])
    assert count.loc[("b", 1), [4, 5]].tolist() == [0.5, 0.5]  # the token that was never read does not count
    assert count.sum(axis=1).tolist() == [1, 1]


def test_the_observed_bits_are_the_definitions():
    trace = texts(0, THREE, effect=0.5)
    found = specialisation(trace, rounds=20)
    for layer in (0, 1):
        assert found.layers["observed"].iloc[layer] == pytest.approx(bits(table_of(trace, THREE, layer)))
    assert found.overall["observed"] == pytest.approx(found.layers["observed"].mean())
    assert found.most_bits == pytest.approx(math.log2(3)) and found.labels == {"de": 5, "en": 5, "zh": 5}


def test_the_null_is_the_labels_shuffled_over_texts():
    trace = texts(1, THREE)
    found = specialisation(trace, rounds=400)
    other = [bits(table_of(trace, shuffled(THREE, seed), 0)) for seed in range(60)]
    row = found.layers.iloc[0]
    assert row["null"] == pytest.approx(np.mean(other), abs=3 * np.std(other) / math.sqrt(60))
    assert row["null_low"] < np.mean(other) < row["null_high"]


def test_rates_of_experts_by_label():
    trace = texts(2, THREE, effect=0.8)
    table = specialisation(trace, rounds=100).experts
    row = table.sort_values("h").iloc[-1]
    rates = table_of(trace, THREE, row["layer"] - 1)[:, row["expert"]] / (5 * 40)
    assert row[["in de", "in en", "in zh"]].tolist() == pytest.approx(rates.tolist())
    assert row["difference"] == pytest.approx(rates.max() - rates.min())
    assert row["h"] == pytest.approx(2 * math.asin(math.sqrt(rates.max())) - 2 * math.asin(math.sqrt(rates.min())))
    assert row["most"] == ["de", "en", "zh"][rates.argmax()] and row["least"] == ["de", "en", "zh"][rates.argmin()]
    assert (table["q"] >= table["p"]).all() and len(table) == 2 * 16 and row["q"] < 0.05


def test_an_effect_that_was_put_there_is_found():
    found = specialisation(texts(3, THREE, effect=0.7))
    assert found.found and found.overall["p"] == pytest.approx(1 / 501)
    assert 0 < found.overall["low"] < found.overall["effect"] < found.overall["high"]
    assert found.verdict.startswith("An effect: the label says 0.") and "With q < 0.05: 2 of 2 layers" in found.verdict


def test_on_shuffled_labels_there_is_no_effect():
    """The share of false alarms over 200 shuffles of a trace with texts that differ: p at its level, findings below."""
    trace = texts(4, THREE, effect=0.7)
    found = [specialisation(trace, shuffled(THREE, seed), rounds=99, seed=seed) for seed in range(200)]
    alarms = sum(each.overall["p"] <= 0.05 for each in found)
    assert 2 <= alarms <= 20  # 10 expected; outside with probability 0.003
    assert sum(each.found for each in found) <= 10
    quiet = next(each for each in found if not each.found)
    assert quiet.verdict.startswith("No effect found: ") and f"p = {quiet.overall['p']:.3f}" in quiet.verdict
    per_expert = np.mean([(each.experts["p"] <= 0.05).mean() for each in found])
    assert per_expert < 0.06 and np.mean([(each.experts["q"] <= 0.05).any() for each in found]) <= 0.1


def test_labels_that_mean_nothing_in_texts_that_differ():
    """Here no shuffle of true labels, but none ever was: every trace is new."""
    alarms = sum(specialisation(texts(seed, THREE, text=0.5), rounds=99).overall["p"] <= 0.05 for seed in range(60))
    assert alarms <= 9  # 3 expected; more with probability 0.001


def test_shuffling_tokens_finds_what_is_not_there():
    quiet = texts(5, THREE, tokens=150, text=0.5)
    assert not specialisation(quiet).found
    wrong = specialisation(quiet, unit="token", rounds=100)
    assert wrong.found and wrong.verdict.endswith("p is far too small.")
    assert wrong.overall["observed"] == pytest.approx(specialisation(quiet, rounds=20).overall["observed"])


def test_labels_that_only_use_other_words():
    only_words = texts(6, THREE, own_words=True)
    assert specialisation(only_words).found
    known = specialisation(only_words, control="token")
    assert not known.found and known.overall["p"] > 0.05 and "its token being known" in known.verdict


def test_words_do_not_explain_what_the_label_does_to_them():
    assert specialisation(texts(7, THREE, own_words=True, effect=0.8), control="token").found


def test_the_control_never_alarms_more_than_it_may():
    labels = ["en", "zh"] * 5
    found = [specialisation(texts(n, labels, own_words=True), control="token", rounds=60) for n in range(60)]
    assert sum(each.overall["p"] <= 0.05 for each in found) <= 9


def test_the_control_by_hand():
    # token 0 under both labels: "a" sends it to expert 0, "b" to expert 1; token 9 is only b's and does not count
    ids = [np.array([[[e]]] * 2) for e in (0, 0, 1)] + [np.array([[[1]], [[5]]])]
    trace = routed(*ids, labels=["a", "a", "b", "b"], tokens=[0] * 7 + [9])
    found = specialisation(trace, control="token", rounds=20)
    # of 7 choices 4 are expert 0: KL((1, 0) || (4/7, 3/7)) for 4 of them, KL((0, 1) || the same) for 3
    assert found.overall["observed"] == pytest.approx((4 * math.log2(7 / 4) + 3 * math.log2(7 / 3)) / 7)


def test_a_label_can_be_left_out_and_the_headers_are_the_default():
    trace = texts(8, THREE)
    two = [label if label != "de" else None for label in THREE]
    assert specialisation(trace, two, rounds=20).labels == {"en": 5, "zh": 5}
    assert specialisation(trace, rounds=20).overall.equals(specialisation(trace, THREE, rounds=20).overall)


def test_the_same_seed_finds_the_same():
    trace = texts(9, THREE)
    a, b = (specialisation(trace, rounds=50, seed=3) for _ in range(2))
    assert a.layers.equals(b.layers) and a.experts.equals(b.experts) and a.verdict == b.verdict
    assert not a.layers.equals(specialisation(trace, rounds=50, seed=4).layers)


def test_few_texts_cannot_show_an_effect_and_the_verdict_says_so():
    found = specialisation(texts(10, ["a", "a", "b", "b"], effect=3.0))
    assert found.least_p == pytest.approx(1 / 3)  # three ways to part four texts in two pairs
    assert found.overall["p"] >= 0.25 and not found.found
    assert "None could be: with so few sequences or shuffles p is never below 0.33" in found.verdict


@pytest.mark.parametrize(
    "labels, message",
    [
        (["a", "b", "b", "c", "c"], r"two labels or more, each of two sequences or more; there are: a \(1\), b \(2\)"),
        (["a"] * 5, r"there are: a \(5\)"),
        ([None] * 5, "no token of a sequence with a label was read"),
        (["a", "b"], "2 labels for 5 sequences"),
        (None, "sequence 0 has no label in the trace"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(labels, message):
    trace = routed(*[np.zeros((3, 1, 1), int)] * 5)
    with pytest.raises(RequestError, match=message):
        specialisation(trace, labels)


def test_settings_that_are_refused():
    trace = texts(11, THREE, tokens=5)
    for settings in ({"unit": "word"}, {"control": "position"}, {"rounds": 1}, {"phase": "answer"}):
        with pytest.raises(RequestError, match=next(iter(settings))):
            specialisation(trace, **settings)
    with pytest.raises(RequestError, match="control='token' compares texts"):
        specialisation(trace, unit="token", control="token")
    with pytest.raises(RequestError, match="by must be"):
        affinity(trace, by="share")
    apart = routed(*[np.zeros((2, 1, 1), int)] * 4, labels=list("aabb"), tokens=range(8))
    with pytest.raises(RequestError, match="occurs under two labels"):
        specialisation(apart, control="token")


def test_texts_that_were_never_read_do_not_count():
    unread = np.full((3, 1, 2), -1)
    trace = routed(*[np.array([[[0, 1]]] * 3)] * 4, unread, labels=list("aabbb"))
    assert specialisation(trace, rounds=20).labels == {"a": 2, "b": 2}


def test_experts_that_never_differ_give_numbers_and_no_effect():
    same = routed(*[np.array([[[0, 1]]] * 3)] * 6, labels=list("aaabbb"))
    found = specialisation(same, rounds=30)
    assert found.overall[["observed", "effect", "effect_sd"]].tolist() == [0, 0, 0] and found.overall["p"] == 1
    assert not found.found and not found.experts.isna().any().any() and not found.layers.isna().any().any()


def test_a_trace_with_edits_and_unread_tokens():
    trace = random_trace(lengths=(30, 25, 40, 20), k=3)
    found = specialisation(trace, ["a", "b", "a", "b"], rounds=20, phase="decode")
    assert list(found.layers.index) == [1, 2, 4] and not found.layers.isna().any().any()


def test_the_null_can_be_drawn():
    found = specialisation(texts(9, THREE, effect=0.3), rounds=60)
    assert found.shuffles.shape == (60,) and found.shuffles.mean() == pytest.approx(found.overall["null"])
    assert np.mean(found.shuffles >= found.overall["observed"]) < 0.05


def test_the_interval_of_h_is_that_of_the_two_labels():
    """Over many traces it holds the h that was put there, for an expert that was not picked for its h."""
    table = specialisation(texts(10, THREE, effect=0.7)).experts
    assert ((table["h_low"] < table["h"]) & (table["h"] < table["h_high"])).mean() > 0.95
    labels = ["a", "b"] * 10
    found = [specialisation(texts(seed, labels, effect=0.0), rounds=99).experts for seed in range(30)]
    # h of two labels that do not differ: 0 is outside as seldom as such an interval is wrong
    outside = np.mean([(each["h_low"] > 0).mean() for each in found])
    assert outside < 0.12
