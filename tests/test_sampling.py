"""Sampling: the transforms agree with Hugging Face's, the draw is honest, and every refusal says what is allowed."""

import math
import random
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workbench.errors import RequestError, WorkbenchError
from workbench.sampling import Dice, Sampling, StopStrings, sample

VOCAB = 300
PLAIN = {"temperature": 1.0, "top_p": 1.0}
SETTINGS = [
    PLAIN,
    {},
    {"temperature": 0.7},
    {"temperature": 2.5, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 40},
    {"temperature": 0.1, "top_p": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "repetition_penalty": 0.8},
]


def peaked(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def after(logits: torch.Tensor, sampling: Sampling, seen: list[int], draw: float = 0.5) -> list[float]:
    """The whole final distribution, as one choice reports it."""
    everything = Sampling(**{**vars(sampling), "alternatives": VOCAB})
    choice = sample(logits, everything, seen, draw)
    found = dict.fromkeys(range(VOCAB), math.nan) | {a.token: a.after for a in choice.alternatives}
    return [found[token] for token in range(VOCAB)]


def reference(logits: torch.Tensor, sampling: Sampling, seen: list[int]) -> torch.Tensor:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([seen]), logits[None].double())[0].softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["flat", "peaked", "steep"])
def test_the_distribution_is_the_one_of_transformers(settings, scale):
    sampling, seen = Sampling(**settings), [3, 5, 5, 299, 0, 17]
    for seed in range(4):
        logits = peaked(seed, scale)
        found = torch.tensor(after(logits, sampling, seen), dtype=torch.float64)
        torch.testing.assert_close(found, reference(logits, sampling, seen), atol=1e-9, rtol=1e-6)


def test_ties_with_the_kth_token_stay():
    logits = torch.zeros(VOCAB)
    logits[[7, 9, 11]] = 5.0
    assert [token for token, p in enumerate(after(logits, Sampling(**PLAIN, top_k=2), [])) if p] == [7, 9, 11]


def test_top_p_breaks_ties_in_order_of_token():
    logits = torch.full((VOCAB,), -50.0)
    logits[[7, 9, 11, 13]] = 0.0
    sampling = Sampling(temperature=1, top_p=0.5, alternatives=4)
    choice = sample(logits, sampling, [], 0.9)
    assert [(a.token, round(a.after, 9)) for a in choice.alternatives] == [(7, 0.5), (9, 0.5), (11, 0.0), (13, 0.0)]
    assert choice.token == 9


# The draw


def test_the_draw_walks_down_the_ranking():
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    picks = [sample(logits, Sampling(**PLAIN), [], draw).token for draw in (0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-53)]
    assert picks == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("settings", [PLAIN, {}, {"temperature": 1.0, "top_p": 1.0, "top_k": 3}], ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat", "peaked"])
def test_frequencies_follow_the_distribution(settings, scale):
    sampling, logits, draws = Sampling(**settings), peaked(1, scale), 2000
    counts = Counter(sample(logits, sampling, [], (n + 0.5) / draws).token for n in range(draws))
    for token, probability in enumerate(after(logits, sampling, [])):
        assert counts[token] / draws == pytest.approx(probability, abs=1.01 / draws)


def test_every_draw_falls_on_a_kept_token():
    for seed in range(20):
        logits = peaked(seed)
        for settings in SETTINGS:
            for draw in (0.0, 0.5, 1 - 2**-53):
                choice = sample(logits, Sampling(**settings), [1, 2], draw)
                assert 0 < choice.probability <= 1 + 1e-12


def test_greedy_takes_the_most_likely_token_whatever_the_draw():
    logits = peaked()
    for draw in (0.0, 0.999):
        choice = sample(logits, Sampling(temperature=0, top_k=5), [], draw)
        assert choice.token == logits.argmax()
        assert choice.probability == 1
        assert [a.after for a in choice.alternatives] == [1, 0, 0, 0, 0]


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(10)
    logits[[4, 8]] = 1.0
    choice = sample(logits, Sampling(temperature=0), [], 0.9)
    assert choice.token == 4
    assert [(a.token, a.after) for a in choice.alternatives[:2]] == [(4, 1), (8, 0)]


def test_greedy_obeys_the_repetition_penalty():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert sample(logits, Sampling(temperature=0, repetition_penalty=1.2), [0, 0], 0.5).token == 1


# What a choice reports


def test_logprob_and_entropy_are_the_models_own():
    logits = peaked()
    own = logits.double().log_softmax(-1)
    choice = sample(logits, Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.5), [1, 2], 0.7)
    assert choice.logprob == pytest.approx(float(own[choice.token]))
    assert choice.entropy == pytest.approx(float(-(own.exp() * own).sum()))


