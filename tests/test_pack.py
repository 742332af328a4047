"""Opening a packed checkpoint: what is damaged, missing or in the wrong place is an error, and never other tokens."""

import json
import random
import shutil

import pytest
import torch
from packs import LITE, flip, plain, swap

from workbench.blocks import PAGE
from workbench.config import Config
from workbench.errors import CheckpointError
from workbench.model import Model
from workbench.pack import Pack, PackedSource, Shelf
from workbench.packing import pack, verify
from workbench.recipe import Recipe

KINDS = ["weights-base.safetensors", "weights-layer-001.safetensors", "experts-layer-002.safetensors"]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Only to be read."""
    folder = tmp_path_factory.mktemp("packs")
    source = plain(folder / "source")
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (source / "README.md").write_text("A card.")
    return pack(source, folder / "packed", "int4").path


@pytest.fixture
def packed(made, tmp_path):
    return shutil.copytree(made, tmp_path / "packed")


def opened(path, dtype=torch.float32) -> Model:
    return Model(Pack.open(path).config, PackedSource(Pack.open(path), dtype))


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(9)[None])


def test_it_opens_by_its_directory_alone(packed, made):
    moved = packed.rename(packed.with_name("elsewhere"))
    assert torch.equal(logits(opened(moved)), logits(opened(made)))
    assert Config.from_json(moved / "config.json") == LITE
    verify(moved)


def test_nothing_is_read_on_meta_and_nothing_is_left_over(packed):
    for file in packed.glob("*.safetensors"):
        flip(file, file.stat().st_size - 1 - PAGE // 2)  # to read it would be an error
    source = PackedSource(Pack.open(packed), torch.bfloat16, "meta")
    Model(source.pack.config, source)
    assert source.unused() == []


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_in_the_data(packed, name):
    file = packed / name
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, random.randrange(start, file.stat().st_size), random.randrange(8))
    with pytest.raises(CheckpointError, match=f"{name}: .* is damaged"):
        opened(packed)
    with pytest.raises(CheckpointError, match=rf"^1 of \d+ tensors are damaged. The first: .*{name}"):
        verify(packed)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_in_the_header(packed, name):
    """An error, or it changes nothing: the name of what a file was made from is no part of it."""
    file, pack = packed / name, Pack.open(packed)
    before = file.read_bytes()
    said = json.loads(before[8 : 8 + int.from_bytes(before[:8], "little")])
    listed = pack.open_file(name).stored
    length, found = len(json.dumps(said, separators=(",", ":"))), 0
    for at in [*range(8), *random.sample(range(8, 8 + length + 9), 150)]:
        flip(file, at, bit := random.randrange(8))
        try:
            again = pack.open_file(name)
            assert again.stored == listed and again.checksums == pack.open_file(name).checksums
        except CheckpointError as error:
            assert name in str(error)
            found += 1
        flip(file, at, bit)
    assert found > 100 and file.read_bytes() == before


def test_a_changed_checksum_or_name_in_the_header(packed):
    """Whole for any reader, and not what was packed."""
    file = packed / "experts-layer-001.safetensors"
    whole = file.read_bytes()
    for old, new in ((b'"1":', b'"9":'), (b'"crc32":"', b'"crc32":"0')):
        assert whole.count(old) == 1
        text = whole.replace(old, new)
        file.write_bytes(
            text if len(new) == len(old) else text[: whole.index(b" " * 9)] + text[whole.index(b" " * 9) + 1 :]
        )
        with pytest.raises(CheckpointError, match="experts-layer-001"):
            PackedSource(Pack.open(packed), torch.float32)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cut", [1, PAGE])
def test_a_file_cut_short(packed, name, cut):
    file = packed / name
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=f"{name}: [0-9,]+ bytes where [0-9,]+ were written"):
        Pack.open(packed)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file(packed, name):
    (packed / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        Pack.open(packed)


def test_a_missing_description(packed, tmp_path):
    (packed / "packed.json").unlink()
    for ask in (Pack.open, Pack.is_one, opened, verify, lambda path: pack(path, tmp_path / "more")):
        with pytest.raises(CheckpointError, match="lost its packed.json.*same `workbench pack`"):
            ask(packed)


def test_what_is_damaged_says_how_to_make_it_anew_and_is_read_on(packed, made, tmp_path):
    file = packed / KINDS[2]
    flip(file, file.stat().st_size - 1)
    shelf, into = Shelf(Pack.open(packed)), torch.empty(Pack.open(packed).layout.nbytes, dtype=torch.uint8)
    other = pack(plain(tmp_path / "source", seed=1), tmp_path / "other").path
    for repair in (lambda: None, file.unlink, lambda: shutil.copyfile(other / KINDS[2], file)):
        repair()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{KINDS[2]}: 5 is damaged.* remove it and give the same `work"):
                shelf.read(2, 5, into)
    file.unlink()
    pack(made.parent / "source", packed)
    shelf.read(2, 5, into)  # the same, still open
    wanted = torch.empty_like(into)
    Shelf(Pack.open(made)).read(2, 5, wanted)
    assert torch.equal(into, wanted)


@pytest.mark.parametrize("kind", ["weights", "experts"])
def test_files_in_each_others_place(packed, kind):
    swap(packed / f"{kind}-layer-001.safetensors", packed / f"{kind}-layer-002.safetensors")
    with pytest.raises(CheckpointError, match=f"{kind}-layer-00[12].safetensors is not the file that packed.json"):
        opened(packed)
    with pytest.raises(CheckpointError, match=f"^2 of .*{kind}-layer-00[12].safetensors is not the file"):
        verify(packed)


def test_a_file_of_other_weights(packed, tmp_path):
    other = pack(plain(tmp_path / "source", seed=1), tmp_path / "other", "int4").path
    shutil.copyfile(other / KINDS[2], packed / KINDS[2])
    with pytest.raises(CheckpointError, match=f"{KINDS[2]} is not the file that packed.json lists"):
        opened(packed)


def test_a_config_or_tokenizer_of_another_model(packed):
    config = packed / "config.json"
    said = config.read_text()
    for name, new in (
        ("config.json", said.replace('"rope_theta": 10000.0', '"rope_theta": 10000.5')),
        ("config.json", said.replace('"vocab_size": 150', '"vocab_size": 151')),
        ("tokenizer.json", '{"model": {"vocab": {"b": 0}}}'),
        ("tokenizer.json", None),
    ):
        before = (packed / name).read_text()
        assert new != before
        (packed / name).unlink() if new is None else (packed / name).write_text(new)
        with pytest.raises(CheckpointError, match=f"{name} is not the one that was packed"):
            Pack.open(packed)
        (packed / name).write_text(before)
    (packed / "generation_config.json").write_text("{}")  # settings may be edited
    (packed / "README.md").unlink()
    Pack.open(packed)


def test_a_config_that_was_sealed_with_weights_of_another_shape(packed):
    was = Pack.open(packed)
    for other, what in ((LITE.vocab_size + 1, "vocab_size"), (5, "n_routed_experts"), (2, "num_hidden_layers")):
        config = Config.from_json(json.loads((packed / "config.json").read_text()) | {what: other})
        Pack(packed, config, was.recipe, was.files).write()
        source = None
        with pytest.raises(CheckpointError, match="config.json is not the one|not 5 blocks|left over"):
            source = PackedSource(Pack.open(packed), torch.float32, "meta")
            Model(config, source)
            assert source.unused()
            raise CheckpointError("left over")  # the opener refuses what no layer takes
        was.write()


def test_a_flipped_bit_in_packed_json(packed):
    """An error, or it changes nothing but the notes and the names that a reader sees."""
    file, found = packed / "packed.json", 0
    was, size = Pack.open(packed), file.stat().st_size
    for at in random.sample(range(size), 300):
        flip(file, at, bit := random.randrange(8))
        try:
            pack = Pack.open(packed)
            assert (pack.recipe.rules, pack.files, pack.checksum) == (was.recipe.rules, was.files, was.checksum)
        except CheckpointError:
            found += 1
        flip(file, at, bit)
    assert found > 150


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"kind": "another"}, {"files": []}, {"sealed": None}, {"recipe": {}}]
)
def test_a_description_that_is_not_understood(packed, change):
    file = packed / "packed.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="packed.json"):
        Pack.open(packed)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="packed.json"):
        Pack.open(packed)


@pytest.mark.parametrize("rules, message", [
    ("int4,*.experts.3.*=int8", "not packed alike"),
    ("int4,*.experts.*.up_proj.weight=int8", "not packed alike"),
    ("int4,*.experts.*.down_proj.weight=plain", "not packed alike"),
    ("int4,*.layers.2.mlp.experts.*=int8", "in different ways"),
    ("int4,*.shared_experts.up_proj.weight=int8", "must be packed alike"),
    ("int4,*.kv_a_proj_with_mqa.weight=plain", "must be packed alike"),
])  # fmt: skip
def test_what_is_read_together_is_packed_alike(tmp_path, made, rules, message):
    with pytest.raises(CheckpointError, match=message):
        pack(made.parent / "source", tmp_path / "out", rules)
    assert not (tmp_path / "out").exists()


def test_the_checksum_is_of_weights_and_rules_and_not_of_the_day(made, tmp_path):
    was = Pack.open(made)
    assert Pack(made, LITE, was.recipe, was.files, notes={"packed": "another day"}).checksum == was.checksum
    assert Pack(made, LITE, Recipe.named("int8"), was.files).checksum != was.checksum
    other = pack(plain(tmp_path / "source", seed=1), tmp_path / "other", "int4")
    assert other.checksum != was.checksum and other.nbytes == was.nbytes
