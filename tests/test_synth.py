"""A synthetic checkpoint has the shape it says, weights with which a model computes, and is never half there."""

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from workbench.codec import Codes, Float, Groups, Tiles, unpack_bits
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.matrix import Matrix
from workbench.model import Model
from workbench.noise import Noise, fill
from workbench.pack import DESCRIPTION, UNFINISHED, Pack, PackedSource, Shelf, experts_file
from workbench.packfile import PackFile, PackWriter
from workbench.packing import verify
from workbench.probe import Probe
from workbench.recipe import Recipe
from workbench.sizes import show_bytes
from workbench.synth import Synth, disk_bytes
from workbench.tokenizer import Tokenizer

# routing limited to groups and a compressed query as in V2, widths that are no multiple of a run or of a group
TINY = replace(
    Config.preset("v2"), vocab_size=4200, hidden_size=136, intermediate_size=200, moe_intermediate_size=40,
    num_hidden_layers=6, num_attention_heads=4, q_lora_rank=50, kv_lora_rank=72, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=24, n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=3,
    bos_token_id=4078, eos_token_id=4079, max_position_embeddings=2048,
)  # fmt: skip
LITE = replace(TINY, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.0)
CODECS = (Codes(8), Groups(3, 64), Groups(4, 64), Groups(6, 64), Tiles(128), Float(torch.bfloat16))
PRESETS = ("bf16", "fp8", "int8", "int6", "int4", "int3")


def synth(config=TINY, recipe="int4", **how):
    return Synth(config, Recipe.named(recipe), **how)


class Seen(Probe):
    """Everything, by site and layer."""

    def __init__(self):
        self.sites, self.layer = {}, None

    def at(self, layer):
        self.layer = layer
        return self

    def opens(self, op):
        return op == "attend"

    def __call__(self, site, x):
        self.sites.setdefault(site, {})[self.layer] = x[0]
        return x


def run(pack, tokens):
    seen = Seen()
    with torch.inference_mode():
        logits = Model(pack.config, PackedSource(pack, torch.float32))(tokens[None], probe=seen)[0]
    return logits, seen.sites


@pytest.fixture(scope="module", params=["pocket", "v2 in small", "v2-lite in small"])
def written(request, tmp_path_factory):
    """A checkpoint, and what its model does with 240 tokens: (pack, logits, sites)."""
    one = {"pocket": Synth.named("pocket"), "v2 in small": synth(), "v2-lite in small": synth(LITE)}[request.param]
    pack = one.write(tmp_path_factory.mktemp("synth") / "out")
    tokens = torch.randint(0, 4000, (240,), generator=torch.Generator().manual_seed(1))
    return pack, *run(pack, tokens)


def rms(x):
    return float(x.float().square().mean().sqrt())


def test_activations_stay_sane_through_all_layers(written):
    pack, logits, sites = written
    assert logits.isfinite().all()
    sizes = [rms(x) for x in sites["resid.post"].values()]
    assert 0.9 < sizes[0] < 1.6 and 1.2 < sizes[-1] < 5
    assert all(one * 0.9 < following < one * 1.7 for one, following in zip(sizes, sizes[1:]))
    branch = (2 * pack.config.num_hidden_layers) ** -0.5
    for site in ("moe.routed_out", "moe.shared_out"):
        assert all(0.4 * branch < rms(x) < 2.5 * branch for x in sites[site].values()), site
    for scores in sites["attn.scores_content"].values():
        assert 0.3 < float(scores.std()) < 2
    for scores in sites["attn.scores_position"].values():
        assert float(scores.abs().max()) < 25


def test_the_next_token_is_neither_certain_nor_any(written):
    pack, logits, _ = written
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 2 < float(entropy.mean()) < math.log(pack.config.vocab_size) - 2
    assert len(logits.argmax(-1).unique()) > 50
    assert float(logits.softmax(-1)[:, pack.config.bos_token_id :].sum(-1).max()) < 0.1  # text, and no early end


