"""Calibration: what every matrix of a model reads on some text, as second moments, for a rounding that knows them.

Wanted is the model with its plain weights, all in memory: 31.4 GB for V2-Lite in bf16, beside the moments below. For a
larger one, layers would have to be gone through one by one: the residual stream of all texts kept on disk, one layer's
weights read, its moments taken, and the stream that leaves it written for the next. That is not here.
"""

import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from workbench import ops
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.experts import Resident
from workbench.model import Dense, Mixture, Model
from workbench.packfile import Entry, PackFile, PackWriter
from workbench.probe import OFF, Probe
from workbench.sizes import show_bytes
from workbench.tokenizer import Tokenizer

KIND = "deepseek-workbench calibration"
LIMIT = 8 * 2**30  # bytes of moments that are held at once
TOKENS = 512  # of a pass, where a text is not longer
EVERY = 8  # one token in so many goes through all experts, for those that few are sent to
_READS = {
    "q_proj": "attn.in",
    "q_a_proj": "attn.in",
    "kv_a_proj_with_mqa": "attn.in",
    "q_b_proj": "attn.q_latent",
    "kv_b_proj": "attn.kv_latent",
    "o_proj": "attn.z",
    "gate_proj": "mlp.in",
    "up_proj": "mlp.in",
    "down_proj": "hidden",
}


def read_by(matrix: str) -> str | None:
    """The moment of what that matrix of a checkpoint reads; None for one that is not multiplied with, as the embedding.

    A site (see probe.py) with its layer, or "hidden" for what a down projection reads: "layers.3.attn.in",
    "layers.3.shared.hidden", and of a routed expert its own, "layers.3.experts.7.mlp.in".
    """
    if matrix == "lm_head.weight":
        return "final.norm"
    parts = matrix.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 6 or parts[-2] not in _READS:
        return None
    site = _READS[parts[-2]]
    if "experts" in parts:
        site = f"experts.{parts[5]}.{site}"
    elif "shared_experts" in parts and site == "hidden":
        site = "shared.hidden"
    return f"layers.{parts[2]}.{site}"


def widths(config: Config, layers: Iterable[int] | None = None) -> dict[str, int]:
    """Every moment of a model and its width, layer by layer, the head's last; or those of some layers."""
    found = {}
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        name = f"layers.{layer}"
        found[f"{name}.attn.in"] = found[f"{name}.mlp.in"] = config.hidden_size
        if config.q_lora_rank is not None:
            found[f"{name}.attn.q_latent"] = config.q_lora_rank
        found[f"{name}.attn.kv_latent"] = config.kv_lora_rank
        found[f"{name}.attn.z"] = config.num_attention_heads * config.v_head_dim
        if not config.is_moe(layer):
            found[f"{name}.hidden"] = config.intermediate_size
            continue
        if config.n_shared_experts:
            found[f"{name}.shared.hidden"] = config.n_shared_experts * config.moe_intermediate_size
        for expert in range(config.n_routed_experts):
            found[f"{name}.experts.{expert}.mlp.in"] = config.hidden_size
            found[f"{name}.experts.{expert}.hidden"] = config.moe_intermediate_size
    if layers is None:
        found["final.norm"] = config.hidden_size
    return found


def nbytes(config: Config, layers: Iterable[int] | None = None) -> int:
    """Of the moments: V2-Lite 43.8 GB, of which its experts' own are 41.1, and 1.7 of one layer with experts."""
    return sum(torch.float32.itemsize * width * width for width in widths(config, layers).values())


