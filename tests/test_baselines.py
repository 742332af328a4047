"""The baselines: bytes that the paper and the published configurations give, and ratios that name what they are of."""

from dataclasses import replace

import pytest

from workbench.config import Config
from workbench.lens.baselines import DEEPSEEK_67B, baselines, compare, groups_for

V2, LITE, POCKET = map(Config.preset, ("v2", "v2-lite", "pocket"))


@pytest.mark.parametrize(
    ("config", "name", "nbytes"),
    [
        (LITE, "latent (bf16)", 31_104),
        (LITE, "expanded (bf16)", 276_480),
        (LITE, "MHA (bf16)", 221_184),
        (LITE, "MQA (bf16)", 13_824),
        (V2, "latent (bf16)", 69_120),
        (V2, "expanded (bf16)", 4_915_200),
        (V2, "MHA (bf16)", 3_932_160),
        (V2, "DeepSeek-67B (GQA, bf16)", 389_120),
        (POCKET, "latent (bf16)", 960),
    ],
)
def test_a_token_costs_what_was_published(config, name, nbytes):
    assert baselines(config)[name].nbytes == nbytes


def test_the_claim_and_the_two_numbers_before_it():
    """V2's 576 elements in 60 layers at 16, 8 and 6 bits, against DeepSeek-67B."""
    reductions = [DEEPSEEK_67B.ratio(576 * 60 * bits / 8).reduction for bits in (16, 8, 6)]
    assert [f"{one:.1%}" for one in reductions] == ["82.2%", "91.1%", "93.3%"]


def test_a_ratio_cannot_be_said_without_its_baseline():
    assert str(DEEPSEEK_67B.ratio(26_160)) == "93.3% less than DeepSeek-67B (GQA, bf16)"
    assert str(baselines(LITE)["MQA (bf16)"].ratio(31_104)) == "125.0% more than MQA (bf16)"


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 16, 20, 128])
def test_groups_share_the_heads_evenly_whatever_their_number(heads):
    config = replace(LITE, num_attention_heads=heads)
    groups = groups_for(config)
    assert heads % groups == 0 and groups <= 8
    names = list(baselines(config))
    assert len(names) == 6 and f"GQA, {groups} groups (bf16)" in names


def test_the_comparison_has_every_baseline_once_largest_first_and_says_which_is_another_model():
    table = compare(26_160, V2)
    assert list(table.index) == list(baselines(V2))
    assert table["bytes per token"].is_monotonic_decreasing
    assert list(table.index[~table["same model"]]) == ["DeepSeek-67B (GQA, bf16)"]
    assert table.loc["latent (bf16)", "share"] == pytest.approx(26_160 / 69_120)
    assert (table["share"] + table["reduction"]).tolist() == pytest.approx([1] * 6)
