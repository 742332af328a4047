"""Small DeepSeek-V2 checkpoints, faithful in structure: the cases in which an implementation of V2 can be wrong.

Weights are drawn so large that positions, routing and the softmax temperature all show in the logits; norm weights are
not one. Where transformers knows the architecture it writes the files; what it ignores is written here.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import reference
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV2ForCausalLM

YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,  # not 4096: interpolation has to matter within a hundred positions
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

# every field of a released config.json
LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 190,
    "eos_token_id": 191,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "kv_lora_rank": 32,
    "max_position_embeddings": 1280,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 12,  # neither of the key widths, so that a mix-up cannot pass
    "vocab_size": 192,
}
V2 = LITE | {
    "ep_size": 1,
    "n_group": 8,
    "n_routed_experts": 32,
    "q_lora_rank": 24,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}

ORACLE = {  # what transformers implements
    "lite": LITE,
    "v2": V2,
    "no_yarn": LITE | {"rope_scaling": None},
    "mscale_mismatch": LITE | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
    "groups_differ": V2
    | {"n_group": 4, "n_routed_experts": 24, "num_experts_per_tok": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "released_widths": LITE
    | {
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": YARN | {"original_max_position_embeddings": 4096},
        "v_head_dim": 128,
    },
    "two_dense_layers": V2 | {"first_k_dense_replace": 2, "num_hidden_layers": 4},
    "tied_embeddings": LITE | {"tie_word_embeddings": True},
}
ALONE = {  # where transformers is silent: the float64 reference decides
    "normed_gates": V2 | {"norm_topk_prob": True},
    "moe_every_other_layer": V2 | {"moe_layer_freq": 2, "num_hidden_layers": 5, "routed_scaling_factor": 4.0},
    "no_shared_experts": LITE | {"n_shared_experts": None},
}
CASES = ORACLE | ALONE


class Checkpoint(NamedTuple):
    name: str
    config: dict  # in the spelling of the released files
    tensors: dict[str, Tensor]  # float32
    path: Path


def draw(config: dict, seed: int) -> dict[str, Tensor]:
    """Normal weights; a matrix keeps the size of what it is given, and what feeds a softmax more."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in reference.shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 1 + 0.2 * noise
        else:
            sharp = any(part in name for part in (".q_proj", ".q_b_proj", ".kv_a_proj", ".mlp.gate.weight"))
            tensors[name] = noise * (1.25 if sharp else 1) * shape[1] ** -0.5
    return tensors


def write(path: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    """One safetensors file and config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make(name: str, folder: Path) -> Checkpoint:
    """The named case under `folder`, written by transformers where it can be."""
    config = CASES[name]
    tensors = draw(config, seed=zlib.crc32(name.encode()))
    ours = write(folder / f"{name}-drawn", config, tensors)
    if name in ALONE:
        return Checkpoint(name, config, tensors, ours)
    DeepseekV2ForCausalLM.from_pretrained(ours, dtype=torch.float32).save_pretrained(folder / name)
    return Checkpoint(name, config, tensors, folder / name)


def respelled(checkpoint: Checkpoint, folder: Path) -> Path:
    """The same weights beside the config.json of a released checkpoint, where transformers 5 writes its own."""
    return write(folder, checkpoint.config, checkpoint.tensors)


def sharded(checkpoint: Checkpoint, folder: Path, renumber: bool = False) -> Path:
    """The same model in shards of transformers; renumbered as the released Lite files are, with counts that lie."""
    model = DeepseekV2ForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="100KB")
    if renumber:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        new = {old: f"model-{number:05d}-of-000004.safetensors" for number, old in enumerate(files, start=1)}
        for old in files:
            (folder / old).rename(folder / new[old])
        index["weight_map"] = {name: new[old] for name, old in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def some_tokens(config: dict, length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config["vocab_size"], (length,), generator=generator).tolist()


def transformers_logits(path: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, vocab] of the oracle, in its plain bodies."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = DeepseekV2ForCausalLM.from_pretrained(path, dtype=dtype, **plain)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]
