"""Weights in and out: named tensors from safetensors files or from a seed, and a model back to the Hugging Face layout.

A checkpoint is a directory with config.json and either model.safetensors or shards with an index.
"""

import hashlib
import json
import re
import secrets
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from workbench.config import Config
from workbench.errors import CheckpointError
from workbench.matrix import Weight, dense
from workbench.model import Model
from workbench.offloaded import Offloaded
from workbench.shards import INDEX, SINGLE, inspect, some
from workbench.weights import Plain

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Safetensors(Plain):
    """A Source over a checkpoint directory, or over one .safetensors file.

    Everything that can be wrong with the files is found here, before a tensor is read. dtype "auto" is what config.json
    names, and bfloat16 where that is float16; stored tensors of any floating-point type are converted. On device "meta"
    names and shapes are checked and nothing is read.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"):
        self.path = Path(path)
        self.stored = inspect(self.path)
        if dtype == "auto":
            named = Config.from_json(directory_of(self.path) / "config.json").dtype
            dtype = torch.float32 if named == "float32" else torch.bfloat16
        self.dtype, self.device = dtype, torch.device(device)
        self.taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor of that name and shape, or `into` filled with it; each name once.

        CheckpointError for a tensor that is missing or has another shape.
        """
        assert name not in self.taken, f"{name} is taken twice"
        assert into is None or into.shape == shape, f"{name}: {tuple(into.shape)} cannot take {shape}"
        stored = self.stored.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} {list(shape)} is missing. config.json and the weights do not belong "
                f"together, or the weights are incomplete: download both from the same repository. {self._sample()}"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: {name} should be {list(shape)} according to config.json, but is {list(stored.shape)}. "
                "config.json and the weights do not belong together: download both from the same repository."
            )
        self.taken.add(name)
        if into is None:
            into = torch.empty(shape, dtype=self.dtype, device=self.device)
        return into if self.device.type == "meta" else into.copy_(stored.read())

    def unused(self) -> list[str]:
        """Names never taken. Old checkpoints carry rotary frequencies, which are computed from the config here."""
        return [name for name in self.stored if name not in self.taken and not name.endswith("rotary_emb.inv_freq")]

    def _sample(self) -> str:
        return f"It holds {len(self.stored)} tensors: {some(sorted(self.stored), 3)}."


class Random(Plain):
    """A Source of normal noise, and of ones for the weights of norms.

    A tensor depends on its name and the seed alone, so neither order, device nor the rest of the model change it. `std`
    defaults to the config's initializer_range.
    """

    def __init__(
        self,
        config: Config | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        std: float | None = None,
    ):
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.std = std if std is not None else config.initializer_range if config else 0.02
        self.taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        assert name not in self.taken, f"{name} is taken twice"
        self.taken.add(name)
        if name.endswith("norm.weight"):
            drawn = torch.ones(shape)
        else:
            # seed and name share one checksum: torch's generator on the CPU keeps 32 bits of a seed and drops the rest
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
            drawn = torch.empty(shape).normal_(0, self.std, generator=generator)
        return drawn.to(self.device, self.dtype) if into is None else into.copy_(drawn)

    def unused(self) -> list[str]:
        return []


def save(
    model: Model,
    path: str | Path,
    *,
    files_from: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a checkpoint that this package, transformers and the usual servers load.

    `files_from` is the directory whose tokenizer goes along; `dtype` defaults to the model's. An existing checkpoint is
    replaced at the end in one step, its other files (tokenizer, card) kept; a failure leaves it as it was. At most one
    shard is held beside the model. CheckpointError where `path` is something else than a checkpoint.
    """
    path = Path(path).resolve()
    _check_replaceable(path)
    if isinstance(model.store, Offloaded):
        raise CheckpointError("experts that are on disk are a packed checkpoint already: copy its directory.")
    dtype = dtype or model.dtype
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        _write_weights(model.tensors, staging, dtype, max_shard_bytes)
        config = model.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        _write_json(staging / "config.json", config)
        ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        _write_json(staging / "generation_config.json", ends | {"do_sample": True, "temperature": 0.3, "top_p": 0.95})
        if files_from is not None:
            _copy_tokenizer(Path(files_from), staging)
        _replace(path, staging)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: saving failed ({error}). Nothing there was changed: free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fingerprint(model: Model) -> str:
    """Tells one set of weights from another: a hash over config, names, shapes, and 16 numbers of every tensor."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "torch_dtype"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    if model.checksum:  # of a packed checkpoint, wherever its experts are now
        digest.update(model.checksum.encode())
        return digest.hexdigest()[:16]
    for name, tensor in sorted(model.tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        flat = dense(tensor, model.dtype).detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // 16)][:16]
        digest.update(chosen.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself if it is one, else the files of that Hugging Face repository.

    What is already in the local cache is used without asking the network. CheckpointError lists what was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file. Give the directory it is in, with config.json and tokenizer.json.")
    if not HUB_ID.fullmatch(str(name)):
        raise CheckpointError(
            f"{str(name)!r} is neither a directory (looked in {Path.cwd()}) nor a hub id of the form owner/name."
        )
    return _download(str(name))


def _download(name: str) -> Path:
    otherwise = f"{name!r} is no directory here (looked in {Path.cwd()})"
    elsewhere = "Or download the repository where there is a connection, copy it here, and give its directory."
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - an extra: directories load without it
        from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError:
        raise CheckpointError(
            f"{otherwise}, and fetching it from Hugging Face takes a package that is not installed: "
            f'pip install "deepseek-workbench[hub]". {elsewhere}'
        ) from None
    wanted = ["config.json", *COPIED, "*.safetensors", INDEX]
    try:
        cached = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        inspect(cached)
        return cached
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # not in the cache, or not all of it: a download that was interrupted goes on where it stopped
    except HFValidationError as error:
        raise CheckpointError(f"{otherwise}, and not a valid hub id: {error}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HTTPError, OSError) as error:
        raise CheckpointError(
            f"{otherwise}, is not in the local cache, and Hugging Face could not be asked for it or did not give it "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Check the name, the connection, "
            f"HF_HUB_OFFLINE and, for a gated repository, HF_TOKEN. {elsewhere}"
        ) from error


def directory_of(path: Path) -> Path:
    return path.parent if path.suffix == ".safetensors" and not path.is_dir() else path


def _check_replaceable(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not ((path / "config.json").is_file() and any(path.glob("model*.safetensors"))):
        raise CheckpointError(f"{path} is there and is no checkpoint, so it is not overwritten. Choose another folder.")


def _write_weights(tensors: dict[str, Weight], folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.shape.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        shard = {name: dense(tensors[name], dtype).detach().to("cpu").contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library writes for the owner alone
        del shard  # before the next one is made
    if len(shards) > 1:
        total = sum(tensor.shape.numel() for tensor in tensors.values()) * dtype.itemsize
        shard_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_of})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source}: no tokenizer.json to save along. Give the directory of a tokenizer, or none.")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _replace(path: Path, staging: Path) -> None:
    """Puts `staging` in the place of `path`; the old directory stays whole until the new one is there."""
    if not path.exists():
        staging.rename(path)
        return
    old = path.with_name(f"{staging.name}.old")
    path.rename(old)
    try:
        staging.rename(path)
    finally:
        if not path.exists():
            old.rename(path)
    for file in old.iterdir():
        if not file.match("model*.safetensors*") and not (path / file.name).exists():
            file.rename(path / file.name)
    shutil.rmtree(old)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