def test_alternatives_are_the_models_favourites_then_the_chosen_one():
    logits = peaked()
    own = logits.double().softmax(-1)
    choice = sample(logits, Sampling(temperature=3.0, top_p=1.0, alternatives=3), [], 0.99)
    favourites = own.argsort(descending=True)[:3].tolist()
    assert [a.token for a in choice.alternatives] == [*favourites, choice.token]
    assert [a.before for a in choice.alternatives] == pytest.approx(own[[*favourites, choice.token]].tolist())
    assert choice.alternatives[-1].after == choice.probability
    assert sample(logits, Sampling(alternatives=0), [], 0.5).alternatives == ()


def test_the_logits_are_left_as_they_were():
    logits = peaked()
    copy = logits.clone()
    sample(logits, Sampling(repetition_penalty=2.0), [1, 2, 3], 0.5)
    assert torch.equal(logits, copy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = peaked()
    logits[42] = bad
    with pytest.raises(WorkbenchError, match=r"1 of 300 logits are not finite \(token 42"):
        sample(logits, Sampling(), [], 0.5)


# Settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("alternatives", -1),
        ("seed", -1),
        ("seed", 1.5),
        ("stop", "end"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", None),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name} must be "):
        Sampling(**{name: value})


def test_a_list_of_stop_strings_is_as_good_as_a_tuple():
    assert Sampling(stop=["a", "b"]) == Sampling(stop=("a", "b"))


# Dice


def test_the_same_seed_rolls_the_same_numbers():
    one, other = Dice(7), Dice(7)
    assert [one.roll() for _ in range(5)] == [other.roll() for _ in range(5)]


def test_dice_without_a_seed_tell_which_one_they_took():
    dice = Dice()
    rolls = [dice.roll() for _ in range(3)]
    assert all(0 <= roll < 1 for roll in rolls)
    again = Dice(dice.seed)
    assert [again.roll() for _ in range(3)] == rolls


def test_dice_leave_the_global_random_state_alone():
    random.seed(1), torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1), torch.manual_seed(1)
    Dice().roll()
    assert (random.random(), torch.rand(1)) == expected


# Stop strings


def stopped(stops, pieces) -> tuple[str, bool]:
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        text, hit = watch.push(piece)
        shown += text
        if hit:
            return shown, True
    return shown + watch.flush(), False


def test_a_stop_string_ends_the_text_and_is_not_shown():
    assert stopped(["\n\nUser:"], ["Fine.", "\n", "\nUs", "er: and"]) == ("Fine.", True)


def test_what_might_be_a_stop_string_waits():
    watch = StopStrings(["END"])
    assert watch.push("the E") == ("the ", False)
    assert watch.push("N") == ("", False)
    assert watch.push("EMY") == ("ENEMY", False)
    assert watch.push("EN") == ("", False)
    assert watch.flush() == "EN"


def test_overlapping_beginnings_are_not_missed():
    assert stopped(["aab"], "aaab") == ("a", True)


def test_without_stop_strings_nothing_waits():
    assert StopStrings(()).push("text") == ("text", False)


def test_the_cut_into_pieces_makes_no_difference():
    rng = random.Random(11)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        text = "".join(rng.choices("abc", k=12))
        cuts = sorted(rng.sample(range(13), 3))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, 12])]
        assert stopped(stops, pieces) == stopped(stops, text) == stopped(stops, [text])
