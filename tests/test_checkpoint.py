"""Checkpoints: what is saved is what is loaded, here and in transformers; what is broken is named before it is read."""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from workbench import checkpoint
from workbench.checkpoint import Random, Safetensors, resolve, save
from workbench.config import Config
from workbench.errors import CheckpointError
from workbench.model import Model
from workbench.opening import open_model
from workbench.shards import INDEX, SINGLE, Stored

ROOT = Path(__file__).parent.parent
HEAD = "lm_head.weight"  # the first tensor of the first shard
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"

TINY = replace(
    Config.preset("pocket"),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    bos_token_id=62,
    eos_token_id=63,
    dtype="float32",
)
TOKENS = torch.arange(60).view(2, 30) % 59


def random_model(seed=0, dtype=torch.float32, **changes) -> Model:
    config = replace(TINY, **changes)
    return Model(config, Random(config, seed, dtype, std=0.2))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def same(one: Model, other: Model) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def rewrite(path: Path, change) -> None:
    """Passes the tensors of model.safetensors through `change`, which may edit the dictionary."""
    tensors = load_file(path / SINGLE)
    change(tensors)
    (path / SINGLE).unlink()
    save_file(tensors, path / SINGLE)


def shard(path: Path, count: int = 3) -> list[str]:
    """model.safetensors as shards numbered like V2-Lite's, five digits of six; every third tensor goes to the same."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = [f"model-{n:05}-of-{count:06}.safetensors" for n in range(1, count + 1)]
    weight_map = {name: names[i % count] for i, name in enumerate(sorted(tensors, key=lambda name: name != HEAD))}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save(model, tmp_path / "tiny")
    return tmp_path / "tiny"


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "tie_word_embeddings": True}, {"rope_scaling": None}])
def test_saved_and_opened_again_is_the_same_model(tmp_path, dtype, changes):
    model = random_model(dtype=dtype, **changes)
    save(model, tmp_path / "m")
    again = open_model(tmp_path / "m")
    assert again.dtype == dtype and again.config == replace(model.config, dtype=str(dtype).removeprefix("torch."))
    assert same(model, again)
    assert torch.equal(model(TOKENS), again(TOKENS))


def test_shards_are_as_small_as_asked_and_load_the_same(model, tmp_path):
    save(model, tmp_path / "m", max_shard_bytes=20_000)
    shards = list((tmp_path / "m").glob("model-*-of-*.safetensors"))
    largest = max(tensor.nbytes for tensor in model.tensors.values())
    assert len(shards) > 5 and max(file.stat().st_size for file in shards) < max(20_000, largest) + 10_000
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.tensors.values())
    assert same(model, open_model(tmp_path / "m"))


def test_the_index_is_believed_whatever_the_shards_are_called(model, saved):
    shard(saved)
    assert same(model, open_model(saved))


def test_a_file_can_be_opened_by_itself(model, saved):
    assert same(model, open_model(saved / SINGLE))


def test_saving_in_another_dtype_rounds_once(model, tmp_path):
    save(model, tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(open_model(tmp_path / "m").tensors[GATE], model.tensors[GATE].bfloat16())


def test_a_model_stands_on_its_own_once_opened(saved):
    model = open_model(saved)
    before = model(TOKENS)
    rewrite(saved, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    (saved / SINGLE).write_bytes(b"")
    assert torch.equal(model(TOKENS), before)


def test_what_was_trained_is_what_is_saved(tmp_path):
    model = random_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save(model, tmp_path / "m")
    fresh = random_model()
    again = open_model(tmp_path / "m")
    assert all(torch.equal(again.tensors[name], fresh.tensors[name] + 1) for name in fresh.tensors)


# number formats


@pytest.mark.parametrize(
    "stored",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_float_is_read_exactly_or_rounded_once(tmp_path, stored, wanted):
    values = torch.linspace(-3, 3, 60).view(5, 12).to(stored)
    save_file({"a.weight": values, "b.weight": values.clone()}, tmp_path / SINGLE)
    source = Safetensors(tmp_path, dtype=wanted)
    into = torch.zeros(10, 12, dtype=wanted)
    assert torch.equal(source.take("a.weight", (5, 12)), values.to(wanted))
    assert source.unused() == ["b.weight"]
    assert source.take("b.weight", (5, 12), into=into[5:]).data_ptr() == into[5:].data_ptr()
    assert torch.equal(into, torch.cat([torch.zeros(5, 12), values.float()]).to(wanted))
    assert source.unused() == []


@pytest.mark.parametrize(
    ("named", "opened"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)]
)
def test_auto_is_what_the_config_says_and_never_fp16(saved, named, opened):
    edit_json(saved / "config.json", torch_dtype=named)
    assert open_model(saved).dtype == opened


def test_asking_for_fp16_is_refused_with_a_way_out(saved):
    with pytest.raises(CheckpointError, match=r"(?s)fp16.*bf16"):
        open_model(saved, dtype=torch.float16)


def test_old_rotary_buffers_are_ignored(model, saved):
    rewrite(saved, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(model, open_model(saved))


# transformers


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", minversion="5.23")


def oracle(transformers, path: Path) -> torch.Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        {"rope_scaling": None},
    ],
    ids=["like 236B", "like Lite", "no YaRN"],
)
def test_transformers_opens_what_is_saved_here(transformers, tmp_path, changes):
    model = random_model(**changes)
    save(model, tmp_path / "m", max_shard_bytes=50_000)
    assert (oracle(transformers, tmp_path / "m") - model(TOKENS)).abs().max() <= 1e-4


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_what_transformers_saves_opens_here(transformers, saved, tmp_path, shards):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (tmp_path / "theirs" / INDEX).exists() == (shards == "40KB")
    model = open_model(tmp_path / "theirs")
    assert model.config == replace(TINY, aux_loss_alpha=model.config.aux_loss_alpha)
    assert (oracle(transformers, tmp_path / "theirs") - model(TOKENS)).abs().max() <= 1e-4


def test_generation_settings_go_along(transformers, saved):
    settings = transformers.GenerationConfig.from_pretrained(saved)
    assert (settings.bos_token_id, settings.eos_token_id, settings.temperature) == (62, 63, 0.3)


# random weights


def test_random_weights_depend_on_name_and_seed_alone():
    shapes = {"a.weight": (7, 9), "b.weight": (40, 3), "c.q_a_layernorm.weight": (6,)}
    source, reverse, other = Random(TINY), Random(TINY), Random(TINY, seed=1)
    forward = {name: source.take(name, shape) for name, shape in shapes.items()}
    into = {name: reverse.take(name, shape, torch.empty(shape)) for name, shape in reversed(shapes.items())}
    assert all(torch.equal(forward[name], into[name]) for name in shapes)
    assert not torch.equal(other.take("a.weight", (7, 9)), forward["a.weight"])
    assert torch.equal(forward["c.q_a_layernorm.weight"], torch.ones(6))


def test_random_weights_have_the_spread_of_the_config():
    drawn = Random(replace(TINY, initializer_range=0.006)).take("a.weight", (200, 200))
    assert drawn.std().item() == pytest.approx(0.006, rel=0.02) and abs(drawn.mean().item()) < 1e-4
    assert Random(std=3.0, dtype=torch.bfloat16).take("a.weight", (9, 9)).dtype == torch.bfloat16


# what can be wrong with a checkpoint


def cut(path):
    with (path / SINGLE).open("r+b") as file:
        file.truncate((path / SINGLE).stat().st_size - 100)


def lengthen(path):
    with (path / SINGLE).open("ab") as file:
        file.write(b"more")


def spoil_header(path):
    content = bytearray((path / SINGLE).read_bytes())
    content[20:24] = b"\xff\xff\xff\xff"
    (path / SINGLE).write_bytes(content)


def lfs_placeholder(path):
    (path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 31412973568\n")


def lose_shard(path):
    (path / shard(path)[1]).unlink()


def lose_from_shard(path):
    first = path / shard(path)[0]
    tensors = load_file(first)
    del tensors[HEAD]
    save_file(tensors, first)


def double_in_shards(path):
    first, second, _ = (path / name for name in shard(path))
    save_file(load_file(second) | {HEAD: load_file(first)[HEAD]}, second)


def edit_index(path, shard_of_head):
    shard(path)
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    del weight_map[HEAD]
    edit_json(path / INDEX, weight_map=weight_map | shard_of_head)


def lose_index(path):
    shard(path)
    (path / INDEX).unlink()


def only_pickle(path):
    (path / SINGLE).rename(path / "pytorch_model.bin")


DAMAGE = {
    "cut short": (cut, [SINGLE, "bytes", "download it again"]),
    "longer than its header says": (lengthen, [SINGLE, "download it again"]),
    "corrupt header": (spoil_header, [SINGLE, "header", "download it again"]),
    "empty file": (lambda path: (path / SINGLE).write_bytes(b""), [SINGLE, "0 bytes", "download it again"]),
    "Git LFS placeholder": (lfs_placeholder, [SINGLE, "Git LFS", "download it again"]),
    "missing shard": (lose_shard, ["model-00002-of-000003.safetensors", "1 of 3", "Download"]),
    "shard without one of its tensors": (lose_from_shard, [HEAD, "00001-of", "download both again"]),
    "tensor in two shards": (double_in_shards, [HEAD, "00001-of", "00002-of", "download all of them again"]),
    "tensor in another shard": (
        lambda path: edit_index(path, {HEAD: "model-00003-of-000003.safetensors"}),
        [HEAD, "00001-of", "00003-of", "download both again"],
    ),
    "tensor the index does not list": (lambda path: edit_index(path, {}), [HEAD, INDEX, "download both again"]),
    "no index": (lose_index, [INDEX, "model-00001-of-000003.safetensors", "Download it too"]),
    "index is no JSON": (lambda path: shard(path) and (path / INDEX).write_text("{"), [INDEX, "Download it again"]),
    "index without a map": (lambda path: shard(path) and (path / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index maps to numbers": (
        lambda path: shard(path) and (path / INDEX).write_text('{"weight_map": {"a": 1}}'),
        [INDEX, "weight_map"],
    ),
    "only pickle": (only_pickle, ["pytorch_model.bin", "save_pretrained"]),
    "no weights": (lambda path: (path / SINGLE).unlink(), [SINGLE, INDEX, "config.json", "Download the weights"]),
    "missing tensor": (
        lambda path: rewrite(path, lambda t: t.pop(GATE)),
        [GATE, "[16, 32]", "missing", "download both"],
    ),
    "extra tensors": (
        lambda path: rewrite(path, lambda t: t.update({f"model.layers.3.x{n}": torch.ones(1) for n in range(7)})),
        ["7 tensors", "model.layers.3.x0", "and 2 more", "num_hidden_layers"],
    ),
    "mis-shaped tensor": (
        lambda path: rewrite(path, lambda t: t.update({GATE: torch.zeros(16, 31)})),
        [GATE, "[16, 32]", "[16, 31]", "config.json"],
    ),
    "transposed tensor": (
        lambda path: rewrite(path, lambda t: t.update({GATE: torch.zeros(32, 16)})),
        [GATE, "[16, 32]", "[32, 16]"],
    ),
    "integers": (
        lambda path: rewrite(path, lambda t: t.update({GATE: torch.zeros(16, 32, dtype=torch.int32)})),
        [GATE, "I32", "quantised", "bfloat16"],
    ),
    "fp8 with scales": (
        lambda path: rewrite(path, lambda t: t.update({f"{GATE}_scale_inv": torch.ones(1, 1)})),
        [SINGLE, "weight_scale_inv", "not supported yet", "Dequantise"],
    ),
    "another model": (
        lambda path: edit_json(path / "config.json", model_type="llama"),
        ["config.json", "llama", "deepseek_v2"],
    ),
    "config is no JSON": (
        lambda path: (path / "config.json").write_text("{'model_type': 1"),
        ["config.json", "not valid JSON", "Download it again"],
    ),
    "config of another size": (
        lambda path: edit_json(path / "config.json", hidden_size=64),
        ["model.embed_tokens.weight", "[64, 64]", "[64, 32]", "config.json"],
    ),
    "no config": (lambda path: (path / "config.json").unlink(), ["config.json", "no such file"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_checkpoint_is_named_before_anything_is_read(saved, monkeypatch, case):
    damage, words = DAMAGE[case]
    damage(saved)
    monkeypatch.setattr(Stored, "read", lambda self: pytest.fail("read before all was checked"))
    with pytest.raises(CheckpointError) as caught:
        open_model(saved)
    for word in [str(saved), *words]:
        assert word in str(caught.value)


def test_a_path_that_is_not_there(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="no such"):
            open_model(path)
    with pytest.raises(CheckpointError, match="no such checkpoint.*Give a directory"):
        Safetensors(tmp_path / "none", torch.float32)


def test_a_file_that_shrinks_while_it_is_read(saved):
    source = Safetensors(saved)
    cut(saved)
    last = max(source.stored, key=lambda name: source.stored[name].start)
    with pytest.raises(CheckpointError, match="shorter while it was read. Download it again"):
        source.take(last, source.stored[last].shape)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, RuntimeError])
def test_nothing_stays_of_a_model_that_was_not_finished(saved, monkeypatch, error):
    made, empty, read = [], torch.empty, Stored.read

    def watched(*args, **options):
        tensor = empty(*args, **options)
        made.append(weakref.ref(tensor))
        return tensor

    def read_or_fail(self):
        if len(made) > 60:
            raise error("out of memory")
        return read(self)

    monkeypatch.setattr(Stored, "read", read_or_fail)
    monkeypatch.setattr(torch, "empty", watched)
    with pytest.raises(error) as caught:
        open_model(saved, dtype=torch.bfloat16)
    gc.collect()
    assert len(made) > 60 and not any(tensor() is not None for tensor in made)
    assert any("read_or_fail" in note for note in getattr(caught.value, "__notes__", [])) == (error is RuntimeError)


# memory


PEAK = """
import sys, torch
from workbench.checkpoint import Safetensors
from workbench.opening import open_model
from workbench.config import Config
from workbench.model import Model

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

