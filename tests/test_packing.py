"""Packing: the same to the byte however often it was stopped, and nothing overwritten that it did not write."""

import errno
import fcntl
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packs import CASES, LITE, flip, plain
from safetensors.torch import load_file, save_file

import workbench.pocket
from workbench.checkpoint import Safetensors
from workbench.codec import Groups
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.matrix import Matrix, dense
from workbench.model import Model
from workbench.pack import DESCRIPTION, UNFINISHED, Pack, PackedSource
from workbench.packfile import PackFile, PackWriter
from workbench.packing import pack, verify
from workbench.progress import Bar, Progress
from workbench.quantising import Quantising, nearest
from workbench.recipe import Recipe
from workbench.shards import Stored
from workbench.synth import Synth

POCKET = Path(workbench.pocket.__path__[0])
PRESETS = ("bf16", "fp8", "int8", "int6", "int4", "int3")
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Only to be read."""
    path = plain(tmp_path_factory.mktemp("plain") / "source")
    (path / "tokenizer.json").write_text('{"model": {}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("A card.")
    return path


def check_same(one: Model, other: Model) -> None:
    """Bit for bit, and by what they answer."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, mine in one.tensors.items():
        its = other.tensors[name]
        assert type(mine) is type(its) and mine.shape == its.shape, name
        if isinstance(mine, Matrix):
            assert mine.codec == its.codec
            assert all(torch.equal(raw(a), raw(b)) for a, b in zip(mine.parts, its.parts, strict=True)), name
        else:
            assert torch.equal(mine, its), name
    tokens = torch.randint(one.config.vocab_size, (2, 11))
    with torch.inference_mode():
        assert torch.equal(one(tokens), other(tokens))


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(-1).view(torch.uint8)


def check_packed(path: Path, recipe: str, out: Path, dtype: torch.dtype) -> Pack:
    made = pack(path, out, recipe)
    again = Pack.open(out)
    assert (again.checksum, again.recipe, again.config) == (made.checksum, made.recipe, made.config)
    packed = PackedSource(again, dtype)
    model = Model(again.config, packed)
    assert packed.unused() == []
    check_same(model, Model(again.config, Quantising(Safetensors(path, dtype), Recipe.named(recipe))))
    verify(out)
    return made


