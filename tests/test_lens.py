"""What the tables say is what the tokenizer and the sampler did, and nothing is invented."""

import math

import pytest
import torch

from workbench.chat import render
from workbench.config import Config
from workbench.errors import RequestError
from workbench.lens.null import lower
from workbench.lens.sampling import along, next_token, rivals, surprise, temperatures
from workbench.lens.shapes import shapes
from workbench.lens.tokens import cut, density, pieces, runs
from workbench.sampling import Alternative, Choice, Sampling

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


@pytest.mark.parametrize("text", ["Two experts, 42 tokens.", "你好 🦊", " a\n\tb "])
def test_a_cut_text_is_all_there(tokenizer, text):
    table = cut(tokenizer, text)
    assert table["id"].tolist() == tokenizer.encode(text)
    assert table["bytes"].sum() == len(text.encode())


def test_white_space_and_control_characters_can_be_seen(tokenizer):
    assert "".join(pieces(tokenizer, tokenizer.encode(" a\n\tb\x00\x1b\x7f"))) == "␣a⏎⇥b␀␛␡"


def test_density_counts_characters_bytes_and_tokens(tokenizer):
    row = density(tokenizer, {"zh": "你好"}).loc["zh"]
    assert (row["characters"], row["bytes"], row["tokens"]) == (2, 6, len(tokenizer.encode("你好")))
    assert row["tokens per character"] == row["tokens"] / 2


def test_runs_cover_the_prompt_and_say_whose_words_they_are(tokenizer):
    prompt = render([{"role": "user", "content": "Hello you"}], tokenizer)
    table = runs(tokenizer, prompt.tokens, prompt.spans)
    assert table["tokens"].sum() == len(prompt.tokens)
    assert table.loc[table["written by"] == "user", "text"].item() == "Hello␣you"


def test_rivals_say_what_was_cut_off_and_what_was_taken(tokenizer):
    table = rivals(Choice(5, -1.0, 1.0, 0.5, (Alternative(5, 0.6, 1.0), Alternative(6, 0.4, 0.0))), tokenizer)
    assert table["model"].tolist() == [0.6, 0.4] and table["after sampling"].tolist() == [1.0, 0.0]
    assert table["taken"].tolist() == ["yes", ""]


def test_next_token_is_the_engines_own_choice():
    choice = next_token(LOGITS, Sampling(temperature=0), count=3)
    assert choice.token == 1 and [each.token for each in choice.alternatives] == [1, 3, 2]


def test_temperature_divides_the_logits(tokenizer):
    table = temperatures(LOGITS, tokenizer, (0.5, 2), count=4)
    assert table.index.tolist() == pieces(tokenizer, [1, 3, 2, 0])
    for value in (0.5, 2):
        expected = (LOGITS / value).softmax(-1)[[1, 3, 2, 0]]
        assert table[f"T = {value:g}"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_temperatures_keep_the_other_settings(tokenizer):
    assert temperatures(LOGITS, tokenizer, (1,), Sampling(top_k=1), count=2)["T = 1"].tolist() == [1.0, 0.0]


def test_along_an_answer_surprise_is_minus_the_log_of_the_probability(tokenizer):
    choices = [Choice(5, math.log(0.25), 1.0, 1.5, ()), Choice(6, None, None, None, ())]  # the second put there by hand
    table = along(choices, tokenizer)
    assert table.loc[0, "probability"] == pytest.approx(0.25) and table.loc[0, "surprise"] == pytest.approx(math.log(4))
    assert table.loc[1, ["probability", "surprise", "entropy"]].isna().all()


def test_surprise_is_that_of_the_continuation_alone():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0], [5.0, 1.0, 2.0, 3.0]])
    found = surprise(logits, [3, 1, 2], start=1)
    assert found.tokens == 2 and found.nats == pytest.approx(math.log(4) + math.log(2), abs=1e-3)
    assert found.perplexity == pytest.approx(math.sqrt(8), abs=1e-2)


def test_a_claim_is_measured_against_its_null():
    found = lower(1.0, [2.0, 3.0, 4.0])
    assert (found.null_mean, found.null_sd, found.effect, found.chance) == (3.0, 1.0, 2.0, 0.25)


def test_what_is_no_better_than_chance_says_so():
    assert lower(3.0, [2.0, 3.0, 4.0])[3:] == (0.0, 0.75)
    assert lower(2.0, [2.0, 2.0])[3:] == (0.0, 1.0)


def test_a_null_of_one_value_is_refused():
    with pytest.raises(RequestError, match="at least two values"):
        lower(1.0, [2.0])


def test_models_stand_side_by_side_in_their_own_numbers():
    table = shapes("pocket", "v2-lite", "v2")
    assert table.loc["parameters", ["v2-lite", "v2"]].tolist() == ["15.7 billion", "235.7 billion"]
    assert table.loc["cache for a token, bf16", ["v2-lite", "v2"]].tolist() == ["31,104 bytes", "69,120 bytes"]
    assert table.loc["layers", "pocket"] == str(Config.preset("pocket").num_hidden_layers)
