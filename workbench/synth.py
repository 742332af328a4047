"""Synthetic checkpoints: the exact shape of a release with random packed weights, to run its full size without it.

They say nothing about quality, and everything about bytes and speed. What the weights are: see noise.py.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event

import torch

from workbench.blocks import Layout
from workbench.checkpoint import COPIED
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.matrix import Matrix
from workbench.model import Model
from workbench.noise import Noise
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
from workbench.packfile import PackFile, PackWriter, alone, write_json
from workbench.recipe import Recipe
from workbench.sizes import show_bytes

POCKET = Path(__file__).parent / "pocket"  # whose tokenizer goes along
WRITERS = 2  # files at the same time: one is drawn while another is written


@dataclass(frozen=True)
class Synth:
    """A synthetic checkpoint, to be written. The weights depend on names, shapes, recipe and seed alone.

    shared: the expert blocks of all layers are one file, so that little disk holds a large model.
    """

    config: Config
    recipe: Recipe
    seed: int = 0
    shared: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if self.shared and self.layout is None:
            raise RequestError("only packed experts can be one file for all layers: leave out --shared, or pack them.")

    @classmethod
    def named(cls, name: str, recipe: str | Recipe = "int4", seed: int = 0, shared: bool = False) -> "Synth":
        """The shape of `Config.preset(name)`; begin and end of text are those of pocket's tokenizer."""
        shape, pocket = Config.preset(name), Config.preset("pocket")
        ends = {"bos_token_id": pocket.bos_token_id, "eos_token_id": pocket.eos_token_id}
        return cls(replace(shape, name=f"synthetic {name}", **ends), Recipe.named(recipe), seed, shared, name)

    @cached_property
    def nbytes(self) -> int:
        """Of the files that will be written, on disk."""
        return sum(self._writer(Path(), file).nbytes for file in self._real)

    def write(self, out: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> Pack:
        """Writes it and opens it. `progress`: bytes done, bytes in all.

        What was interrupted does not open, and goes on where it was when it is asked for again. BudgetError where the
        disk has less room than it takes; CheckpointError where `out` holds anything else.
        """
        out = Path(out)
        try:
            if finished := self._begun(out):
                return finished
            self._check_room(out, self.nbytes - sum(self._whole(out).values()))
            out.mkdir(parents=True, exist_ok=True)
            with alone(out):
                return self._begun(out) or self._go_on(out, progress)  # another may have begun and ended since
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise BudgetError(f"{out}: the disk is full. Make room and ask again: it goes on.") from error
            raise CheckpointError(
                f"{out}: writing failed ({error}). Check the disk and ask again: it goes on."
            ) from error

    def _go_on(self, out: Path, progress: Callable[[int, int], None]) -> Pack:
        write_json(out / UNFINISHED, self._said)
        (out / DESCRIPTION).unlink(missing_ok=True)
        whole = self._whole(out)
        missing, done = [file for file in self._real if file not in whole], sum(whole.values())
        stop = Event()
        pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="synth")
        try:
            progress(done, self.nbytes)
            for nbytes in pool.map(lambda file: self._write(out, file, stop), missing):
                done += nbytes
                progress(done, self.nbytes)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return self._finish(out)

    def _whole(self, out: Path) -> dict[str, int]:
        """The files that are there and as long as they should be, and their bytes."""
        sizes = {file: self._writer(out, file).nbytes for file in self._real}
        found = {file: (out / file).stat().st_size for file in self._real if (out / file).is_file()}
        return {file: size for file, size in found.items() if size == sizes[file]}

    @cached_property
    def layout(self) -> Layout | None:
        return self._pack(Path()).layout

    @cached_property
    def _tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of each file that every token's weights are in: shapes by name, as the model asks for them."""
        listing = _Listing(self.recipe)
        Model(self.config, listing)
        files: dict[str, dict] = {}
        for name, shape in listing.shapes.items():
            files.setdefault(weights_file(name), {})[name] = shape
        return files

    @cached_property
    def _experts(self) -> dict[str, int]:
        """Files of blocks, and their layers."""
        layers = range(self.config.num_hidden_layers if self.layout else 0)
        return {experts_file(layer): layer for layer in layers if self.config.is_moe(layer)}

    @property
    def _real(self) -> list[str]:
        """The files that are written: where the experts are shared, those of the first layer that has any."""
        return [*self._tensors, *list(self._experts)[: 1 if self.shared else None]]

    def _writer(self, out: Path, file: str) -> PackWriter:
        if file in self._experts:
            entries = block_entries(self.config, self.layout)
        else:
            plain = getattr(torch, self.config.dtype)
            each = self._tensors[file].items()
            entries = [
                entry for name, shape in each for entry in part_entries(name, shape, self.recipe.codec(name), plain)
            ]
        return PackWriter(out / file, entries, {"synthetic": json.dumps(self._said)})

    def _write(self, out: Path, file: str, stop: Event) -> int:
        with self._writer(out, file) as writer:
            for part in self._parts(file):
                if stop.is_set():
                    raise InterruptedError("another file failed, or the user wants no more")
                writer.write(part)
        return (out / file).stat().st_size

    def _parts(self, file: str) -> Iterator[torch.Tensor]:
        """What is written into that file, one after the other; a block is valid until the next."""
        noise = Noise(self.config, self.recipe, self.seed)
        if file in self._experts:
            into = torch.empty(self.layout.nbytes, dtype=torch.uint8)
            for expert in range(self.config.n_routed_experts):
                noise.block(self._experts[file], expert, self.layout, into)
                yield into
        else:
            for name, shape in self._tensors[file].items():
                yield from noise.weights(name, shape).parts

    @property
    def _said(self) -> dict:
        """What tells it from other checkpoints."""
        shape = hashlib.sha256(json.dumps(self.config.to_dict()).encode()).hexdigest()[:16]
        kind = self.name or "random weights"
        return {"synthetic": kind, "seed": self.seed, "recipe": self.recipe.name, "shared": self.shared, "shape": shape}

    def _pack(self, out: Path, files: dict | None = None) -> Pack:
        return Pack(out, self.config, self.recipe, files or {}, synthetic=True, notes=self._said)

    def _begun(self, out: Path) -> Pack | None:
        """The checkpoint where it is complete; None where it is to be made, or to be gone on with."""
        otherwise = "Choose another folder, or remove it."
        if not out.exists():
            return None
        if not out.is_dir():
            raise CheckpointError(f"{out} is a file. {otherwise}")
        if (out / DESCRIPTION).is_file():
            try:
                found = Pack.open(out)
            except CheckpointError:
                if _notes(out) != self._said:
                    raise
                return None  # what is missing is made again
            if found.notes != self._said:
                raise CheckpointError(f"{out} holds another packed checkpoint ({found.notes}). {otherwise}")
            (out / UNFINISHED).unlink(missing_ok=True)
            return found
        left = {f"{UNFINISHED}.part"}  # all there is of a run that was killed in its first moment
        if not {file.name for file in out.iterdir()} <= left:
            try:
                said = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise CheckpointError(
                    f"{out} is there and is no unfinished synthetic checkpoint. {otherwise}"
                ) from None
            if said != self._said:
                raise CheckpointError(f"{out} holds another unfinished synthetic checkpoint ({said}). {otherwise}")
        return None

    def _check_room(self, out: Path, needed: int) -> None:
        where = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(where).free
        if free < needed:
            less = "" if self.shared or not self.layout else " --shared takes less."
            raise BudgetError(
                f"{out}: it takes {show_bytes(needed)}, and {show_bytes(free)} are free. Make room, or choose another "
                f"folder.{less}"
            )

    def _finish(self, out: Path) -> Pack:
        files = {}
        for file in [*self._tensors, *self._experts]:
            if file not in self._real and not (out / file).is_symlink():
                (out / file).symlink_to(next(iter(self._experts)))
            opened = PackFile(out / file)
            files[file] = described(opened)
            opened.close()
        for file in COPIED:
            if (POCKET / file).is_file():
                shutil.copyfile(POCKET / file, out / file)
        (out / "README.md").write_text(_card(self), encoding="utf-8")
        self._pack(out, files).write()
        (out / UNFINISHED).unlink(missing_ok=True)
        return replace(Pack.open(out), config=self.config)


