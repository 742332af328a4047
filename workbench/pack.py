"""A packed checkpoint: weights stored by a recipe, every expert one block. Opening it needs nothing but its directory.

config.json                       as published, and that it is packed
packed.json                       version, recipe, files, one checksum over all of them; digests of the SEALED files
weights-base.safetensors          embedding, last norm, head
weights-layer-007.safetensors     what every token passes in that layer
experts-layer-007.safetensors     its routed experts: tensor "12" is the block of expert 12 (see blocks.Layout)

A matrix whose codec has several parts is stored as tensors NAME:0, NAME:1 and so on; anything else under its own name.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from workbench.blocks import Layout
from workbench.codec import Codec
from workbench.config import Config
from workbench.errors import CheckpointError, RequestError
from workbench.matrix import Matrix
from workbench.packfile import Entry, PackFile, write_json
from workbench.recipe import Recipe
from workbench.weights import expert_layout

DESCRIPTION = "packed.json"
UNFINISHED = "unfinished.json"  # in the directory until it is complete: what is being written
KIND, VERSION = "deepseek-workbench packed checkpoint", 1
# A damaged one would change tokens and nobody would notice. The other files beside the weights are settings to edit.
SEALED = ("config.json", "tokenizer.json")
_AGAIN = "Copy the whole directory again, or pack it again."
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def weights_file(name: str) -> str:
    """The file that a tensor which every token passes is in."""
    layer = _LAYER.match(name)
    return f"weights-layer-{int(layer[1]):03}.safetensors" if layer else "weights-base.safetensors"


def experts_file(layer: int) -> str:
    return f"experts-layer-{layer:03}.safetensors"


def part_names(name: str, codec: Codec | None, width: int) -> list[str]:
    """Under which names the parts of a matrix are stored."""
    count = 1 if codec is None else len(codec.layout(width))
    return [name] if count == 1 else [f"{name}:{part}" for part in range(count)]


def part_entries(name: str, shape: tuple[int, ...], codec: Codec | None, plain: torch.dtype) -> list[Entry]:
    """What is written of one tensor; `plain` is the type of one that is not packed."""
    if codec is None:
        return [Entry(name, plain, tuple(shape))]
    *rows, width = shape
    layout = codec.layout(width)
    return [Entry(part, dtype, (*rows, size)) for part, (dtype, size) in zip(part_names(name, codec, width), layout)]


def block_entries(config: Config, layout: Layout) -> list[Entry]:
    return [Entry(str(expert), torch.uint8, (layout.nbytes,)) for expert in range(config.n_routed_experts)]


@dataclass(frozen=True)
class Pack:
    """What packed.json says. `files`: name to {"bytes", "checksums"}, the latter a digest of the tensors' own."""

    path: Path
    config: Config
    recipe: Recipe
    files: dict[str, dict]
    synthetic: bool = False
    notes: dict = field(default_factory=dict)  # how it was made

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """CheckpointError for one that is still being written, was stopped before its end, or lost its description."""
        try:
            there = [name for name in (DESCRIPTION, UNFINISHED, weights_file("")) if (path / name).is_file()]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
        if there and there[0] == UNFINISHED:
            raise CheckpointError(
                f"{path} is not finished. Run the `workbench pack` or `workbench synth` that was writing it again: it "
                "goes on where it stopped."
            )
        if there and there[0] != DESCRIPTION:
            raise CheckpointError(
                f"{path} lost its {DESCRIPTION}. Copy it again, or give the same `workbench pack` again: it finds what "
                "is whole."
            )
        return bool(there)

    @classmethod
    def open(cls, path: Path) -> "Pack":
        """CheckpointError where the description is damaged, of a later version, or files are missing or cut short."""
        where = path / DESCRIPTION
        if not cls.is_one(path):
            raise CheckpointError(
                f"{path} is no packed checkpoint: it has no {DESCRIPTION}. `workbench pack` makes one."
            )
        try:
            said = json.loads(where.read_text(encoding="utf-8"))
            if said["kind"] != KIND or said["version"] != VERSION:
                raise CheckpointError(f"{where}: version {said['version']} of {said['kind']!r} is not known here.")
            recipe = Recipe.from_list(said["recipe"]["name"], said["recipe"]["rules"])
            config = Config.from_json(path / "config.json")
            pack = cls(path, config, recipe, dict(said["files"]), said["synthetic"], said["notes"])
            wrong, sealed = said["checksum"] != pack.checksum, dict(said["sealed"])
        except (OSError, ValueError, KeyError, TypeError, RequestError) as error:
            raise CheckpointError(f"{where}: describes no packed checkpoint ({error}). Pack it again.") from None
        if wrong:
            raise CheckpointError(f"{where}: its checksum does not fit what it lists. Copy or pack it again.")
        for name, about in pack.files.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != about["bytes"]:
                raise CheckpointError(
                    f"{path / name}: {'missing' if found is None else f'{found:,} bytes'} where {about['bytes']:,} "
                    "were written. Copy it again, or give the same `workbench pack` (or synth) again: it goes on."
                )
        found = _sealed(path)
        if changed := [name for name in sealed if found.get(name) != sealed[name]]:
            raise CheckpointError(f"{path / changed[0]} is not the one that was packed. {_AGAIN}")
        return pack

    def open_file(self, name: str, direct: bool = False) -> PackFile:
        """One of `files`. CheckpointError where it is not the one that is listed."""
        file = PackFile(self.path / name, direct)
        if described(file) != self.files.get(name):
            raise CheckpointError(f"{file.path} is not the file that {DESCRIPTION} lists under that name. {_AGAIN}")
        return file

    def write(self) -> None:
        """Writes config.json and packed.json: what makes the directory a checkpoint, so it comes last."""
        said = {"quantization_config": {"quant_method": "deepseek-workbench", "recipe": self.recipe.name}}
        write_json(self.path / "config.json", self.config.to_dict() | said)
        write_json(self.path / DESCRIPTION, {
            "kind": KIND, "version": VERSION, "synthetic": self.synthetic, "notes": self.notes,
            "recipe": {"name": self.recipe.name, "rules": self.recipe.rules},
            "checksum": self.checksum, "files": self.files, "sealed": _sealed(self.path),
        })  # fmt: skip

    @property
    def checksum(self) -> str:
        """Of everything: the same weights, packed by the same recipe, have the same."""
        listed = {name: [about["bytes"], about["checksums"]] for name, about in sorted(self.files.items())}
        return hashlib.sha256(json.dumps([self.recipe.rules, listed]).encode()).hexdigest()

    @cached_property
    def layout(self) -> Layout | None:
        """Of the expert blocks, the same in every layer; None where the experts are plain."""
        layers = [layer for layer in range(self.config.num_hidden_layers) if self.config.is_moe(layer)]
        layouts = {expert_layout(self.config, layer, self.recipe.codec) for layer in layers}
        if len(layouts) > 1:
            raise CheckpointError(f"{self.path}: layers whose experts are packed in different ways are not supported.")
        return next(iter(layouts), None)

    @property
    def nbytes(self) -> int:
        """On disk, where no file is shared."""
        return sum(about["bytes"] for about in self.files.values())


