"""The Recorder: a probe that keeps what passes the sites it was asked to watch."""

import math
from collections.abc import Collection, Iterable

import numpy as np
import torch

from workbench.config import Config
from workbench.errors import BudgetError, RequestError
from workbench.probe import INSIDE, OFF, SITES, Probe, check_fires, known, layers_with, sizes

LIMIT = 2**30  # bytes


class Recorder(Probe):
    """Keeps what passes `sites`, with its gradient history: `recorder["resid.post", 3]`, or with layer None outside.

    layers     only these; positions: only tokens at these places in their sequence (a range, or any whole numbers)
    limit      bytes. A pass that would need more is refused before it begins, with BudgetError.

    Several passes (chunks of a prompt, then tokens one by one) are joined along the tokens. In [B, H, T, S] a pass
    knows only the keys that were there: later ones, and those that a shorter row of a batch does not have, are NaN, and
    0 in attn.pattern. A site that the model does not have, or not in these layers, is a RequestError when a pass
    begins; one that nothing passed, when it is asked for. Where a pass computes its last logits only (logits="last"),
    final.norm and logits have no other tokens.
    """

    def __init__(
        self,
        *sites: str,
        layers: int | Iterable[int] | None = None,
        positions: int | Iterable[int] | None = None,
        limit: int = LIMIT,
    ):
        self.sites = known(sites)
        self.layers = None if layers is None else frozenset(_several("layers", layers))
        self.positions = None if positions is None else _several("positions", positions)
        self.limit = limit
        self.nbytes = 0
        self._pieces: dict[tuple[str, int | None], list[torch.Tensor]] = {}

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        check_fires(self.sites, self.layers, config)
        where = self._where(positions)
        if where is not None and not where.numel():
            return OFF
        kept = positions.shape[1] if where is None else where.numel()
        length = int(positions.max()) + 1
        needed = self._needed(config, positions.shape[0], kept, length, dtype)
        if self.nbytes + needed > self.limit:
            raise BudgetError(
                f"recording {', '.join(self.sites)} over {kept} tokens takes {_size(needed)}"
                f"{f' on top of {_size(self.nbytes)}' if self.nbytes else ''}; the limit is {_size(self.limit)}. Watch "
                "fewer sites, narrow with layers= or positions=, use a shorter text, or raise limit=."
            )
        return _Pass(self, where, positions)

    def __getitem__(self, key: tuple[str, int | None]) -> torch.Tensor:
        pieces = self._pieces.get(key)
        if pieces is None:
            seen = ", ".join(f"{site} in layers {self.layers_of(site)}" for site in self.sites if self.layers_of(site))
            raise RequestError(
                f"nothing passed {key!r}. Recorded: {seen or 'nothing yet; run a pass with this probe'}."
            )
        if len(pieces) > 1:
            taken = list(pieces)
            pieces[: len(taken)] = [_joined(key[0], taken)]  # in place: another thread may go on recording
        return pieces[0]

    def __contains__(self, key: tuple[str, int | None]) -> bool:
        return key in self._pieces

    @property
    def seen(self) -> dict[tuple[str, int | None], torch.Tensor]:
        """Everything recorded, by site and layer."""
        return {key: self[key] for key in self._pieces}

    def layers_of(self, site: str) -> list[int | None]:
        """Where something was recorded at this site."""
        return sorted((layer for name, layer in self._pieces if name == site), key=lambda layer: (layer is None, layer))

    def check(self) -> None:
        """RequestError if a site was watched and nothing passed it."""
        silent = [site for site in self.sites if not self.layers_of(site)]
        if silent:
            raise RequestError(f"nothing passed {', '.join(silent)}: no token was at these positions.")

    def clear(self) -> None:
        """Forgets everything recorded."""
        self._pieces.clear()
        self.nbytes = 0

    def _where(self, positions: torch.Tensor) -> torch.Tensor | None:
        if self.positions is None:
            return None
        wanted = [[position in self.positions for position in row] for row in positions.tolist()]
        if any(row != wanted[0] for row in wanted):
            raise RequestError("the rows of this batch are at different positions: record them one by one.")
        return torch.tensor([index for index, there in enumerate(wanted[0]) if there], dtype=torch.int64)

    def _needed(self, config: Config, batch: int, new: int, length: int, dtype: torch.dtype) -> int:
        size, total = sizes(config, batch, new, length), 0
        for site in map(SITES.get, self.sites):
            layers = [n for n in layers_with(site.name, config) if n is None or self.layers is None or n in self.layers]
            total += len(layers) * math.prod(size[d] for d in site.dims.split()) * (site.dtype or dtype).itemsize
        return total

    def _keep(self, pieces: dict[tuple[str, int | None], torch.Tensor]) -> None:
        for key, piece in pieces.items():
            before = self._pieces.setdefault(key, [])
            if "T" not in SITES[key[0]].dims.split():  # keys of all tokens so far, those of the pass before included
                self.nbytes -= sum(old.nbytes for old in before)
                before.clear()
            before.append(piece)
            self.nbytes += piece.nbytes


