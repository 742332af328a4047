"""GGUF: the shape of a Config for llama.cpp, so that it can be timed too: with random weights in its 4 bits, or with
those of a checkpoint as they are.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names and keys: llama.cpp's `deepseek2`, in the
form that keeps the latent in its cache; formats of the tensors: as `llama-quantize ... Q4_0` chooses them.
"""

import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from workbench.config import Config
from workbench.errors import RequestError
from workbench.weights import Source

ALIGNMENT = 32  # bytes, GGUF's default
CHUNK = 1 << 24  # bytes of a tensor made and written at a time
KINDS = {"q4_0": 2, "fp32": 0, "bf16": 32}  # llama.cpp's numbers for the file as a whole
SOFTMAX = 1  # and for how the router scores

Value = str | bool | int | float
NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}


class Block(NamedTuple):
    """How `elements` neighbours of a row are stored.

    code: ggml's number of the format. rms: of the elements, where the scale `d` is one and all other bits are random.
    """

    code: int
    elements: int
    layout: np.dtype
    rms: float


F32 = Block(0, 1, np.dtype("<f4"), 1.0)
F16 = Block(1, 1, np.dtype("<f2"), 1.0)
BF16 = Block(30, 1, np.dtype("<i2"), 1.0)
PLAIN = {torch.float32: F32, torch.bfloat16: BF16}
Q4_0 = Block(2, 32, np.dtype([("d", "<f2"), ("q", "u1", 16)]), math.sqrt(255 / 12 + 1 / 4))
Q8_0 = Block(8, 32, np.dtype([("d", "<f2"), ("q", "i1", 32)]), math.sqrt(65535 / 12 + 1 / 4))
Q6_K = Block(
    14,
    256,
    np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
    math.sqrt(4095 / 12 + 1 / 4) * Q8_0.rms,
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `shape` is torch's, rows last; `std` of its random elements, None for a norm of ones."""

    name: str
    shape: tuple[int, ...]
    block: Block
    std: float | None
    weights: Callable[[], torch.Tensor] | None = None  # instead of random ones

    @property
    def blocks(self) -> int:
        return math.prod(self.shape) // self.block.elements

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block.layout.itemsize

    def chunks(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """The blocks in order, at most CHUNK bytes at a time; those of a checkpoint at once."""
        if self.weights is not None:
            plain = self.weights().contiguous().view(torch.int16 if self.block is BF16 else torch.float32)
            yield plain.numpy().reshape(-1).astype(self.block.layout, copy=False)
            return
        most = max(1, CHUNK // self.block.layout.itemsize)
        for done in range(0, self.blocks, most):
            yield self._random(min(most, self.blocks - done), generator)

    def _random(self, count: int, generator: np.random.Generator) -> np.ndarray:
        layout = self.block.layout
        if self.std is None:
            return np.ones(count, layout)
        scale = generator.standard_normal(count, dtype=np.float32) * (self.std / self.block.rms)
        if layout.names is None:
            return scale.astype(layout)
        blocks = np.frombuffer(bytearray(generator.bytes(count * layout.itemsize)), layout)
        blocks["d"] = scale
        return blocks


def write(config: Config, path: Path, seed: int = 0, source: Source | None = None) -> Path:
    """Writes `config`'s shape to `path`: about 0.57 bytes a parameter on the disk, a few CHUNKs of memory. Or, a tensor
    at a time, the weights of `source` in its type.

    There is no vocabulary in it, only its size: tokens go in by number. RequestError for a shape that llama.cpp's
    `deepseek2` does not have, and for a disk without the room.
    """
    content = tensors(config) if source is None else _of(source, config)
    kind = "q4_0" if source is None else "fp32" if source.dtype == torch.float32 else "bf16"
    header = _header(content, metadata(config, kind))
    size = len(header) + sum(_aligned(tensor.nbytes) for tensor in content)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise RequestError(
            f"{path}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; choose another folder."
        )
    generator = np.random.default_rng(seed)
    unfinished = path.with_name(path.name + ".partial")  # a file cut short is never taken for a whole one
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for tensor in content:
                for chunk in tensor.chunks(generator):
                    file.write(chunk)
                file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def metadata(config: Config, kind: str = "q4_0") -> dict[str, Value]:
    """What llama.cpp reads before the tensors. Integers are written as u32, other numbers as f32."""
    experts = config.n_routed_experts or 0
    model = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace if experts else config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,  # the heads share one latent
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.latent_width,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts or 0,
    }
    if experts:
        model |= {
            "expert_count": experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_gating_func": SOFTMAX,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.norm_topk_prob,
        }
        if config.n_group > 1:
            model |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if (yarn := config.rope_scaling) is not None:
        model |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }
    return {
        "general.architecture": "deepseek2",
        "general.name": f"{config.name or 'shape'}{', random weights' if kind == 'q4_0' else ''}",
        "general.file_type": KINDS[kind],
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "no_vocab",
        **{f"deepseek2.{key}": value for key, value in model.items()},
    }


def tensors(config: Config) -> list[Tensor]:
    """Every tensor in the order of the file. RequestError where llama.cpp has no place for one, or needs more."""
    experts = config.n_routed_experts or 0
    if experts and config.moe_layer_freq != 1:
        raise RequestError(f"moe_layer_freq {config.moe_layer_freq}: llama.cpp has experts in every layer or none.")
    if experts and not config.n_shared_experts:
        raise RequestError("n_shared_experts 0: llama.cpp's deepseek2 needs shared experts beside the routed ones.")
    hidden, vocab = config.hidden_size, config.vocab_size
    if config.tie_word_embeddings:
        ends = [_matrix("token_embd", vocab, hidden, block=Q6_K)]
    else:
        ends = [_matrix("token_embd", vocab, hidden, std=1.0), _matrix("output", vocab, hidden, block=Q6_K)]
    layers = (tensor for index in range(config.num_hidden_layers) for tensor in _layer(config, index))
    return [*ends, _norm("output_norm", hidden), *layers]


def _of(source: Source, config: Config) -> list[Tensor]:
    """The same tensors with the weights of a checkpoint: norms and the router in fp32, as llama.cpp has them."""
    found, take = [], lru_cache(1)(source.take)  # the two halves of kv_b come one after the other
    for one in tensors(config):
        wide = one.block is F32
        weights = partial(_weights, take, config, one.name, one.shape, wide)
        found.append(replace(one, block=F32 if wide else PLAIN[source.dtype], weights=weights))
    return found


def _weights(take: Callable, config: Config, name: str, shape: tuple[int, ...], wide: bool) -> torch.Tensor:
    *layer, part, _ = name.split(".")
    theirs = NAMES[part]
    if layer:
        theirs = f"model.layers.{layer[1]}.{theirs}"
    if part in ("attn_k_b", "attn_v_b"):
        heads, rank, keys = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
        both = take(f"{theirs}.weight", (heads * (keys + config.v_head_dim), rank)).unflatten(0, (heads, -1))
        taken = both[:, :keys].mT if part == "attn_k_b" else both[:, keys:]
    elif part.endswith("_exps"):
        each = [theirs.replace("*", str(expert)) for expert in range(shape[0])]
        taken = torch.stack([take(f"{one}.weight", shape[1:]) for one in each])
    else:
        taken = take(f"{theirs}.weight", shape)
    return taken.float() if wide else taken


def _layer(config: Config, index: int) -> Iterator[Tensor]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    into = 1 / math.sqrt(2 * config.num_hidden_layers)  # what is added to the stream, so that it does not grow
    at = f"blk.{index}."
    yield _norm(at + "attn_norm", hidden)
    if config.q_lora_rank is None:
        yield _matrix(at + "attn_q", heads * config.qk_head_dim, hidden)
    else:
        yield _matrix(at + "attn_q_a", config.q_lora_rank, hidden)
        yield _norm(at + "attn_q_a_norm", config.q_lora_rank)
        yield _matrix(at + "attn_q_b", heads * config.qk_head_dim, config.q_lora_rank)
    yield _matrix(at + "attn_kv_a_mqa", config.latent_width, hidden)
    yield _norm(at + "attn_kv_a_norm", rank)
    # keys from the latent, transposed so that queries go to the latent instead
    yield _matrix(at + "attn_k_b", heads, rank, config.qk_nope_head_dim, std=rank**-0.5)
    yield _matrix(at + "attn_v_b", heads, config.v_head_dim, rank)
    yield _matrix(at + "attn_output", hidden, heads * config.v_head_dim, gain=into)
    yield _norm(at + "ffn_norm", hidden)
    if not config.is_moe(index):
        yield from _mlp(at, "", (), hidden, config.intermediate_size, into)
        return
    yield _matrix(at + "ffn_gate_inp", config.n_routed_experts, hidden, block=F32)
    yield from _mlp(at, "_exps", (config.n_routed_experts,), hidden, config.moe_intermediate_size, into)
    yield from _mlp(at, "_shexp", (), hidden, config.n_shared_experts * config.moe_intermediate_size, into)


def _mlp(at: str, kind: str, many: tuple[int, ...], hidden: int, inner: int, gain: float) -> Iterator[Tensor]:
    yield _matrix(f"{at}ffn_gate{kind}", *many, inner, hidden)
    yield _matrix(f"{at}ffn_up{kind}", *many, inner, hidden)
    yield _matrix(f"{at}ffn_down{kind}", *many, hidden, inner, gain=gain)


def _norm(name: str, width: int) -> Tensor:
    return Tensor(name + ".weight", (width,), F32, None)


def _matrix(name: str, *shape: int, block: Block = Q4_0, std: float | None = None, gain: float = 1.0) -> Tensor:
    """[..., out, in], from inputs of unit variance to outputs of unit variance, times `gain`."""
    columns = shape[-1]
    if block is Q6_K and columns % Q6_K.elements:
        block = Q8_0
    if columns % block.elements:
        block = F16
    return Tensor(name + ".weight", shape, block, gain * columns**-0.5 if std is None else std)


def _header(content: list[Tensor], keys: dict[str, Value]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(content), len(keys))]
    parts += [_string(key) + _value(value) for key, value in keys.items()]
    offset = 0
    for tensor in content:
        dims = tensor.shape[::-1]  # rows first
        where = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.block.code, offset)
        parts.append(_string(tensor.name) + where)
        offset += _aligned(tensor.nbytes)
    header = b"".join(parts)
    return header + bytes(_aligned(len(header)) - len(header))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + _string(value)
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
