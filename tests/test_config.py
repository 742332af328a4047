"""Config: the released shapes counted to the last weight, both spellings read, and nothing accepted that would be
computed wrongly."""

import json
from dataclasses import replace

import pytest
import reference
from checkpoints import CASES, LITE, V2
from transformers import DeepseekV2Config

from workbench.config import Config, Yarn
from workbench.errors import CheckpointError


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("v2", 235_741_434_880, 21_375_800_320),
        ("v2.5", 235_741_434_880, 21_375_800_320),
        ("v2-lite", 15_706_484_224, 2_661_150_208),
    ],
)
def test_presets_count_to_the_published_figures(preset, total, active):
    assert Config.preset(preset).parameters() == (total, active)


@pytest.mark.parametrize(("preset", "tensors"), [("v2", 29_102), ("v2-lite", 5_291)])
def test_presets_describe_the_tensors_of_the_released_files(preset, tensors):
    config = Config.preset(preset)
    shapes = reference.shapes(config.to_dict())
    assert len(shapes) == tensors
    assert sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values()) == config.parameters().total


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_weights(name, checkpoint):
    held = sum(tensor.numel() for tensor in checkpoint(name).tensors.values())
    assert Config.from_json(checkpoint(name).config).parameters().total == held


RELEASED = {  # facts that every port has got wrong at least once
    "v2": {
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": Yarn(40, 4096, 32, 1, 0.707, 0.707),
        "max_position_embeddings": 163840,
        "vocab_size": 102400,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
    }
}
RELEASED["v2.5"] = RELEASED["v2"] | {"rope_scaling": Yarn(40, 4096, 32, 1, 1.0, 1.0)}
RELEASED["v2-lite"] = RELEASED["v2"] | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_are_the_released_configurations(preset):
    config = Config.preset(preset)
    assert {key: getattr(config, key) for key in RELEASED[preset]} == RELEASED[preset]
    assert config.qk_head_dim == 192
    assert config.latent_width == 576
    assert [config.is_moe(layer) for layer in range(3)] == [False, True, True]


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(CheckpointError, match="v2-lite"):
        Config.preset("v3")


@pytest.mark.parametrize("name", CASES)
def test_every_field_of_a_released_file_is_read(name, checkpoint):
    raw = checkpoint(name).config
    config = Config.from_json(raw)
    assert all(getattr(config, key) == raw[key] for key in raw if hasattr(config, key) and key != "rope_scaling")
    yarn = raw["rope_scaling"]
    if yarn is None:
        assert config.rope_scaling is None
    else:
        assert all(getattr(config.rope_scaling, key) == yarn[key] for key in yarn if key != "type")


@pytest.mark.parametrize("raw", [LITE, V2, V2 | {"rope_scaling": None}], ids=["lite", "v2", "no_yarn"])
def test_both_spellings_say_the_same(raw):
    newer = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if raw["rope_scaling"]:
        newer["rope_parameters"] |= {key: value for key, value in raw["rope_scaling"].items() if key != "type"}
        newer["rope_parameters"]["rope_type"] = "yarn"
    assert Config.from_json(newer) == Config.from_json(raw)