class _Pass(Probe):
    """One pass. What it saw is handed over when it is complete, so that a failed one leaves nothing."""

    def __init__(self, recorder: Recorder, where: torch.Tensor | None, positions: torch.Tensor):
        self.recorder, self.where, self.new = recorder, where, positions.shape[1]
        last = positions[:, -1]
        self.length = int(last.max()) + 1
        self.absent = torch.arange(self.length) > last[:, None] if last.unique().numel() > 1 else None  # [B, S]
        self.seen: dict[tuple[str, int | None], torch.Tensor] = {}

    def at(self, layer: int) -> Probe:
        layers = self.recorder.layers
        return OFF if layers is not None and layer not in layers else _Layer(self, layer)

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self.recorder.sites:
            self.keep(site, None, x)
        return x

    def keep(self, site: str, layer: int | None, x: torch.Tensor) -> None:
        dims = SITES[site].dims.split()
        if "S" in dims:
            axis = dims.index("S")
            x = x.narrow(axis, 0, self.length)  # a batch is padded to its longest sequence
            if self.absent is not None:
                absent = self.absent.view([n if d in (0, axis) else 1 for d, n in enumerate(x.shape)])
                x = x.masked_fill(absent.to(x.device), _absent(site))
        if self.where is not None and "T" in dims:
            axis = dims.index("T")
            left_out = self.new - x.shape[axis]  # by a pass that computes its last logits only
            where = self.where[self.where >= left_out] - left_out
            if not where.numel():
                return
            x = x.index_select(axis, where.to(x.device))
        elif not torch.is_grad_enabled() and x.untyped_storage().nbytes() > x.nbytes:
            x = x.clone()  # not a window into a larger buffer, which would stay as long as the record
        self.seen[site, layer] = x

    def end(self) -> None:
        self.recorder._keep(self.seen)


class _Layer(Probe):
    def __init__(self, parent: _Pass, layer: int):
        self.parent, self.layer, self.sites = parent, layer, parent.recorder.sites

    def opens(self, op: str) -> bool:
        return any(site in self.sites for site in INSIDE[op])

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self.sites:
            self.parent.keep(site, self.layer, x)
        return x


def _several(name: str, numbers: int | Iterable[int]) -> Collection[int]:
    """A range as it is, which may be long; anything else as a set."""
    if isinstance(numbers, range):
        return numbers
    try:
        chosen = {numbers} if isinstance(numbers, int) else set(numbers)
    except TypeError:
        chosen = None
    if not chosen or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0 for n in chosen):
        raise RequestError(f"{name} must be whole numbers, 0 or more, or a range; got {numbers!r}.")
    return chosen


def _joined(site: str, pieces: list[torch.Tensor]) -> torch.Tensor:
    dims = SITES[site].dims.split()
    if "S" in dims:
        length, pad = max(piece.shape[-1] for piece in pieces), torch.nn.functional.pad
        pieces = [pad(piece, (0, length - piece.shape[-1]), value=_absent(site)) for piece in pieces]
    return torch.cat(pieces, dims.index("T"))


def _absent(site: str) -> float:
    return 0.0 if site == "attn.pattern" else math.nan


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