def test_experts_have_favourites_by_layer_and_are_used_again_at_the_next_token(written):
    pack, _, sites = written
    experts, chosen = pack.config.n_routed_experts, pack.config.num_experts_per_tok
    loads, again, by_load = [], [], []
    for ids in sites["moe.experts"].values():
        used = torch.zeros(len(ids), experts).scatter(1, ids, 1.0)
        loads.append(used.mean(0))
        again.append(float((used[1:] * used[:-1]).sum(-1).mean()) / chosen)
        by_load.append(float(loads[-1].square().sum()) / chosen)  # if tokens knew nothing of each other
    loads, layers = torch.stack(loads), len(loads)
    assert float((loads.amax(-1) / loads.mean(-1)).mean()) > 2
    assert all(float(torch.corrcoef(loads)[one, one - 1]) < 0.7 for one in range(1, layers))
    uniform = chosen / experts
    assert sum(by_load) / layers > 1.3 * uniform
    assert sum(again) / layers > 1.15 * sum(by_load) / layers


def test_near_tokens_are_attended_to_more_than_far_ones(written):
    _, _, sites = written
    for pattern in sites["attn.pattern"].values():
        near, far = (float(pattern.diagonal(-distance, 1, 2).mean()) for distance in (1, 12))
        assert near > 1.5 * far


@pytest.mark.parametrize("recipe", PRESETS)
def test_every_recipe_opens_with_all_checksums_right_and_says_it_is_synthetic(recipe, tmp_path):
    config = replace(TINY, num_hidden_layers=3)
    assert synth(config, recipe, name="some").write(tmp_path / "out").config == config
    pack = Pack.open(tmp_path / "out")
    assert pack.synthetic and pack.notes["synthetic"] == "some" and pack.notes["seed"] == 0
    assert pack.recipe == Recipe.named(recipe) and pack.config == config
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").lower()
    assert "synthetic" in card and "random" in card and "nothing about the quality" in card
    numbers = 0
    for name in pack.files:
        file = PackFile(pack.path / name)
        for tensor, stored in file.stored.items():
            file.read(tensor, torch.empty(stored.nbytes, dtype=torch.uint8))  # raises where a checksum is wrong
            numbers += stored.nbytes > 0
    assert numbers
    logits, _ = run(pack, torch.arange(100, 130))
    assert logits.isfinite().all() and float(logits[:, : config.bos_token_id].std()) == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("width", [136, 1408, 37])
def test_numbers_have_the_spread_that_was_asked_for_and_codes_are_legal(codec, width):
    matrix = Matrix.empty(codec, (700, width))
    for part in matrix.parts:
        part.view(torch.uint8).fill_(0xFF)  # poison: NaN in floats, the code that is never used
    fill(matrix, 0.0171, Noise(TINY, Recipe.named("int4"), 3)._draws("x"))
    dense = matrix.dense(torch.float32)
    assert float(dense.std()) == pytest.approx(0.0171, rel=0.02) and abs(float(dense.mean())) < 0.0171 * 0.02
    assert float(dense.std(0).min()) > 0.8 * 0.0171 and float(dense.std(1).min()) > 0.3 * 0.0171
    assert len(dense.unique(dim=0)) == 700
    if isinstance(codec, Codes | Groups):
        codes = unpack_bits(matrix.parts[0], codec.bits, width)
        assert int(codes.max()) == 2**codec.bits - 2  # one more would be one that no quantiser writes


@pytest.mark.parametrize("name", ["v2", "v2-lite"])
def test_a_release_has_its_exact_shape_and_says_before_what_it_takes(name):
    planned, preset = Synth.named(name), Config.preset(name)
    assert replace(planned.config, bos_token_id=100000, eos_token_id=100001) == preset
    shapes = [math.prod(shape) for tensors in planned._tensors.values() for shape in tensors.values()]
    routed = 3 * preset.hidden_size * preset.moe_intermediate_size * preset.n_routed_experts * len(planned._experts)
    assert sum(shapes) + routed == preset.parameters().total
    bits = 8 * planned.nbytes / preset.parameters().total
    assert 4.1 < bits < 4.4
    shared = Synth.named(name, shared=True)
    saved = (len(planned._experts) - 1) * preset.n_routed_experts * planned.layout.nbytes
    assert saved < planned.nbytes - shared.nbytes < saved * 1.001  # and headers