@pytest.mark.parametrize("raw", [LITE, V2, V2 | {"rope_scaling": None}], ids=["lite", "v2", "no_yarn"])
def test_what_transformers_writes_means_the_same(raw, tmp_path):
    DeepseekV2Config.from_dict(raw).save_pretrained(tmp_path)
    dropped = {"dtype": "bfloat16", "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
    assert replace(Config.from_json(tmp_path / "config.json"), **dropped) == Config.from_json(raw)


@pytest.mark.parametrize("name", CASES)
def test_to_dict_and_back_is_the_same_config(name, checkpoint):
    config = Config.from_json(checkpoint(name).config)
    assert Config.from_json(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("preset", ["v2", "v2.5", "v2-lite", "pocket"])
def test_presets_survive_the_round_trip(preset, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Config.preset(preset).to_dict()))
    assert Config.from_json(tmp_path / "config.json") == Config.preset(preset)


def test_to_dict_is_read_by_transformers():
    theirs = DeepseekV2Config.from_dict(Config.from_json(V2).to_dict())
    assert (theirs.n_group, theirs.topk_group, theirs.routed_scaling_factor) == (8, 3, 16.0)
    assert theirs.rope_parameters["rope_type"] == "yarn" and theirs.rope_parameters["mscale_all_dim"] == 1.0


REFUSED = {
    "model_type": ("deepseek_v3", "llama", None),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc", "gready"),
    "hidden_act": ("gelu",),
    "attention_bias": (True,),
    "num_key_value_heads": (1,),
    "torch_dtype": ("float8_e4m3fn",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_would_be_computed_wrongly_is_refused_by_name(key, value):
    with pytest.raises(CheckpointError) as error:
        Config.from_json(V2 | {key: value})
    assert key in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_another_rope_is_refused_by_name(kind, spelling):
    with pytest.raises(CheckpointError, match=kind):
        Config.from_json(V2 | {spelling: {"type" if spelling == "rope_scaling" else "rope_type": kind, "factor": 4}})


def test_quantised_weights_are_refused_by_name():
    with pytest.raises(CheckpointError, match="gptq"):
        Config.from_json(V2 | {"quantization_config": {"quant_method": "gptq"}})


MALFORMED = {
    "a word for a number": ({"hidden_size": "wide"}, "hidden_size"),
    "a fraction of a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "true for a number": ({"num_attention_heads": True, "num_key_value_heads": True}, "num_attention_heads"),
    "nothing for a number": ({"kv_lora_rank": None}, "kv_lora_rank"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "a negative width": ({"v_head_dim": -8}, "v_head_dim"),
    "an odd rotary width": ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
    "groups that do not divide the experts": ({"n_group": 5}, "n_group"),
    "more groups kept than there are": ({"topk_group": 9}, "topk_group"),
    "more experts chosen than there are": ({"num_experts_per_tok": 33}, "num_experts_per_tok"),
    "more experts chosen than the kept groups hold": ({"topk_group": 1}, "num_experts_per_tok"),
    "yarn that is not an object": ({"rope_scaling": "yarn"}, "rotary"),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn"}}, "factor"),
    "yarn with a word for a factor": ({"rope_scaling": {"type": "yarn", "factor": "40"}}, "factor"),
    "yarn that extends by nothing": ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor"),
    "a list for a flag": ({"norm_topk_prob": [False]}, "norm_topk_prob"),
}


@pytest.mark.parametrize(("change", "named"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_config_is_an_error_that_names_the_field(change, named):
    with pytest.raises(CheckpointError, match=named):
        Config.from_json(V2 | change)


@pytest.mark.parametrize("content", [b"{", b"[]", b'"deepseek_v2"', b"\xff\xfe\x00", b""], ids=repr)
def test_a_file_that_is_no_json_object_is_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Config.from_json(tmp_path / "config.json")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Config.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "kv_lora_rank", "q_lora_rank", "num_hidden_layers"])
def test_a_width_that_is_missing_is_named_instead_of_guessed(missing):
    raw = Config.preset("v2-lite").to_dict()
    del raw[missing]
    with pytest.raises(CheckpointError, match=f"{missing} missing"):
        Config.from_json(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0}}, "beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": -1}}, "beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": 64}}, "beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "numbers"),
        ({"quantization_config": "gptq"}, "gptq"),
        ({"eos_token_id": 102400}, "eos_token_id"),
        ({"hidden_size": "2048"}, "hidden_size must be int,"),
    ],
)
def test_values_that_cannot_be_computed_with_are_refused(change, words):
    with pytest.raises(CheckpointError, match=words):
        Config.from_json(Config.preset("v2-lite").to_dict() | change)


def test_a_directory_is_not_a_config(tmp_path):
    with pytest.raises(CheckpointError, match="is a directory"):
        Config.from_json(tmp_path)