class Calibration:
    """Second moments X^T X / n of what matrices read, fp32 [in, in], by the names of `read_by`.

    An expert's own are blended with those of all tokens of its layer, which weigh as much as `in` of its own tokens.
    The identity tells one calibration from another.
    """

    def __init__(self, moments: Mapping[str, torch.Tensor], identity: str):
        self.moments, self.identity = moments, identity

    @classmethod
    def collect(cls, model: Model, texts: Sequence[torch.Tensor], limit: int = LIMIT) -> "Calibration":
        """In memory. texts: int64 [B, T] each, not those that the model is measured on afterwards.

        BudgetError where the moments take more than `limit` bytes; RequestError for a model with packed weights.
        """
        if (needed := nbytes(model.config)) > limit:
            raise BudgetError(
                f"the moments of this model take {needed:,} bytes, and {limit:,} are allowed: write them to a file "
                "with `calibration.write`, or raise limit=."
            )
        moments = dict(_moments(model, texts, limit))
        checksums = (zlib.crc32(one.numpy()) for one in moments.values())
        return cls(moments, _identity(checksums))

    @classmethod
    def open(cls, path: Path) -> "Calibration":
        """What `write` wrote; a moment is read when it is asked for. CheckpointError for any other file."""
        file = PackFile(path)
        if file.metadata.get("kind") != KIND:
            raise CheckpointError(f"{path} is no calibration. Make one with calibration.write.")
        return cls(_OnDisk(file), _identity(file.checksums.values()))

    def of(self, matrix: str, width: int) -> torch.Tensor | None:
        """Of what a matrix of that name and width reads; None for one that is not multiplied with.

        CheckpointError where the calibration is of another model, or not finite.
        """
        name = read_by(matrix)
        if name is None:
            return None
        moment = self.moments.get(name)
        if moment is None or moment.shape != (width, width):
            said = "is missing" if moment is None else f"is {moment.shape[0]} wide, not {width}"
            raise CheckpointError(f"{matrix}: the moment {name} {said}: the calibration is of another model.")
        if not torch.isfinite(moment).all():
            raise CheckpointError(f"{matrix}: the moment {name} is not finite. Calibrate again in bf16 or fp32.")
        return moment


