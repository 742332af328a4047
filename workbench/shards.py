"""The tensors of a checkpoint's safetensors files: where each one's bytes are, known to be whole before any is read."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from workbench.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


DTYPES = FLOATS | {"U8": torch.uint8}  # codes, in packed checkpoints


class Stored(NamedTuple):
    """One tensor in a file: its bytes are [start, start + nbytes) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def type(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """The tensor as it is stored, in memory of its own.

        A plain read and not a memory map: a map keeps every page it has read in the process until the shard is closed,
        closing it after each tensor means parsing the header again for each, and a file cut short under a map kills
        the process instead of raising.
        """
        raw = torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                found = file.readinto(raw.numpy())
        except OSError as error:
            raise CheckpointError(f"{self.file}: reading failed ({error}). Check the disk, or copy it again.") from None
        if found != self.nbytes:
            raise CheckpointError(f"{self.file}: it became shorter while it was read. Download it again.")
        return raw.view(self.type).view(self.shape)


def inspect(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name. CheckpointError for files that are missing, not whole, or disagree."""
    if path.is_file() and path.suffix == ".safetensors":
        files, index = [path], None
    elif not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint. Give a directory with config.json and *.safetensors.")
    elif (path / SINGLE).exists():
        files, index = [path / SINGLE], None
    elif (path / INDEX).exists():
        index = _read_index(path / INDEX)
        files = [path / name for name in sorted(set(index.values()))]
    else:
        raise CheckpointError(_no_weights(path))
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards that {INDEX} names are missing: {some(missing, 5)}. "
            "Download them again, from the same revision."
        )
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _plain_tensors(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{file}: {name} is also in {stored[name].file.name}. Shards of different downloads are mixed: "
                    "download all of them again."
                )
            stored[name] = tensor
    for name in sorted(index.keys() | stored.keys()) if index else ():
        said, found = index.get(name), str(stored[name].file.relative_to(path)) if name in stored else None
        if said != found:
            raise CheckpointError(
                f"{path}: {INDEX} puts {name} in {said or 'no shard'}, but it is in {found or 'none'}. "
                "Index and shards do not belong together: download both again."
            )
    return stored


def _no_weights(path: Path) -> str:
    found = sorted(file.name for file in path.iterdir())
    if shards := [name for name in found if name.endswith(".safetensors")]:
        return f"{path}: {INDEX} is missing, so {some(shards, 3)} cannot be put together. Download it too."
    if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
        return (
            f"{path}: only {some(pickles, 3)}, and such files run code when they are opened. Convert them where you "
            "trust them: transformers' from_pretrained(...).save_pretrained(...) writes safetensors."
        )
    return f"{path}: neither {SINGLE} nor {INDEX}; there is {some(found, 5) or 'nothing'}. Download the weights."


def _read_index(file: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        valid = bool(shard_of) and all(isinstance(shard, str) for shard in shard_of.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise CheckpointError(f"{file}: not an index, which maps tensors to shards in weight_map. Download it again.")
    return shard_of


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one file, in the order of their bytes, and its metadata. The library checks the format: header,
    offsets, and that the file is as long as both.
    """
    try:
        with file.open("rb"), safe_open(file, framework="pt"):
            pass
    except PermissionError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    except (SafetensorError, OSError, ValueError) as error:
        size = f" ({file.stat().st_size:,} bytes)" if file.is_file() else ""
        raise CheckpointError(
            f"{file}{size} is not a whole safetensors file: {error}. It was cut short or "
            "changed, or is a placeholder of Git LFS: download it again."
        ) from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", None) or {}
    stored = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        stored[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return stored, metadata


def _plain_tensors(file: Path) -> dict[str, Stored]:
    stored, _ = read_header(file)
    if any(name.endswith("weight_scale_inv") for name in stored):
        raise CheckpointError(
            f"{file}: fp8 weights with scales (weight_scale_inv) are not supported yet. "
            "Dequantise them to bfloat16 first."
        )
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{file}: {name} is stored as {tensor.dtype}; weights must be one of {', '.join(FLOATS)}. "
                "Is this a quantised checkpoint? Use the bfloat16 one."
            )
    return stored


def some(names: list[str], limit: int) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