def test_a_seed_gives_the_same_bytes_and_another_others(tmp_path):
    one, same, other = (synth(seed=seed).write(tmp_path / str(n)) for n, seed in enumerate((5, 5, 6)))
    assert one.checksum == same.checksum != other.checksum
    for name in one.files:
        assert (one.path / name).read_bytes() == (same.path / name).read_bytes()
        assert one.files[name]["checksums"] != other.files[name]["checksums"], name
    first, second = (one.files[experts_file(layer)]["checksums"] for layer in (1, 2))
    assert first != second


def test_shared_experts_are_one_file_that_every_layer_reads(tmp_path):
    whole, shared = synth(), synth(shared=True)
    said = []
    pack = shared.write(tmp_path / "made", lambda done, of: said.append((done, of)))
    assert [done for done, _ in said] == sorted(done for done, _ in said) and said[-1] == (shared.nbytes, shared.nbytes)
    links = [file for file in pack.path.iterdir() if file.is_symlink()]
    assert {file.name for file in links} == {experts_file(layer) for layer in range(2, 6)}
    assert pack.nbytes == whole.nbytes  # as the model sees it
    others = sum(file.stat().st_size for file in pack.path.iterdir() if file.suffix != ".safetensors")
    assert disk_bytes(pack.path) == shared.nbytes + others < whole.nbytes * 0.8
    pack.path.rename(tmp_path / "moved")
    pack = Pack.open(tmp_path / "moved")
    blocks = [torch.empty(pack.layout.nbytes, dtype=torch.uint8) for _ in range(2)]
    for layer, into in zip((1, 4), blocks):
        into = torch.empty(2 * 4096 + pack.layout.nbytes, dtype=torch.uint8)  # reads past the cache want a page
        into = into[-into.data_ptr() % 4096 :][: pack.layout.nbytes]
        Shelf(pack).read(layer, 7, into)
        blocks[layer > 1].copy_(into)
    expected = torch.full((pack.layout.nbytes,), 0xFF, dtype=torch.uint8)
    Noise(TINY, Recipe.named("int4")).block(1, 7, pack.layout, expected)
    assert all(torch.equal(block, expected) for block in blocks)
    assert run(pack, torch.arange(40))[0].isfinite().all()


def stopped(at):
    """A progress that is interrupted when so many bytes are done."""

    def progress(done, of):
        if done > at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("shared", [False, True])
def test_an_interrupted_one_does_not_open_and_goes_on_where_it_was(tmp_path, shared):
    one, out = synth(shared=shared), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        one.write(out, stopped(one.nbytes // 2))
    assert not (out / DESCRIPTION).exists()
    with pytest.raises(CheckpointError):
        Pack.open(out)
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert kept and len(kept) < len(one._real)
    missing = next(file for file in one._real if file not in kept)
    (out / f"{missing}.part").write_bytes(b"cut short")
    said = []
    pack = synth(shared=shared).write(out, lambda done, of: said.append(done))
    assert said[0] > one.nbytes // 2 and said[-1] == one.nbytes
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert pack.checksum == synth(shared=shared).write(tmp_path / "at once").checksum
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "at once").iterdir()}


@pytest.mark.parametrize("damage", ["missing", "short", "packed.json"])
def test_what_is_damaged_is_made_again_and_nothing_else(tmp_path, damage):
    made, out = synth().write(tmp_path / "out"), tmp_path / "out"
    kept = (out / "weights-base.safetensors").stat().st_mtime_ns
    if damage == "missing":
        (out / experts_file(2)).unlink()
    elif damage == "short":
        os.truncate(out / experts_file(2), 5000)
    else:
        said = (out / DESCRIPTION).read_text(encoding="utf-8")
        (out / DESCRIPTION).write_text(said.replace(made.checksum, "0" * 64), encoding="utf-8")
    with pytest.raises(CheckpointError):
        Pack.open(out)
    with pytest.raises(CheckpointError, match="packed.json|experts-layer-002"):
        synth(seed=1).write(out)
    assert synth().write(out).checksum == made.checksum == Pack.open(out).checksum
    verify(out)
    assert (out / "weights-base.safetensors").stat().st_mtime_ns == kept and not (out / UNFINISHED).exists()