tiny, path, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
open_model(tiny, dtype=dtype)
before = peak()
model = open_model(path, dtype=dtype)
print(peak() - before, sum(t.nbytes for t in model.tensors.values()), max(t.nbytes for t in model.tensors.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opening_takes_the_model_and_one_tensor(tmp_path, saved, dtype):
    model = random_model(
        dtype=torch.bfloat16, vocab_size=4096, hidden_size=512, moe_intermediate_size=256, n_routed_experts=32
    )
    save(model, tmp_path / "m")
    command = [sys.executable, "-c", PEAK, saved, tmp_path / "m", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, size, largest = map(int, done.stdout.split())
    assert size > 60e6  # far beyond what is forgiven
    assert grown < size + largest + 12e6  # 12 MB for headers and the allocator; a memory map would add 70 MB


# saving over what is there


def test_saving_replaces_the_weights_and_keeps_the_rest(saved):
    (saved / "README.md").write_text("the card")
    (saved / "tokenizer.json").write_text("{}")
    (saved / "notes").mkdir()
    (saved / "notes/day1.txt").write_text("mine")
    shard(saved)
    other = random_model(seed=1)
    save(other, saved)
    assert same(other, open_model(saved))
    assert set(files(saved)) == {
        *("config.json", "generation_config.json", SINGLE, "README.md", "tokenizer.json"),
        str(Path("notes/day1.txt")),
    }
    assert os.listdir(saved.parent) == ["tiny"]


def test_the_tokenizer_goes_along(model, saved, tmp_path):
    (saved / "tokenizer.json").write_text('{"is": "copied"}')
    (saved / "tokenizer_config.json").write_text("{}")
    (saved / "pytorch_model.bin").write_text("is not")
    save(model, tmp_path / "deep/er/m", files_from=saved)
    written = files(tmp_path / "deep/er/m")
    assert set(written) == {
        *("config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json")
    }
    assert written["tokenizer.json"] == b'{"is": "copied"}'
    save(model, saved, files_from=saved)
    assert (saved / "tokenizer.json").read_text() == '{"is": "copied"}'


def test_a_tokenizer_that_is_not_there_is_said_before_anything_changes(model, saved, tmp_path):
    before = files(saved)
    with pytest.raises(CheckpointError, match=r"no tokenizer.json"):
        save(random_model(seed=1), saved, files_from=tmp_path)
    assert files(saved) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("broken")])
def test_a_save_that_fails_leaves_the_old_checkpoint(saved, monkeypatch, error):
    before, written = files(saved), []

    def write_two(*args, **options):
        if len(written) == 2:
            raise error
        written.append(args[1])
        save_file(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", write_two)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as caught:
        save(random_model(seed=1), saved, max_shard_bytes=20_000)
    if isinstance(error, OSError):
        assert all(word in str(caught.value) for word in (str(saved), "No space left", "Nothing there was changed"))
    assert len(written) == 2 and files(saved) == before
    assert os.listdir(saved.parent) == ["tiny"]


def test_a_save_that_cannot_take_the_place_puts_the_old_checkpoint_back(saved, monkeypatch):
    before, rename = files(saved), Path.rename

    def refuse(self, target):
        if Path(target) == saved and not str(self).endswith(".old"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(random_model(seed=1), saved)
    assert files(saved) == before and os.listdir(saved.parent) == ["tiny"]


def test_only_a_checkpoint_is_ever_overwritten(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(CheckpointError, match="not overwritten. Choose another folder"):
            save(model, path)
    assert files(tmp_path) == {"thesis.tex": b"irreplaceable"}
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    with safe_open(tmp_path / "empty" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# names


def test_a_directory_is_itself(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert resolve("tiny") == Path("tiny") and resolve(saved) == saved


@pytest.mark.parametrize("name", ["nothing-here", "a/b/c", "./org/name", "org/na me", "../up"])
def test_a_name_that_is_neither_directory_nor_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert all(word in str(caught.value) for word in (repr(name), str(tmp_path), "owner/name"))


def test_a_file_is_not_a_name(saved):
    with pytest.raises(CheckpointError, match="is a file. Give the directory"):
        resolve(saved / SINGLE)


def test_without_the_hub_package_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name")
    for word in ("org/name", str(tmp_path), 'pip install "deepseek-workbench[hub]"', "give its directory"):
        assert word in str(caught.value)


def cached(home: Path, name: str) -> Path:
    """Where the hub's client keeps a repository of which it knows one revision."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / ("0" * 40)


def test_offline_the_cache_is_used_and_what_is_not_in_it_is_explained(saved, tmp_path):
    pytest.importorskip("huggingface_hub")
    home = tmp_path / "home"
    saved.rename(cached(home, "org/here"))
    code = (
        "from workbench.checkpoint import resolve, CheckpointError\n"
        "print(resolve('org/here'))\n"
        "try: resolve('org/absent')\n"
        "except CheckpointError as error: print(error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
    first, _, rest = done.stdout.partition("\n")
    assert Path(first) == home / "hub/models--org--here/snapshots" / ("0" * 40)
    for word in ("'org/absent'", str(tmp_path), "local cache", "HF_HUB_OFFLINE", "give its directory"):
        assert word in rest


def test_an_interrupted_download_goes_on_instead_of_failing(saved, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, *, allow_patterns, local_files_only=False):
        asked.append((name, local_files_only))
        assert not any(pattern in allow_patterns for pattern in ("*.py", "*.bin", "*"))
        if not local_files_only:
            (saved / "elsewhere").rename(saved / SINGLE)
        return str(saved)

    (saved / SINGLE).rename(saved / "elsewhere")
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("org/name") == saved
    assert asked == [("org/name", True), ("org/name", False)]
    assert resolve("org/name") == saved and asked[2:] == [("org/name", True)]