def texts_of(file: Path, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """A text a line, at most `TOKENS` of each. RequestError where the file cannot be read or has nothing in it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as text ({error}).") from None
    read = [[tokenizer.bos, *tokenizer.encode(line)][:TOKENS] for line in lines if line.strip()]
    if not read:
        raise RequestError(f"{file}: nothing in it. Give some thousand tokens of what the model will read.")
    return [torch.tensor([tokens]) for tokens in read]


def write(model: Model, texts: Sequence[torch.Tensor], path: Path, limit: int = LIMIT) -> None:
    """`Calibration.collect` into a file, as many layers at a time as `limit` allows, but at least one.

    The texts are read once for each group of layers. RequestError as there; BudgetError where the disk is too small,
    CheckpointError where it fails.
    """
    needed, free = nbytes(model.config), shutil.disk_usage(path.parent).free
    if needed > free:
        raise BudgetError(
            f"{path.parent}: the moments of this model take {show_bytes(needed)} there while it is packed, and "
            f"{show_bytes(free)} are free. Free some, or pack onto another disk."
        )
    entries = [Entry(name, torch.float32, (width, width)) for name, width in widths(model.config).items()]
    try:
        with PackWriter(path, entries, {"kind": KIND}) as file:
            for _, moment in _moments(model, texts, limit):
                file.write(moment)
    except OSError as error:
        raise CheckpointError(f"{path}: the moments cannot be written ({error.strerror or error}).") from error


class _OnDisk(Mapping[str, torch.Tensor]):
    def __init__(self, file: PackFile):
        self.file = file

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.file.stored[name]
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        self.file.read(name, raw)
        return raw.view(stored.type).view(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.stored)

    def __len__(self) -> int:
        return len(self.file.stored)


def _identity(checksums: Iterable[int]) -> str:
    return f"{zlib.crc32(' '.join(f'{one:08x}' for one in checksums).encode()):08x}"


def _moments(model: Model, texts: Sequence[torch.Tensor], limit: int) -> Iterator[tuple[str, torch.Tensor]]:
    """In the order of `widths`."""
    if not isinstance(model.store, Resident) or model.store.packed:
        raise RequestError("a calibration is taken on plain weights that are all in memory: open the checkpoint so.")
    if not sum(text.numel() for text in texts):
        raise RequestError("there is no text to calibrate on: give tokens [B, T].")
    last, groups = model.config.num_hidden_layers - 1, [[]]
    for layer in range(last + 1):
        if groups[-1] and nbytes(model.config, [*groups[-1], layer]) > limit:
            groups.append([])
        groups[-1].append(layer)
    for layers in groups:
        sums = _Sums(model, layers)
        with torch.inference_mode():
            for text in texts:
                for part in text.split(max(1, TOKENS // text.shape[1])):
                    model(part, probe=sums, logits="all" if last in layers else "last")
        for name in widths(model.config, layers):
            yield name, sums.mean(name)
        if last in layers:
            yield "final.norm", sums.mean("final.norm")


class _Sums(Probe):
    """x^T x over all tokens that passed, and how many those are: sums, by moment; others: over what all experts saw."""

    def __init__(self, model: Model, layers: Sequence[int]):
        self.model, self.layers = model, layers
        self.sums: dict[str, tuple[torch.Tensor, int]] = {}
        self.others: dict[str, tuple[torch.Tensor, int]] = {}

    def at(self, layer: int) -> Probe:
        return _Layer(self, layer) if layer in self.layers else OFF

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site == "final.norm":
            _add(self.sums, site, x)
        return x

    def mean(self, name: str) -> torch.Tensor:
        layer, own, _ = name.partition(".experts.")
        if not own:
            total, count = self.sums.pop(name) if ".mlp.in" not in name else self.sums[name]
            return (total / count).cpu()
        others, of_others = self.others.pop(name) if name in self.others else self.sums[f"{layer}.mlp.in"]
        total, count = self.sums.pop(name, (0.0, 0))
        width = len(others)
        return ((total + others * (width / of_others)) / (count + width)).cpu()


class _Layer(Probe):
    def __init__(self, parent: _Sums, layer: int):
        self.parent, self.name, self.mlp = parent, f"layers.{layer}", parent.model.blocks[layer].mlp
        self.bank = parent.model.store.bank(layer) if isinstance(self.mlp, Mixture) else None
        self.read = self.ids = None

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        sums = self.parent.sums
        if site in ("attn.in", "attn.q_latent", "attn.kv_latent", "mlp.in"):
            _add(sums, f"{self.name}.{site}", x)
        if site == "attn.z":
            _add(sums, f"{self.name}.{site}", x.flatten(-2))
        elif site == "mlp.in":
            self.read = x.flatten(0, -2)
            every = self.mlp if isinstance(self.mlp, Dense) else self.mlp.shared
            if every is not None:
                shared = "" if every is self.mlp else "shared."
                _add(sums, f"{self.name}.{shared}hidden", _hidden(x, every.gate_up))
        elif site == "moe.experts":
            self._experts(x.flatten(0, -2))
        return x

    def _experts(self, ids: torch.Tensor) -> None:
        for expert, gate_up in enumerate(self.bank.gate_up):
            name = f"{self.name}.experts.{expert}"
            own = self.read[(ids == expert).any(-1)]
            _add(self.parent.sums, f"{name}.mlp.in", own)
            _add(self.parent.sums, f"{name}.hidden", _hidden(own, gate_up))
            _add(self.parent.others, f"{name}.hidden", _hidden(self.read[::EVERY], gate_up))


def _hidden(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return ops.swiglu(ops.linear(x, gate_up))


def _add(sums: dict[str, tuple[torch.Tensor, int]], name: str, x: torch.Tensor) -> None:
    x = x.flatten(0, -2).float()
    if not len(x):
        return
    total, count = sums.get(name, (None, 0))
    sums[name] = x.mT @ x if total is None else total.addmm_(x.mT, x), count + len(x)
