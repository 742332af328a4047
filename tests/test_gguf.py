"""GGUF files of random weights: whole, of the shape that was asked for, and read alike by llama.cpp's own reader."""

import math
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from workbench.benchmarks import gguf
from workbench.benchmarks.gguf import F16, F32, Q4_0, Q6_K, Q8_0, Block, Tensor, write
from workbench.config import Config, Yarn
from workbench.errors import RequestError

# widths that each format meets: 288 is no multiple of 256, 320 and 64 are ones of 32, 24 is not
TINY = Config(
    vocab_size=97,
    hidden_size=288,
    intermediate_size=320,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=None,
    kv_lora_rank=96,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=32,
    n_routed_experts=5,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    rope_scaling=Yarn(factor=4, original_max_position_embeddings=512, mscale=0.707, mscale_all_dim=0.707),
    bos_token_id=0,
    eos_token_id=1,
    name="tiny",
)
FORMATS = {block.code: block for block in (F32, F16, Q4_0, Q8_0, Q6_K)}
SCALARS = {4: "<I", 6: "<f", 7: "<?"}


class Reader:
    """GGUF as its specification has it, and nothing of the writer: keys, and name: (shape rows last, Block, bytes)."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 0
        assert self.data[:4] == b"GGUF"
        self.at = 4
        version, tensors, keys = self.take("<I"), self.take("<Q"), self.take("<Q")
        assert version == 3
        self.keys = {self.string(): self.value() for _ in range(keys)}
        found = [self.info() for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        self.tensors, self.end = {}, start
        for name, shape, block, offset in found:
            assert offset % 32 == 0 and start + offset >= self.end  # aligned, and none lies in another
            assert shape[-1] % block.elements == 0
            self.end = start + offset + math.prod(shape) // block.elements * block.layout.itemsize
            self.tensors[name] = shape, block, self.data[start + offset : self.end]

    def take(self, form):
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self):
        length = self.take("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self):
        kind = self.take("<I")
        return self.string() if kind == 8 else self.take(SCALARS[kind])

    def info(self):
        name = self.string()
        shape = tuple(self.take("<Q") for _ in range(self.take("<I")))[::-1]
        return name, shape, FORMATS[self.take("<I")], self.take("<Q")


def values(block: Block, stored: bytes) -> np.ndarray:
    """The numbers in a tensor's bytes, as ggml's reference code unpacks them."""
    blocks = np.frombuffer(stored, block.layout)
    if block.layout.names is None:
        return blocks.astype(np.float64)
    scale = blocks["d"].astype(np.float64)[:, None]
    if block is Q8_0:
        return (scale * blocks["q"]).ravel()
    if block is Q4_0:
        return (scale * (np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1).astype(int) - 8)).ravel()
    low, high = blocks["low"].reshape(-1, 2, 64), blocks["high"].reshape(-1, 2, 32)
    four = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    two = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    six = (four | two << 4).astype(int) - 32
    return (scale * (six.reshape(-1, 16, 16) * blocks["scales"].astype(int)[:, :, None]).reshape(-1, 256)).ravel()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(TINY, tmp_path_factory.mktemp("gguf") / "tiny.gguf", seed=np.random.SeedSequence().entropy)


def test_the_file_is_whole_and_has_the_parameters_of_the_shape(path):
    read = Reader(path)
    assert -(-read.end // 32) * 32 == len(read.data)
    assert list(path.parent.iterdir()) == [path]
    assert sum(math.prod(shape) for shape, _, _ in read.tensors.values()) == TINY.parameters().total


@pytest.mark.parametrize("shape", ["v2-lite", "v2", "pocket"])
def test_every_parameter_of_a_released_shape_has_its_place(shape):
    config = Config.preset(shape)
    content = gguf.tensors(config)
    assert sum(math.prod(tensor.shape) for tensor in content) == config.parameters().total
    assert len({tensor.name for tensor in content}) == len(content)


def test_matrices_take_four_bits_where_llama_cpp_would_give_them_four():
    content = {tensor.name: tensor for tensor in gguf.tensors(Config.preset("v2-lite"))}
    assert Counter(tensor.block.code for tensor in content.values()) == {
        Q4_0.code: 27 * 5 + 3 + 26 * 6 + 1,
        Q6_K.code: 1,
        F32.code: 27 * 3 + 26 + 1,
    }
    assert content["output.weight"].block is Q6_K and content["token_embd.weight"].block is Q4_0
    assert content["blk.5.ffn_down_exps.weight"].shape == (64, 2048, 1408)
    assert content["blk.5.attn_k_b.weight"].shape == (16, 512, 128)
    assert content["blk.5.attn_v_b.weight"].shape == (16, 128, 512)
    assert sum(tensor.nbytes for tensor in content.values()) < 9e9


def test_widths_that_do_not_fill_a_block_get_llama_cpps_next_choice(path):
    tensors = Reader(path).tensors
    assert tensors["output.weight"][1] is Q8_0  # 288 columns
    assert tensors["blk.0.attn_k_b.weight"][:2] == ((3, 96, 24), F16)
    assert tensors["blk.1.ffn_gate_inp.weight"][:2] == ((5, 288), F32)


def test_numbers_are_as_large_as_in_a_net_that_keeps_its_variance(path):
    tensors = Reader(path).tensors
    for name, (shape, block, stored) in tensors.items():
        numbers = values(block, stored)
        assert np.isfinite(numbers).all() and len(numbers) == math.prod(shape)
        if "norm" in name:
            assert (numbers == 1).all()
            continue
        wanted = 96**-0.5 if "attn_k_b" in name else 1.0 if "token_embd" in name else shape[-1] ** -0.5
        if "attn_output" in name or "ffn_down" in name:
            wanted /= 6**0.5  # two additions to the stream in each of three layers
        assert np.sqrt((numbers**2).mean()) == pytest.approx(wanted, rel=0.25), name


def test_six_bits_are_as_large_as_they_say():
    tensor = Tensor("output.weight", (64, 1024), Q6_K, 0.03)
    stored = b"".join(chunk.tobytes() for chunk in tensor.chunks(np.random.default_rng()))
    assert len(stored) == tensor.nbytes == 64 * 4 * 210
    assert np.sqrt((values(Q6_K, stored) ** 2).mean()) == pytest.approx(0.03, rel=0.25)


def test_a_tensor_is_the_same_length_in_any_chunks(monkeypatch):
    tensor = Tensor("x", (7, 320), Q4_0, 1.0)
    monkeypatch.setattr(gguf, "CHUNK", 100)  # five blocks
    chunks = list(tensor.chunks(np.random.default_rng()))
    assert max(map(len, chunks)) == 5 and sum(chunk.nbytes for chunk in chunks) == tensor.nbytes


def test_keys_say_what_the_shape_is(path):
    keys = Reader(path).keys
    model = {key.removeprefix("deepseek2."): value for key, value in keys.items() if key.startswith("deepseek2.")}
    assert keys["general.architecture"] == "deepseek2" and "tiny" in keys["general.name"]
    wanted = {
        "vocab_size": 97, "embedding_length": 288, "block_count": 3, "feed_forward_length": 320,
        "leading_dense_block_count": 1, "attention.head_count": 3, "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0, "attention.kv_lora_rank": 96, "attention.key_length": 104,
        "attention.value_length": 96, "attention.key_length_mla": 32, "attention.value_length_mla": 32,
        "rope.dimension_count": 8, "expert_count": 5, "expert_used_count": 2, "expert_shared_count": 2,
        "expert_feed_forward_length": 64, "expert_weights_norm": True, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {key: model.get(key) for key in wanted} == wanted
    assert model["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)


def test_queries_through_a_latent_tied_ends_and_no_experts(tmp_path):
    config = replace(TINY, q_lora_rank=64, tie_word_embeddings=True, n_routed_experts=None, n_group=1)
    read = Reader(write(config, tmp_path / "dense.gguf"))
    assert {"blk.2.attn_q_a.weight", "blk.2.attn_q_a_norm.weight", "blk.2.attn_q_b.weight"} <= set(read.tensors)
    assert "output.weight" not in read.tensors and read.tensors["token_embd.weight"][1] is Q8_0
    assert read.keys["deepseek2.leading_dense_block_count"] == 3 and "deepseek2.expert_count" not in read.keys
    assert sum(math.prod(shape) for shape, _, _ in read.tensors.values()) == config.parameters().total


def test_the_seed_decides(tmp_path):
    one, same, other = (
        write(TINY, tmp_path / name, seed).read_bytes() for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert one == same != other and len(one) == len(other)


@pytest.mark.parametrize("change", [{"moe_layer_freq": 2}, {"n_shared_experts": None}])
def test_what_llama_cpp_has_no_place_for_is_refused(change, tmp_path):
    with pytest.raises(RequestError, match=next(iter(change))):
        write(replace(TINY, **change), tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_left_alone(tmp_path):
    huge = replace(TINY, n_routed_experts=2**28)
    with pytest.raises(RequestError, match="GB are free"):
        write(huge, tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


def test_llama_cpps_own_reader_agrees(path):
    reader = pytest.importorskip("gguf", reason="needs `pip install gguf`").GGUFReader(path)
    ours = Reader(path)
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == ours.keys
    assert [tensor.name for tensor in reader.tensors] == list(ours.tensors)
    for tensor in reader.tensors:
        shape, block, stored = ours.tensors[tensor.name]
        assert tuple(tensor.shape.tolist())[::-1] == shape and int(tensor.tensor_type) == block.code
        assert tensor.data.tobytes() == stored