def test_a_run_that_was_killed_in_its_first_moment(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{UNFINISHED}.part").write_text("{")
    verify(synth().write(tmp_path / "out").path)
    assert not list((tmp_path / "out").glob("*.part"))


def test_two_do_not_write_in_one_directory(tmp_path):
    out, said = tmp_path / "out", []

    def at_once(done, of):
        with pytest.raises(RequestError, match="another `workbench pack` or `workbench synth` writes there"):
            synth().write(out)
        said.append(done)

    synth().write(out, at_once)
    assert said[-1] == synth().nbytes
    verify(out)


def test_what_is_there_already_is_kept(tmp_path):
    out = tmp_path / "out"
    made = synth().write(out)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert synth().write(out).checksum == made.checksum  # the same again: nothing to do
    for other in (synth(seed=1), synth(recipe="int3"), synth(LITE), synth(shared=True)):
        with pytest.raises(CheckpointError, match="another packed checkpoint"):
            other.write(out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    begun = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        synth().write(begun, stopped(-1))
    with pytest.raises(CheckpointError, match="another unfinished"):
        synth(seed=1).write(begun)
    for name in ("notes", "config.json", UNFINISHED):
        own = tmp_path / f"own {name}"
        own.mkdir()
        (own / name).write_text("mine", encoding="utf-8")
        with pytest.raises(CheckpointError, match="is there and is no unfinished"):
            synth().write(own)
        assert [file.name for file in own.iterdir()] == [name]
    with pytest.raises(CheckpointError, match="is a file"):
        synth().write(tmp_path / "own notes" / "notes")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    one, out = synth(), tmp_path / "new" / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(0, 0, one.nbytes - 1))
    with pytest.raises(BudgetError, match=rf"takes {show_bytes(one.nbytes)}, .*--shared takes less"):
        one.write(out)
    assert not out.parent.exists()
    with pytest.raises(KeyboardInterrupt):
        synth(shared=True).write(out, stopped(1))  # takes less, and fits
    shutil.rmtree(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(0, 0, one.nbytes))
    with pytest.raises(KeyboardInterrupt):
        one.write(out, stopped(one.nbytes // 2))
    monkeypatch.setattr(shutil, "disk_usage", lambda where: Usage(0, 0, one.nbytes // 2))
    assert one.write(out).synthetic  # what is there already needs no room


def test_a_full_disk_is_said_and_leaves_nothing_that_opens(tmp_path, monkeypatch):
    write = PackWriter.write
    calls = []

    def full(writer, tensor):
        calls.append(writer)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, tensor)

    monkeypatch.setattr(PackWriter, "write", full)
    with pytest.raises(BudgetError, match="disk is full"):
        synth().write(tmp_path / "out")
    assert not (tmp_path / "out" / DESCRIPTION).exists()
    monkeypatch.setattr(PackWriter, "write", write)
    assert Pack.open(synth().write(tmp_path / "out").path).synthetic


def test_the_tokenizer_is_pockets(tmp_path):
    pack = Synth.named("pocket", "int8").write(tmp_path / "out")
    tokenizer = Tokenizer(pack.path)
    config = json.loads((pack.path / "config.json").read_text(encoding="utf-8"))
    assert (tokenizer.bos, tokenizer.eos) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.decode(tokenizer.encode("two and three, 你好")) == "two and three, 你好"
    assert tokenizer.decode([100_000]) == ""


def test_exceptions_of_a_recipe_hold_and_plain_experts_are_not_shared(tmp_path):
    recipe = "int4,*.experts.*=plain,*.mlp.gate.weight=int8,lm_head.weight=bf16,*kv_a_proj*=fp8,*.q_*_proj.weight=fp8"
    pack = synth(recipe=recipe).write(tmp_path / "out")
    assert pack.layout is None and not list(pack.path.glob("experts-*"))
    assert run(pack, torch.arange(60))[0].isfinite().all()
    with pytest.raises(RequestError, match="shared"):
        synth(recipe=recipe, shared=True)
