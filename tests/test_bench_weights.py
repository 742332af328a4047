"""The benchmark of the weight recipes: what is compared is what it says, and nothing else differs."""

import json
from dataclasses import replace

import pytest
import torch

from workbench.benchmarks import weights
from workbench.benchmarks.weights import Size, errors, measure, rerouted
from workbench.calibration import Calibration
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.errors import RequestError
from workbench.model import Model
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.rounding import compensated

SMALL = Size(texts=3, calibrated=6, length=64, every=150)
RECIPES = ["bf16", "int8", "int4", "int4+compensated", "int3+compensated"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary, tokenizer):
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    config = replace(
        Config.preset("pocket"), vocab_size=600, hidden_size=48, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8,
        n_routed_experts=8, n_group=4, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
    )  # fmt: skip
    save(Model(config, Random(config, seed=0, std=0.15)), path, files_from=vocabulary, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def result(checkpoint):
    def rounding(calibration):
        used.add(calibration.identity)
        return compensated(calibration)

    def checking(plain, other, calibration):
        measured.add(calibration.identity)
        return errors(plain, other, calibration)

    used, measured = set(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "QUICK", SMALL)
        patch.setattr(weights, "compensated", rounding)
        patch.setattr(weights, "errors", checking)
        found = measure(checkpoint, recipes=RECIPES, threads=1, quick=True)
    assert len(used) == len(measured) == 1 and used != measured  # never calibrated on what is measured
    return found


def test_every_recipe_is_measured_against_the_plain_weights(result):
    rows = {row.recipe: row for row in result.rows}
    assert list(rows) == RECIPES
    exact = rows["bf16"]  # as the checkpoint is stored
    assert exact.weights == exact.outputs == exact.rerouted.mean == 0 and exact.quality.same == 1
    assert abs(exact.quality.kl_mean) < 1e-6
    assert 0 < rows["int8"].quality.kl_mean < rows["int4"].quality.kl_mean
    assert exact.bits > 16 and exact.disk > rows["int8"].disk > rows["int4"].disk == rows["int4+compensated"].disk
    assert exact.memory > rows["int8"].memory > rows["int4"].memory > rows["int3+compensated"].memory
    for row in rows.values():
        assert 0 <= row.rerouted.mean < 0.5 and row.exam.total == 2 and row.exam.reference == exact.exam.passed


def test_the_error_of_weights_does_not_say_which_is_better(result):
    rows = {row.recipe: row for row in result.rows}
    near, made = rows["int4"], rows["int4+compensated"]
    assert made.weights > near.weights and made.outputs < near.outputs
    assert near.over_nearest is None and rows["int3+compensated"].over_nearest is None  # int3 was not measured
    assert made.over_nearest.mean == pytest.approx(made.quality.kl_mean - near.quality.kl_mean, abs=1e-6)


def test_figures_are_kept_as_data_and_drawn_from_it(result, tmp_path):
    (tmp_path / "kernels").mkdir()
    kept = json.loads(result.save(tmp_path / "kernels" / "results").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result.to_dict())) and kept["understood"]
    assert kept["about"]["date"] and kept["about"]["commit"] is not None and kept["about"]["device"] == "cpu"
    assert [row["recipe"] for row in kept["recipes"]] == RECIPES == result.table().index.tolist()
    text = str(result)
    assert all(name in text for name in RECIPES) and "KL over nearest" in text and "6 others" in text


def test_a_choice_is_rerouted_whatever_its_place():
    before = torch.tensor([[[0, 1, 2, 3]], [[4, 5, 6, 7]]])
    after = torch.tensor([[[3, 2, 1, 0]], [[4, 5, 0, 1]]])
    assert rerouted(before, after).mean == 0.25 and rerouted(before, before).mean == 0


def test_errors_are_of_outputs_on_what_is_read():
    config = replace(Config.preset("pocket"), vocab_size=60, num_hidden_layers=1, hidden_size=64, intermediate_size=40)
    plain = Model(config, Random(config, seed=1))
    tokens = torch.randint(60, (2, 50))
    seen = Calibration.collect(plain, [tokens])
    other = Model(config, Quantising(Random(config, seed=1), Recipe.named("int4")))
    of_weights, of_outputs = errors(plain, other, seen)
    assert 0 < of_outputs < 0.1 and 0 < of_weights < 0.1
    doubled = Model(config, Random(config, seed=1))
    for tensor in doubled.tensors.values():
        tensor.mul_(1.5)
    assert errors(plain, doubled, seen) == pytest.approx((0.25, 0.25), rel=1e-4)


@pytest.mark.parametrize("recipes", [[], ["int4", "int4"], ["int5"], ["int4+calibrated"]])
def test_recipes_are_known_and_named_once(checkpoint, recipes):
    with pytest.raises(RequestError):
        measure(checkpoint, recipes=recipes, threads=1, quick=True)