def _notes(out: Path) -> dict | None:
    """Of a checkpoint that does not open."""
    try:
        return json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def disk_bytes(path: Path) -> int:
    """Of a checkpoint directory, as it is: files that are links to others count once."""
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file() and not file.is_symlink())


class _Listing:
    """A Source that only notes what is asked for."""

    dtype, device = torch.float32, torch.device("meta")

    def __init__(self, recipe: Recipe):
        self.codec = recipe.codec
        self.shapes: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        self.shapes[name] = tuple(shape)
        return torch.empty(shape, dtype=self.dtype, device=self.device) if into is None else into

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        self.shapes[name] = tuple(shape)
        return Matrix.empty(self.codec(name), shape, self.device)

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        pass


def _card(synth: Synth) -> str:
    shape = synth.config.parameters()
    return f"""# Synthetic: random weights

This directory has the shape of {synth.name or "a DeepSeek-V2"} ({shape.total:,} parameters, {shape.active:,} for a
token), and **none of its weights**: all numbers are random (seed {synth.seed}, recipe {synth.recipe.name}). It serves
to measure memory, disk and speed. What it writes is noise and says nothing about the quality of any model, of this
recipe, or of DeepSeek's weights; nor is its routing that of a trained model. The tokenizer is pocket's.
{"The experts of all layers are one file, which the others link to." if synth.shared else ""}
Made by `workbench synth`; see workbench/noise.py for what the numbers are made to have.
"""
