"""The model computes what DeepSeek-V2 computes: against transformers where it is right, against float64 everywhere."""

import json
from dataclasses import replace

import checkpoints
import pytest
import reference
import torch
from checkpoints import ALONE, CASES, ORACLE

from workbench import ops
from workbench.checkpoint import save
from workbench.config import Config
from workbench.opening import open_model
from workbench.recorder import Recorder

TOLERANCE = 1e-4
LENGTH = 128  # four times the original context of the fixtures


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def difference(a, b):
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a.double() - b.double()).abs().max().item()


@pytest.fixture(scope="module")
def tokens():
    return checkpoints.some_tokens(checkpoints.LITE, LENGTH)


@pytest.mark.parametrize("name", ORACLE)
def test_logits_are_those_of_transformers(name, checkpoint, model, tokens):
    theirs = checkpoints.transformers_logits(checkpoint(name).path, tokens)
    assert difference(logits_of(model(name), tokens), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_float64_reference(name, checkpoint, model, tokens):
    exact = reference.run(checkpoint(name).config, checkpoint(name).tensors, tokens)
    assert difference(logits_of(model(name), tokens), exact.logits) <= TOLERANCE


@pytest.mark.parametrize("name", ORACLE)
def test_the_reference_itself_agrees_with_transformers_in_float64(name, checkpoint, tokens):
    # norms, rotary angles and router stay float32 inside transformers, whatever the dtype: hence not 1e-9
    theirs = checkpoints.transformers_logits(checkpoint(name).path, tokens, torch.float64)
    exact = reference.run(checkpoint(name).config, checkpoint(name).tensors, tokens)
    assert difference(exact.logits, theirs) <= 5e-5


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_was_drawn(name, checkpoint, model):
    drawn = checkpoint(name).tensors
    assert model(name).tensors.keys() == drawn.keys()
    assert all(torch.equal(model(name).tensors[key], drawn[key]) for key in drawn)


# The cases must be able to fail: each rule, broken in the reference, has to show.
BROKEN = {
    "lite": {"rope_scaling": None},
    "v2": {"topk_method": "greedy"},
    "groups_differ": {"topk_group": 3},
    "normed_gates": {"norm_topk_prob": False},
    "no_yarn": {"rope_theta": 50000},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_shows_in_the_logits(name, checkpoint, tokens):
    config, tensors = checkpoint(name).config, checkpoint(name).tensors
    right = reference.run(config, tensors, tokens).logits
    wrong = reference.run(config | BROKEN[name], tensors, tokens).logits
    assert difference(right, wrong) > 0.1


@pytest.mark.parametrize("name", ["lite", "v2", "released_widths"])
def test_the_softmax_temperature_shows_in_the_logits_and_is_right_at_every_length(name, checkpoint, tokens):
    config, tensors = checkpoint(name).config, checkpoint(name).tensors
    cold = {"rope_scaling": config["rope_scaling"] | {"mscale": 0, "mscale_all_dim": 0}}
    right = reference.run(config, tensors, tokens).logits
    without = reference.run(config | cold, tensors, tokens).logits
    assert difference(right[:1], without[:1]) < 1e-9  # one token attends to itself alone
    assert all((right[t] - without[t]).abs().max() > 0.01 for t in range(8, LENGTH))


def test_mscale_and_mscale_all_dim_are_not_interchangeable(checkpoint, tokens):
    config, tensors = checkpoint("mscale_mismatch").config, checkpoint("mscale_mismatch").tensors
    yarn = config["rope_scaling"]
    right = reference.run(config, tensors, tokens).logits
    for wrong in ({"mscale": 0.707}, {"mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 1.0}):
        assert difference(right, reference.run(config | {"rope_scaling": yarn | wrong}, tensors, tokens).logits) > 0.1


@pytest.mark.parametrize("name", ["v2", "groups_differ"])
def test_group_limited_and_plain_selection_differ_and_the_model_takes_the_groups(name, checkpoint, model, tokens):
    config = checkpoint(name).config
    exact = reference.run(config, checkpoint(name).tensors, tokens)
    recorder = Recorder("moe.experts", "moe.gates")
    with torch.no_grad():
        model(name)(torch.tensor([tokens]), probe=recorder)
    for layer, routing in exact.routing.items():
        plain = reference.route(routing.scores, config | {"topk_method": "greedy"})
        differs = (routing.ids.sort(-1).values != plain.ids.sort(-1).values).any(-1)
        assert differs.double().mean() >= 0.2
        ids, gates = recorder["moe.experts", layer][0], recorder["moe.gates", layer][0]
        assert torch.equal(ids, routing.ids)
        assert difference(gates, routing.gates) <= 1e-4


@pytest.mark.parametrize("name", ["lite", "v2", "no_yarn", "mscale_mismatch"])
def test_both_spellings_of_the_config_give_the_same_logits(name, checkpoint, model, tokens, tmp_path):
    written = json.loads((checkpoint(name).path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    released = checkpoints.respelled(checkpoint(name), tmp_path / "released")
    assert "rope_parameters" not in json.loads((released / "config.json").read_text())
    again = open_model(released, dtype=torch.float32)
    assert again.config.rope_scaling == model(name).config.rope_scaling
    assert torch.equal(logits_of(again, tokens), logits_of(model(name), tokens))


@pytest.mark.parametrize("renumber", [False, True], ids=["as_written", "oddly_numbered"])
def test_shards_give_the_same_logits_as_one_file(renumber, checkpoint, model, tokens, tmp_path):
    folder = checkpoints.sharded(checkpoint("v2"), tmp_path, renumber)
    assert len(list(folder.glob("*.safetensors"))) > 4
    again = open_model(folder, dtype=torch.float32)
    assert torch.equal(logits_of(again, tokens), logits_of(model("v2"), tokens))


@pytest.mark.parametrize("name", ["lite", "v2", "no_yarn", "mscale_mismatch", "tied_embeddings"])
def test_a_checkpoint_saved_here_opens_in_transformers_with_the_same_logits(name, model, tokens, tmp_path):
    save(model(name), tmp_path / "saved")
    theirs = checkpoints.transformers_logits(tmp_path / "saved", tokens)
    assert difference(logits_of(model(name), tokens), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ALONE)
def test_a_checkpoint_transformers_has_no_words_for_survives_saving(name, model, tokens, tmp_path):
    save(model(name), tmp_path / "saved")
    again = open_model(tmp_path / "saved", dtype=torch.float32)
    assert again.config == replace(model(name).config, dtype="float32")  # as it was saved
    assert torch.equal(logits_of(again, tokens), logits_of(model(name), tokens))


@pytest.mark.parametrize("name", ["lite", "v2", "no_yarn", "mscale_mismatch", "groups_differ", "released_widths"])
def test_bf16_is_at_most_twice_as_far_from_exact_as_transformers_in_bf16(name, checkpoint, tokens):
    rounded = {key: tensor.bfloat16() for key, tensor in checkpoint(name).tensors.items()}
    exact = reference.run(checkpoint(name).config, rounded, tokens).logits
    ours = logits_of(open_model(checkpoint(name).path, dtype=torch.bfloat16), tokens)
    theirs = checkpoints.transformers_logits(checkpoint(name).path, tokens, torch.bfloat16)
    assert ours.dtype == torch.float32
    # root mean square, and the middle: a flipped near tie between experts owns the maximum, in both
    for distance in (lambda x: (x - exact).square().mean().sqrt(), lambda x: (x - exact).abs().median()):
        assert distance(ours) <= 2 * distance(theirs)


def test_experts_are_chosen_in_fp32_by_a_bf16_model(checkpoint, tokens):
    recorder = Recorder("moe.router_logits", "moe.router_probs", "moe.gates")
    with torch.no_grad():
        open_model(checkpoint("v2").path, dtype=torch.bfloat16)(torch.tensor([tokens]), probe=recorder)
    for seen in [recorder[site, layer] for site in recorder.sites for layer in recorder.layers_of(site)]:
        assert seen.dtype == torch.float32
        assert (seen != seen.bfloat16()).double().mean() > 0.9  # not rounded on the way


def test_a_near_tie_that_bf16_cannot_see_is_decided():
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    weight = torch.full((4, 256), 0.0625, dtype=torch.bfloat16)  # logits of 16, where bf16 steps by 0.125
    weight[2, 0] += 2**-8
    weight[0, 0] -= 2**-8
    logits = ops.router_logits(x, weight)
    config = replace(Config.preset("v2-lite"), n_routed_experts=4, num_experts_per_tok=1)
    assert logits.bfloat16().unique().numel() == 1
    assert ops.route(logits, config).ids.item() == 2
