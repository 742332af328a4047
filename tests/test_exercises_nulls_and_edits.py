"""The checks of the exercises on nulls and on edits accept what is right and name what is wrong."""

import numpy as np
import pytest

from workbench.edits import Ablate, Bias
from workbench.exercises import check_permutation_p, check_without_group


def p_value(
    shuffle=lambda random, reads, text, label: (reads, random.permutation(label)),
    side=abs,
    reached=lambda a, b: a >= b,
    share=lambda hits, rounds: (1 + hits) / (1 + rounds),
):
    """A solution of `permutation_p` with one of its parts as given."""

    def permutation_p(reads, text, label, rounds):
        random = np.random.default_rng(3)

        def difference(reads, label):
            own = label[text]
            return side(reads[own == 1].mean() - reads[own == 0].mean())

        observed = difference(reads, label)
        null = [difference(*shuffle(random, reads, text, label)) for _ in range(rounds)]
        return share(sum(reached(value, observed) for value in null), rounds)

    return permutation_p


def by_hand(reads, text, label, rounds):
    """No numpy but for the shuffle, counts instead of means."""
    random, counts = np.random.default_rng(8), np.bincount(text, reads).tolist()

    def apart(label):
        first = sum(count for count, own in zip(counts, label) if own)
        size = sum(label) * len(reads) / len(label)
        return abs(first / size - (sum(counts) - first) / (len(reads) - size))

    observed, hits = apart(label.tolist()), 1
    for _ in range(rounds):
        hits += apart(random.permutation(label).tolist()) >= observed
    return hits / (rounds + 1)


@pytest.mark.parametrize("right", [p_value(), by_hand], ids=["numpy", "counts"])
def test_a_permutation_test_may_be_written_in_any_way(right):
    feedback = check_permutation_p(right)
    assert feedback.passed, feedback


def shuffled_tokens(random, reads, text, label):
    return random.permutation(reads), label


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda *given: None, "returned nothing"),
        (lambda *given: "0.05", "is a number from 0 to 1"),
        (lambda *given: float("nan"), "is a number from 0 to 1"),
        (lambda *given: 1.5, "is a number from 0 to 1"),
        (p_value(share=lambda hits, rounds: hits / rounds), r"(1 + hits) / (1 + rounds)"),
        (p_value(share=lambda hits, rounds: (1 + hits) / rounds), r"(1 + hits) / (1 + rounds)"),
        (lambda *given: 0.0, "nothing has a chance of 0"),
        (p_value(shuffled_tokens), "shuffling tokens"),
        (p_value(side=float), "one-sided"),
        (p_value(side=lambda value: -value), "one-sided"),
        (p_value(reached=lambda a, b: a > b), ">= instead of >"),
        (lambda reads, text, label, rounds: 1.0, "2 of the 20 ways"),
    ],
    ids="nothing text nan large no-one half-one zero tokens above below strict constant".split(),
)
def test_a_permutation_test_names_the_mistake(wrong, says):
    feedback = check_permutation_p(wrong)
    assert not feedback.passed and says in feedback.text


def test_a_permutation_test_that_forgets_itself_fails_also_where_something_was_hit():
    feedback = check_permutation_p(lambda reads, text, label, rounds: 0.1 if rounds == 1999 else 1.0)
    assert not feedback.passed and "Right so far: 3 of 5 cases." in feedback.text


def edits(experts, layer=None, phase="decode", **options):
    return lambda config, group: [Ablate(layer, experts(config, group), phase=phase, **options)]


def group_of(config, group):
    size = config.n_routed_experts // config.n_group
    return range(group * size, (group + 1) * size)


def one_by_one(config, group):
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    return [Ablate(layer, expert, phase="decode") for layer in layers for expert in group_of(config, group)]


@pytest.mark.parametrize("right", [edits(group_of), one_by_one], ids=["at once", "one by one"])
def test_a_group_may_be_removed_in_any_way(right):
    feedback = check_without_group(right)
    assert feedback.passed, feedback


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda config, group: None, "returned nothing"),
        (lambda config, group: Ablate(None, group_of(config, group), phase="decode"), "a list is expected"),
        (lambda config, group: [group], "A list of edits is expected"),
        (lambda config, group: [], "the list is empty"),
        (lambda config, group: [Bias(None, group, -9.0, phase="decode")], "is no Ablate"),
        (edits(group_of, layer=0), "layer 0 is dense"),
        (edits(group_of, phase=None), "the prompt is changed too"),
        (edits(group_of, phase="prefill"), "phase='decode'"),
        (edits(group_of, positions=(10, 20)), "positions are not needed"),
        (edits(group_of, layer=1), "layer 2 keeps all"),
        (edits(lambda config, group: group), "alone is gone"),
        (edits(lambda config, group: group_of(config, group)[:-1]), "stop of a range"),
        (edits(lambda config, group: range(group, config.n_routed_experts, config.n_group)), "stand side by side"),
        (edits(lambda config, group: range(4 * group, 4 * group + 4)), "Right so far: 2 of 4 cases."),
        (edits(lambda config, group: group_of(config, max(group - 1, 0))), "counted from 0"),
        (edits(lambda config, group: [7, 9]), "experts 7, 9 are gone, and 0 to 3 should be"),
        (edits(lambda config, group: [config.n_routed_experts]), "there is no expert"),
    ],
    ids="nothing bare int empty bias dense both prompt positions layer one stop strided pocket before odd none".split(),
)
def test_removing_a_group_names_the_mistake(wrong, says):
    feedback = check_without_group(wrong)
    assert not feedback.passed and says in feedback.text
