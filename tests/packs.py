"""Small checkpoints of random weights in bf16, and what is damaged in them."""

from dataclasses import replace
from pathlib import Path

import torch

from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.model import Model

LITE = Config(  # no width is a multiple of a group of 64
    vocab_size=150,
    hidden_size=72,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    moe_intermediate_size=24,
    n_routed_experts=6,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = {
    "lite": LITE,
    "v2": replace(LITE, q_lora_rank=24, n_group=3, topk_group=2, topk_method="group_limited_greedy"),
    "tied": replace(LITE, tie_word_embeddings=True, n_shared_experts=None),
    "every_other": replace(LITE, num_hidden_layers=4, first_k_dense_replace=0, moe_layer_freq=2),
    "dense": replace(LITE, n_routed_experts=None, n_shared_experts=None),
}


def plain(path: Path, config: Config = LITE, seed: int = 0) -> Path:
    """A checkpoint directory. Large weights: what is wrong anywhere shows in the logits."""
    model = Model(config, Random(config, seed, torch.bfloat16, std=0.15))
    save(model, path, dtype=torch.bfloat16)
    return path


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