@pytest.mark.parametrize("recipe", PRESETS)
def test_packed_pocket_is_pocket_packed_as_it_is_read(recipe, tmp_path):
    made = check_packed(POCKET, recipe, tmp_path / "out", torch.float32)
    assert Pack.open(tmp_path / "out").nbytes == sum(f.stat().st_size for f in made.path.glob("*.safetensors"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "recipe", ["int3", "fp8", "int4,*.experts.*=plain", "int8,*=plain", "int6,lm_head.weight=fp32"]
)
def test_every_structure(case, recipe, tmp_path):
    path = plain(tmp_path / "source", CASES[case], seed=random.randrange(100))
    check_packed(path, recipe, tmp_path / "out", random.choice([torch.float32, torch.bfloat16]))


def test_plain_tensors_keep_the_type_they_had(source, tmp_path):
    path = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.rand(LITE.hidden_size)
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].half()
    save_file(tensors, path / "model.safetensors")
    out = pack(path, tmp_path / "out").path
    kinds = load_file(out / "weights-base.safetensors") | load_file(out / "weights-layer-001.safetensors")
    assert torch.equal(kinds["model.norm.weight"], tensors["model.norm.weight"])
    assert kinds["model.layers.1.mlp.gate.weight"].dtype == torch.float16
    assert kinds["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16


def test_what_goes_along(source, tmp_path):
    made = pack(source, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        assert (made.path / name).read_bytes() == (source / name).read_bytes()
    assert made.notes["source"] == "source" and made.notes["rounding"] == "nearest"
    assert not (made.path / UNFINISHED).exists() and not list(made.path.glob("*.part"))


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_a_source_that_is_wrong_is_refused_before_anything_is_written(source, tmp_path, change):
    path = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(LITE.hidden_size)
    save_file(tensors, path / "model.safetensors")
    what = "model.layers.3.input_layernorm.weight" if change == "extra" else name
    with pytest.raises(CheckpointError, match=what):
        pack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A child packs and tells of every tensor; the parent kills it a moment after it was told of so many.
KILLED = """
import os, random, signal, sys, time
from workbench.packing import pack
source, out, recipe, *told = sys.argv[1:]
for wanted in map(int, told):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        pack(source, out, recipe, progress=lambda progress: os.write(write, b"."))
        os._exit(0)
    os.close(write)
    seen = 0
    while seen < wanted and (found := os.read(read, wanted - seen)):
        seen += len(found)
    time.sleep(random.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    print(len(os.listdir(out)) if os.path.isdir(out) else 0, "packed.json" in os.listdir(out))
"""


def test_killed_at_any_moment_it_goes_on_and_the_result_is_the_same(tmp_path):
    whole = pack(POCKET, tmp_path / "whole", "int3")
    told = [str(random.randint(1, 120)) for _ in range(3)]
    said = subprocess.run(
        [sys.executable, "-c", KILLED, POCKET, tmp_path / "out", "int3", *told],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "False" in said.stdout.split("\n")[0], "it was not killed in the middle"
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    made = pack(POCKET, tmp_path / "out", "int3")
    assert made.checksum == whole.checksum
    for name, written in before.items():
        assert (made.path / name).stat().st_mtime_ns == written, f"{name} was whole and was written again"
    for file in whole.path.iterdir():
        assert file.name == "packed.json" or (made.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in made.path.iterdir()} == {file.name for file in whole.path.iterdir()}
    verify(made.path)


def test_a_run_that_was_killed_in_its_first_moment(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{UNFINISHED}.part").write_text("{")
    verify(pack(source, tmp_path / "out").path)
    assert not list((tmp_path / "out").glob("*.part"))


def test_what_is_packed_already_is_not_packed_again(source, tmp_path):
    first, told = pack(source, tmp_path / "out"), []
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert pack(source, tmp_path / "out", progress=told.append).checksum == first.checksum
    assert not told and before == {file: file.stat().st_mtime_ns for file in first.path.iterdir()}


@pytest.mark.parametrize(
    "damage", ["missing", "short", "header", "swapped", "packed.json", "unreadable", "tokenizer.json"]
)
def test_what_is_damaged_is_made_again_and_nothing_else(source, tmp_path, damage):
    made = pack(source, tmp_path / "out")
    one, other = made.path / "experts-layer-001.safetensors", made.path / "experts-layer-002.safetensors"
    kept = (made.path / "weights-base.safetensors").stat().st_mtime_ns
    if damage == "missing":
        one.unlink()
    elif damage == "short":
        os.truncate(one, one.stat().st_size - 1)
    elif damage == "header":
        flip(one, 8)
    elif damage == "swapped":
        aside = one.rename(one.with_name("aside"))
        other.rename(one)
        aside.rename(other)
    elif damage == "unreadable":
        (made.path / DESCRIPTION).write_text("{")
    else:
        (made.path / damage).unlink()
    if damage == "packed.json":  # then only the files say what they are of
        for path, recipe in ((source, "int3"), (plain(tmp_path / "more" / "source", seed=7), "int4")):
            with pytest.raises(RequestError, match="nothing packed, or not by .* from source.*packed.json was lost"):
                pack(path, tmp_path / "out", recipe, force=True)
    assert pack(source, tmp_path / "out").checksum == made.checksum
    verify(made.path)
    assert (made.path / "weights-base.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("other", ["recipe", "weights", "rounding"])
def test_another_recipe_or_source_or_rounding_is_refused_unless_forced(source, tmp_path, monkeypatch, other, stopped):
    def coarse(name: str, codec, weights: torch.Tensor) -> Matrix:
        return Matrix.pack(codec, weights * 1.01)

    out = tmp_path / "out"
    if stopped:
        with monkeypatch.context() as patch:
            fail_at(patch, 40)
            with pytest.raises(CheckpointError):
                pack(source, out, "int4")
    else:
        pack(source, out, "int4")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    kind, path, round = "int4", source, nearest
    if other == "recipe":
        kind = "int4,lm_head.weight=bf16"
    elif other == "weights":
        path = plain(tmp_path / "more" / "source", seed=7)  # of the same name, as a model and the same after training
    else:
        round = coarse
    with pytest.raises(RequestError, match="packed by int4 from source, and this is .*--force"):
        pack(path, out, kind, round=round)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patch:
        fail_at(patch, 50)
        with pytest.raises(CheckpointError):
            pack(path, out, kind, round=round, force=True)
    assert not (out / DESCRIPTION).exists()  # neither what it was nor what it will be
    forced = pack(path, out, kind, round=round, force=True)
    fresh = pack(path, tmp_path / "fresh", kind, round=round)
    assert forced.checksum == fresh.checksum == Pack.open(out).checksum
    assert {file.name for file in out.iterdir()} == {file.name for file in fresh.path.iterdir()}
    verify(out)


def test_force_leaves_nothing_of_a_larger_model(tmp_path):
    pack(plain(tmp_path / "large", replace(LITE, num_hidden_layers=5)), tmp_path / "out")
    pack(plain(tmp_path / "small"), tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "experts-layer-004.safetensors").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_something_else_stays_as_it_is(source, tmp_path, force):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights-base.safetensors").write_text("notes")
    (tmp_path / "file").write_text("notes")
    for out in ("mine", "file"):
        with pytest.raises(RequestError, match=f"{out} is there and is nothing packed"):
            pack(source, tmp_path / out, force=force)
    assert [file.read_text() for file in (tmp_path / "mine").iterdir()] == ["notes"]
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(RequestError, match="is the source itself"):
            pack(source, out, force=force)


def test_a_packed_source_is_refused(source, tmp_path):
    out = pack(source, tmp_path / "out", "int3").path
    with pytest.raises(RequestError, match="packed already, by recipe int3"):
        pack(out, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_two_do_not_write_in_one_directory(source, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RequestError, match="another `workbench pack`"):
        pack(source, tmp_path / "out")
    os.close(descriptor)
    pack(source, tmp_path / "out")


def test_what_another_has_packed_meanwhile_is_not_overwritten(source, tmp_path, monkeypatch):
    """Between the first look at the directory and the lock on it."""
    look, out = shutil.disk_usage, tmp_path / "out"

    def slow(path: Path) -> Disk:
        monkeypatch.setattr(shutil, "disk_usage", look)
        pack(source, out, "int3")
        return look(path)

    monkeypatch.setattr(shutil, "disk_usage", slow)
    with pytest.raises(RequestError, match="holds what was packed by int3 from source"):
        pack(source, out, "int4")
    assert Pack.open(out).recipe.name == "int3"
    verify(out)


def test_a_directory_that_may_not_be_looked_into(source, tmp_path, monkeypatch):
    """As root may look everywhere, the system's answer is given here."""
    stat, out = os.stat, tmp_path / "shut"

    def refused(path, *args, **options):
        if str(path).startswith(str(out)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    for ask in (lambda: pack(source, out), lambda: Synth.named("pocket").write(out), lambda: Pack.is_one(out)):
        with pytest.raises(CheckpointError, match="shut: .*Permission denied"):
            ask()


def test_what_is_not_finished_says_so(source, tmp_path, monkeypatch):
    fail_at(monkeypatch, 40)
    with pytest.raises(CheckpointError, match="No space left"):
        pack(source, tmp_path / "out")
    for ask in (verify, Pack.open, Pack.is_one, lambda out: pack(out, tmp_path / "more")):
        with pytest.raises(CheckpointError, match="is not finished.*goes on where it stopped"):
            ask(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no packed checkpoint: it has no packed.json"):
        verify(source)


def fail_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """The disk is full when so many tensors have been written."""
    write, count = PackWriter.write, iter(range(number))

    def full(self: PackWriter, tensor: torch.Tensor) -> None:
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tensor)

    patch.setattr(PackWriter, "write", full)


def test_a_disk_that_is_too_small_is_known_before(source, tmp_path, monkeypatch):
    needed = sum(f.stat().st_size for f in pack(source, tmp_path / "once").path.iterdir())
    needed -= sum((tmp_path / "once" / name).stat().st_size for name in ("packed.json", "config.json"))
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, 0, free))
    with pytest.raises(BudgetError, match=f"needs {needed:,} bytes more there, and {free:,} are free"):
        pack(source, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()
    free = needed
    pack(source, tmp_path / "out" / "deep")
    free = 0  # what is there already needs no room, and what has to go makes some
    pack(source, tmp_path / "once")
    (tmp_path / "once" / "weights-layer-001.safetensors").rename(
        tmp_path / "once" / "weights-layer-001.safetensors.part"
    )
    with pytest.raises(BudgetError) as error:
        pack(source, tmp_path / "once")
    short = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{3,}", str(error.value).split(": ", 1)[1])]
    along = sum((source / name).stat().st_size for name in ("tokenizer.json", "chat_template.jinja", "README.md"))
    along += (source / "generation_config.json").stat().st_size
    assert short[0] - short[1] == along


@pytest.mark.parametrize("moment", [0, 1, 33, 64, "end"])
def test_a_disk_that_is_full_in_the_middle(source, tmp_path, monkeypatch, moment):
    out, whole = tmp_path / "out", pack(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if moment == "end":
            patch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        else:
            fail_at(patch, moment)
        with pytest.raises(CheckpointError, match="No space left.*stay.*free [0-9,]+ bytes.*same command") as error:
            pack(source, out)
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert f"{len(finished)} of {len(whole.files)} files are whole" in str(error.value)
    assert not list(out.glob("*.safetensors.part")) and not (out / DESCRIPTION).exists()
    assert pack(source, out).checksum == whole.checksum
    assert finished.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}.items()
    assert not list(out.glob("*.part"))


def test_one_matrix_at_a_time(tmp_path, monkeypatch):
    """Whenever a tensor is asked for, none that was given before is still held."""
    path = plain(tmp_path / "source", replace(LITE, num_hidden_layers=6))
    alive, most = [], []
    take = Safetensors.take

    def tracked(self: Safetensors, name: str, shape: tuple[int, ...], into=None) -> torch.Tensor:
        if self.device.type == "meta":
            return take(self, name, shape, into)
        most.append(sum(given() is not None for given in alive))
        given = take(self, name, shape, into)
        assert given.dtype == torch.float32
        alive.append(weakref.ref(given))
        return given

    read = Stored.read

    def noted(self: Stored) -> torch.Tensor:
        most.append(sum(given() is not None for given in alive))
        given = read(self)
        alive.append(weakref.ref(given))
        return given

    monkeypatch.setattr(Safetensors, "take", tracked)
    monkeypatch.setattr(Stored, "read", noted)
    pack(path, tmp_path / "out", "int4,*_proj_with_mqa.weight=plain,*.q_proj.weight=plain,lm_head.weight=plain")
    assert len(most) > 200 and max(most) == 0


def test_progress_counts_up_to_the_end_and_goes_on_where_it_was(source, tmp_path, monkeypatch):
    told: list[Progress] = []
    whole = pack(source, tmp_path / "whole", progress=told.append)
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert (told[-1].done, told[-1].total, told[-1].made) == (whole.nbytes,) * 3
    assert told[-1].file == told[-1].files == len(whole.files) and told[-1].eta == 0
    fail_at(monkeypatch, 60)
    with pytest.raises(CheckpointError):
        pack(source, tmp_path / "out")
    kept = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    monkeypatch.undo()
    told.clear()
    pack(source, tmp_path / "out", progress=told.append)
    assert told[0].done - told[0].made == kept > 0 and told[-1].done == told[-1].total == whole.nbytes
    told.clear()
    verify(tmp_path / "out", told.append)
    assert told[-1].done == told[-1].total == whole.nbytes and told[-1].file == len(whole.files)


def test_the_bar_ends_its_line():
    lines = []
    for live in (True, False):
        bar = Bar(lines.append, live)
        bar(Progress("a", 1, 2, 10**9, 4 * 10**9, 10**9, 60.0))  # too soon to be said
        bar(Progress("b", 2, 2, 4 * 10**9, 4 * 10**9, 4 * 10**9, 80.0))
    assert lines == ["\r2 of 2 files, 4.00 of 4.00 GB, 50 MB/s\x1b[K\n", "2 of 2 files, 4.00 of 4.00 GB, 50 MB/s\n"]


def test_verify_counts_what_is_damaged_and_names_the_first(source, tmp_path):
    out = pack(source, tmp_path / "out").path
    for name, count in (("weights-layer-000.safetensors", 1), ("experts-layer-001.safetensors", 3)):
        for stored in list(PackFile(out / name).stored.values())[:count]:
            flip(out / name, stored.start + random.randrange(stored.nbytes), random.randrange(8))
    with pytest.raises(
        CheckpointError, match=r"^4 of \d+ tensors are damaged. The first: .*weights-layer-000"
    ) as error:
        verify(out)
    assert "experts" not in str(error.value)


def test_the_same_weights_in_other_shards_are_the_same_source(source, tmp_path):
    path = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    names = list(tensors)
    index = {}
    for number, some in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in some}, path / f"model-{number}.safetensors")
        index |= dict.fromkeys(some, f"model-{number}.safetensors")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(index).replace(chr(39), chr(34))}}}')
    first, told = pack(source, tmp_path / "out"), []
    assert pack(path, tmp_path / "out", progress=told.append).checksum == first.checksum and not told


def test_a_rounding_of_ones_own_packs_what_is_multiplied(source, tmp_path):
    seen = []

    def own(name: str, codec, weights: torch.Tensor) -> Matrix:
        assert weights.dtype == torch.float32 and weights.dim() == 2
        seen.append(name)
        return Matrix.pack(codec, torch.full_like(weights, 0.5))

    made = pack(source, tmp_path / "out", "int4,*norm.weight=bf16,*.mlp.gate.weight=fp32", round=own)
    model = Model(made.config, PackedSource(made, torch.float32))
    assert not any("norm" in name or ".mlp.gate." in name for name in seen) and len(seen) == len(set(seen))
    for name in seen:
        if isinstance(model.tensors[name].codec, Groups):
            assert torch.allclose(dense(model.tensors[name], torch.float32), torch.tensor(0.5), atol=2e-3)
    assert made.notes["rounding"] == "own"
    assert not torch.equal(model.norm, torch.full_like(model.norm, 0.5))