def described(file: PackFile) -> dict:
    """What packed.json says of a file: its bytes, and a digest of name, type, shape and checksum of every tensor."""
    listed = [[name, one.dtype, one.shape, file.checksums[name]] for name, one in file.stored.items()]
    return {"bytes": file.path.stat().st_size, "checksums": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}


class PackedSource:
    """A Source over a packed checkpoint. Every tensor is checked against its checksum when it is read."""

    def __init__(self, pack: Pack, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.pack, self.dtype, self.device = pack, dtype, torch.device(device)
        self.taken: set[str] = set()
        self._files = {name: pack.open_file(name) for name in pack.files if name.startswith("weights-")}
        self.shelf = Shelf(pack) if pack.layout else None

    def codec(self, name: str) -> Codec | None:
        return self.pack.recipe.codec(name)

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        codec = self.codec(name)
        if codec is None:
            found = self._read(name, name, tuple(shape))
        else:
            found = self._matrix(name, shape, codec).dense(self.dtype)
        if into is None:
            into = torch.empty(shape, dtype=self.dtype, device=self.device)
        return into.copy_(found)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        return self._matrix(name, shape, self.codec(name))

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        if self.device.type != "meta":
            self.shelf.read(layer, expert, into)

    def unused(self) -> list[str]:
        held = {name for file in self._files.values() for name in file.stored}
        return sorted(held - self.taken)

    def _matrix(self, name: str, shape: tuple[int, ...], codec: Codec) -> Matrix:
        entries = part_entries(name, shape, codec, self.dtype)
        return Matrix(codec, shape[-1], tuple(self._read(name, entry.name, entry.shape) for entry in entries))

    def _read(self, name: str, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._files.get(weights_file(name))
        stored = file.stored.get(part) if file else None
        if stored is None or stored.shape != shape:
            raise CheckpointError(
                f"{self.pack.path / weights_file(name)}: {part} {list(shape)} is missing"
                f"{f', it is {list(stored.shape)}' if stored else ''}. config.json is not the one it was packed with."
            )
        self.taken.add(part)
        if self.device.type == "meta":
            return torch.empty(shape, dtype=stored.type, device="meta")
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        file.read(part, raw)
        return raw.view(stored.type).view(shape).to(self.device)


class Shelf:
    """The expert blocks of a packed checkpoint, read past the system's cache. See offloaded.Shelf."""

    def __init__(self, pack: Pack):
        self.layout = pack.layout
        self.files: dict[int, PackFile] = {}
        for layer in range(pack.config.num_hidden_layers):
            if pack.config.is_moe(layer):
                self.files[layer] = file = pack.open_file(experts_file(layer), direct=True)
                sizes = {name: stored.nbytes for name, stored in file.stored.items()}
                if sizes != {entry.name: entry.nbytes for entry in block_entries(pack.config, pack.layout)}:
                    raise CheckpointError(
                        f"{file.path}: not {pack.config.n_routed_experts} blocks of {pack.layout.nbytes:,} bytes. "
                        "Copy or pack it again."
                    )

    def read(self, layer: int, expert: int, into: torch.Tensor) -> None:
        self.files[layer].read(str(expert), into)


def _sealed(path: Path) -> dict[str, str]:
    files = (path / name for name in SEALED)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
