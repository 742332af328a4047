"""Packing: a checkpoint of any size written anew by a recipe, a matrix at a time; one that was stopped goes on.

A file is whole or has the suffix .part, and says in its metadata what it was made from. packing.json says that of the
directory until packed.json takes its place.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from workbench import __version__
from workbench.blocks import Layout
from workbench.checkpoint import COPIED, Safetensors, directory_of
from workbench.codec import Codec
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.matrix import Matrix
from workbench.model import Model
from workbench.pack import (
    DESCRIPTION,
    UNFINISHED,
    Pack,
    block_entries,
    described,
    experts_file,
    part_entries,
    weights_file,
)
from workbench.packfile import NAMES, Entry, PackFile, PackWriter, alone, write_json
from workbench.progress import Clock, Tell
from workbench.quantising import Quantising, Round, nearest
from workbench.recipe import Recipe
from workbench.shards import some
from workbench.weights import expert_names

OURS = ("weights-*.safetensors", "experts-*.safetensors", "*.part")
ALONG = (*COPIED, "README.md")
SAMPLE = 64  # bytes from the middle of each tensor: a base model and its chat model have the same names and shapes


def pack(
    source_path: str | Path,
    out: str | Path,
    recipe: str | Recipe = "int4",
    *,
    round: Round = nearest,
    progress: Tell = lambda progress: None,
    force: bool = False,
) -> Pack:
    """Packs the checkpoint `source_path`, weights of any float type, into the directory `out`.

    Names and shapes are checked before anything is written, and one matrix is held in fp32 at a time. After an
    interrupt, a kill or a full disk the same call goes on with the next file, and the result is the same to the byte.
    `force` drops what another recipe or source has left in `out`. `round` may have an `identity`, a text that tells it
    from others; else its name does.

    RequestError where `out` is something else, or of another recipe or source, or `source_path` is packed already;
    CheckpointError where the source is not whole, or writing failed; BudgetError where the disk is too small.
    """
    source_path, out, recipe = Path(source_path), Path(out), Recipe.named(recipe)
    folder = directory_of(source_path)
    if Pack.is_one(folder):
        was = Pack.open(folder).recipe.name
        raise RequestError(f"{folder} is packed already, by recipe {was}. Give the checkpoint it was made from.")
    job = _Job(source_path, out, recipe, round)
    try:
        job.claim(force)
        job.check_room(job.kept())
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            job.claim(force)  # again: another may have begun and ended since
            return job.run(job.kept(), progress)
    except OSError as error:
        whole = job.kept()
        raise CheckpointError(
            f"{out}: writing failed ({error.strerror or error}). {len(whole)} of {len(job.files)} files are whole "
            f"and stay. If the disk is full, free {job.missing(whole):,} bytes. Then give the same command again, "
            "and it goes on from there."
        ) from error


def verify(path: str | Path, progress: Tell = lambda progress: None) -> None:
    """Reads all of a packed checkpoint. CheckpointError counts what is damaged and names the first."""
    pack = Pack.open(Path(path))
    clock, damaged, read = Clock(pack.nbytes, len(pack.files), progress), [], 0
    for name, about in pack.files.items():
        clock.begin(name)
        try:
            file = pack.open_file(name, direct=True)
        except CheckpointError as error:
            damaged.append(error)
            read += 1
            clock.add(about["bytes"])
            continue
        for tensor, stored in file.stored.items():
            read += 1
            try:
                file.read(tensor, torch.empty(stored.nbytes, dtype=torch.uint8))
            except CheckpointError as error:
                damaged.append(error)
            clock.add(stored.nbytes)
        file.close()
        clock.add(about["bytes"] - sum(stored.nbytes for stored in file.stored.values()))
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {read} tensors are damaged. The first: {damaged[0]}")


class _Wanted(NamedTuple):
    """A tensor that every token passes; `multiplied` if the model reads it as a matrix, which may be packed."""

    name: str
    shape: tuple[int, ...]
    multiplied: bool


class _Listing:
    """A Source on "meta" that notes in which order a model asks for what."""

    def __init__(self, source: Safetensors, recipe: Recipe):
        self.source, self.codec = source, recipe.codec
        self.dtype, self.device = source.dtype, source.device
        self.weights: dict[str, list[_Wanted]] = {}  # by file
        self.layers: list[int] = []  # whose experts are packed

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        self.weights.setdefault(weights_file(name), []).append(_Wanted(name, tuple(shape), False))
        return self.source.take(name, tuple(shape), into)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        self.source.take(name, shape)
        self.weights.setdefault(weights_file(name), []).append(_Wanted(name, shape, True))
        return Matrix.empty(self.codec(name), shape, "meta")

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        shapes = (layout.width, layout.hidden), (layout.width, layout.hidden), (layout.hidden, layout.width)
        for name, shape in zip(expert_names(layer, expert), shapes, strict=True):
            self.source.take(name, shape)
        if layer not in self.layers:
            self.layers.append(layer)


class _Job:
    """All files of one pack, known before the first is written: how each is written, and what goes into it."""

    def __init__(self, source_path: Path, out: Path, recipe: Recipe, round: Round):
        self.out, self.recipe, self.round, self.folder = out, recipe, round, directory_of(source_path)
        config = Config.from_json(self.folder / "config.json")
        listing = _Listing(Safetensors(source_path, torch.float32, "meta"), recipe)
        Model(config, listing)
        if extra := listing.source.unused():
            raise CheckpointError(
                f"{source_path}: {len(extra)} tensors have no place in the model that config.json describes: "
                f"{some(extra, 5)}. config.json is not the one of these weights: download both from one repository."
            )
        self.source = Safetensors(source_path, torch.float32)
        self.quantising = Quantising(self.source, recipe, round)
        how = getattr(round, "identity", None) or round.__name__
        self.made_from = _digest(config.to_dict(), recipe.rules, how, _contents(self.source, listing.source.taken))
        notes = {"source": _name(self.folder), "made_from": self.made_from, "rounding": how}
        notes |= {"packed": date.today().isoformat(), "version": __version__}
        self.pack = Pack(out, config, recipe, {}, notes=notes)
        self.files: dict[str, tuple[PackWriter, Callable[[], Iterator[torch.Tensor]]]] = {}
        for name, wanted in listing.weights.items():
            entries = []
            for one in wanted:
                plain = self.source.stored[one.name].type
                entries += part_entries(one.name, one.shape, recipe.codec(one.name), plain)
            self._plan(name, entries, partial(self._weights, wanted))
        for layer in listing.layers:
            blocks = block_entries(config, self.pack.layout)
            self._plan(experts_file(layer), blocks, partial(self._blocks, layer, self.pack.layout))

    def claim(self, force: bool) -> None:
        """RequestError where the directory is not one that this job may write in."""
        left = {f"{UNFINISHED}.part"}  # all there is of a run that was killed in its first moment
        if not self.out.exists() or self.out.is_dir() and {file.name for file in self.out.iterdir()} <= left:
            return
        if self.out.samefile(self.folder):
            raise RequestError(f"{self.out} is the source itself. Give another directory to pack into.")
        made_from, was = _said(self.out)
        if made_from == self.made_from or made_from is None and self.kept():  # a file says by itself what it is of
            return
        here = f"{self.recipe.name} from {self.pack.notes['source']}"
        if not any((self.out / name).is_file() for name in (DESCRIPTION, UNFINISHED)):
            raise RequestError(
                f"{self.out} is there and is nothing packed, or not by {here}. Choose another place, or an empty one. "
                f"Where only {DESCRIPTION} was lost, the same `workbench pack` as before makes it again."
            )
        if not force:
            more = ", but other weights or rounding" if was == f"by {here}" else ""
            raise RequestError(
                f"{self.out} holds what was packed {was}, and this is {here}{more}. Choose another directory, or start "
                "anew with --force."
            )

    def kept(self) -> list[str]:
        """The files that are there, whole, and made from the same."""
        return [name for name, (writer, _) in self.files.items() if _is_whole(writer)]

    def finished(self, kept: list[str]) -> Pack | None:
        """What is there, where nothing is to be written."""
        if len(kept) == len(self.files):
            with suppress(CheckpointError):
                pack = Pack.open(self.out)
                return pack if pack.notes.get("made_from") == self.made_from else None
        return None

    def missing(self, kept: list[str]) -> int:
        """Bytes still to be written."""
        along = sum((self.folder / name).stat().st_size for name in ALONG if (self.folder / name).is_file())
        return along + sum(writer.nbytes for name, (writer, _) in self.files.items() if name not in kept)

    def check_room(self, kept: list[str]) -> None:
        if self.finished(kept):
            return
        needed = self.missing(kept)
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free + sum(file.stat().st_size for file in self._stale(kept))
        if needed > free:
            raise BudgetError(
                f"{self.out}: {self.recipe.name} needs {needed:,} bytes more there, and {free:,} are free. Free some, "
                "choose another disk, or a recipe of fewer bits."
            )

    def run(self, kept: list[str], tell: Tell) -> Pack:
        finished = self.finished(kept)
        if finished is None:
            about = {"made_from": self.made_from, "recipe": self.recipe.name, "source": self.pack.notes["source"]}
            write_json(self.out / UNFINISHED, about)
            (self.out / DESCRIPTION).unlink(missing_ok=True)
            for file in self._stale(kept):
                file.unlink()
            self._write(kept, tell)
            finished = self.pack
        (self.out / UNFINISHED).unlink(missing_ok=True)
        return finished

    def _write(self, kept: list[str], tell: Tell) -> None:
        sizes = {name: writer.nbytes for name, (writer, _) in self.files.items()}
        clock = Clock(sum(sizes.values()), len(sizes), tell, sum(sizes[name] for name in kept), len(kept))
        for name, (writer, tensors) in self.files.items():
            if name not in kept:
                clock.begin(name)
                with writer:
                    for tensor in tensors():
                        writer.write(tensor)
                        clock.add(tensor.nbytes)
                        del tensor  # before the next is made
                clock.add(sizes[name] - sum(entry.nbytes for entry in writer.entries))
            self.pack.files[name] = described(PackFile(writer.path))
        for name in ALONG:
            if (self.folder / name).is_file():
                part = self.out / f"{name}.part"
                shutil.copyfile(self.folder / name, part)
                part.replace(self.out / name)
        self.pack.write()

    def _plan(self, name: str, entries: list[Entry], tensors: Callable[[], Iterator[torch.Tensor]]) -> None:
        made_from = _digest(self.made_from, name)  # with the name: a file that was moved to another is not taken for it
        self.files[name] = PackWriter(self.out / name, entries, {"made_from": made_from}), tensors

    def _weights(self, wanted: list[_Wanted]) -> Iterator[torch.Tensor]:
        for name, shape, multiplied in wanted:
            codec = self.recipe.codec(name)
            if codec is None:
                yield self.source.stored[name].read()
            else:
                yield from self._packed(self.round if multiplied else nearest, name, codec, shape)

    def _packed(self, round: Round, name: str, codec: Codec, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return round(name, codec, self.source.take(name, shape)).parts

    def _blocks(self, layer: int, layout: Layout) -> Iterator[torch.Tensor]:
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        for expert in range(self.pack.config.n_routed_experts):
            self.quantising.block(layer, expert, layout, block)
            yield block

    def _stale(self, kept: list[str]) -> list[Path]:
        """What earlier runs left of which nothing is kept."""
        patterns = OURS if kept else OURS + ALONG
        found = {file for pattern in patterns for file in self.out.glob(pattern)}
        return sorted(file for file in found if file.name not in kept)


def _is_whole(writer: PackWriter) -> bool:
    try:
        if writer.path.stat().st_size != writer.nbytes:
            return False
        file = PackFile(writer.path)
    except (OSError, CheckpointError):
        return False
    found = [(name, stored.dtype, stored.shape) for name, stored in file.stored.items()]
    entries = [(entry.name, NAMES[entry.dtype], entry.shape) for entry in writer.entries]
    return found == entries and file.metadata.get("made_from") == writer.metadata["made_from"]


def _said(out: Path) -> tuple[str | None, str]:
    """What the directory is being made from, or was, and that in words."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if (out / UNFINISHED).is_file():
            said = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
            return said["made_from"], f"by {said['recipe']} from {said['source']}"
        said = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        notes = said["notes"]
        return notes.get("made_from"), f"by {said['recipe']['name']} from {notes.get('source', 'elsewhere')}"
    return None, "from something that cannot be read any more"


def _contents(source: Safetensors, names: set[str]) -> list:
    """Name, type, shape and a few bytes of every tensor, however they are spread over files."""
    found = []
    by_place = sorted((source.stored[name].file, source.stored[name].start, name) for name in names)
    try:
        for file, tensors in groupby(by_place, lambda one: one[0]):
            with file.open("rb") as opened:
                for _, _, name in tensors:
                    stored = source.stored[name]
                    opened.seek(stored.start + stored.nbytes // 2)
                    sample = opened.read(min(SAMPLE, stored.nbytes - stored.nbytes // 2))
                    found.append((name, stored.dtype, stored.shape, sample.hex()))
    except OSError as error:
        raise CheckpointError(f"{source.path}: reading failed ({error}). Check the disk, or copy it again.") from None
    return sorted(found)


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _name(folder: Path) -> str:
    """Of a checkpoint; in the local cache of Hugging Face the directory itself is called by its revision."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name
