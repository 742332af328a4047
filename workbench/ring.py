"""The static routing recorder: ids, gates and margins of every token, written into tensors that are there beforehand.

A pass only writes; the host reads later, when somebody asks or room is needed, so generation never waits for it and a
captured graph can contain it. On a CPU, where each write would cost as much as a small layer, passes are kept as they are
and written some at a time. L layers with experts, B batch, T new tokens, K chosen.
"""

import threading
from typing import NamedTuple

import numpy as np
import torch

from workbench.config import Config
from workbench.probe import Probe

CAPACITY = 1024  # tokens
TOGETHER = 32  # tokens that are written at once where passes are kept
TAKEN = ("moe.experts", "moe.gates", "moe.scores")


class Routing(NamedTuple):
    """Of n tokens: experts int16 [n, L, K] (-1: slot not used), gates and margins float32 [n, L, K].

    A margin is the router probability of the slot's expert minus that of the best expert that was not chosen.
    """

    experts: np.ndarray
    gates: np.ndarray
    margins: np.ndarray


class RoutingLog:
    """The routing of one sequence on the host, by position. Reading it collects what the ring still holds."""

    def __init__(self, layers: int, slots: int):
        self._blocks = [_nothing(layers, slots)]
        self._ring: RoutingRing | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        self._collect()
        return sum(len(block.experts) for block in self._blocks)

    def rows(self, start: int = 0, stop: int | None = None) -> Routing:
        """Of the tokens from `start` to `stop`; fewer where the sequence ends before."""
        self._collect()
        with self._lock:
            if len(self._blocks) > 1:
                self._blocks = [Routing(*(np.concatenate(parts) for parts in zip(*self._blocks, strict=True)))]
            return Routing(*(part[start:stop] for part in self._blocks[0]))

    def fork(self, length: int) -> "RoutingLog":
        """Another log, of a sequence that begins with the first `length` tokens of this one."""
        other = RoutingLog(0, 0)
        other._blocks = [self.rows(0, length)]
        return other

    def _add(self, block: Routing) -> None:
        with self._lock:
            self._blocks.append(block)

    def _collect(self) -> None:
        if self._ring is not None:
            self._ring.drain()


class RoutingRing(Probe):
    """Records the routing of each pass into rings on the device, for the logs named in `to`.

    slots     of a token in each layer: the model's K, or as many as an edit makes it
    by_index  writes at a position that is itself a tensor, as a captured graph needs; by default on a GPU
    """

    static = True

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        slots: int | None = None,
        capacity: int = CAPACITY,
        by_index: bool | None = None,
    ):
        self.layers = tuple(layer for layer in range(config.num_hidden_layers) if config.is_moe(layer))
        self.slots = slots or config.num_experts_per_tok
        self.device = torch.device(device)
        self.by_index = self.device.type != "cpu" if by_index is None else by_index
        small = config.n_routed_experts is None or config.n_routed_experts < 255
        self._types = (torch.uint8 if small else torch.int16, torch.float16, torch.float16)
        self._unused = 255 if small else -1
        self._lock = threading.RLock()
        self._logs: list[RoutingLog] = []
        self._owed: list[tuple[int, int, list[RoutingLog]]] = []  # first row, tokens a sequence, one log a sequence
        self._passing: dict[str, list[torch.Tensor]] = {}  # site -> one tensor a layer
        self._kept: list[dict[str, list[torch.Tensor]]] = []  # passes of one shape that are not in the rings yet
        self._shape: tuple[int, ...] = ()
        self._written = 0  # rows, those of the kept passes included
        self._resize(capacity)

    def log(self) -> RoutingLog:
        """An empty log for one sequence."""
        return RoutingLog(len(self.layers), self.slots)

    def to(self, *logs: RoutingLog) -> "RoutingRing":
        """The logs of the sequences of the next passes, in the order of the batch."""
        self._logs = list(logs)
        for log in logs:
            log._ring = self
        return self

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        assert len(self._logs) == len(positions), f"{len(self._logs)} logs for {len(positions)} sequences"
        self._passing = {site: [] for site in TAKEN}
        if positions.shape != self._shape:
            self._write()
            self._shape = positions.shape
        new = positions.numel()
        if self._written + new > self.capacity:
            self.drain()
            if new > self.capacity:
                self._resize(new)
        return self

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if site in self._passing:
            missing = self.slots + (site == "moe.scores") - x.shape[-1]
            self._passing[site].append(_widened(site, x, missing) if missing else x)
        return x

    def end(self) -> None:
        if not self.layers:
            return
        if torch.is_grad_enabled():  # a kept pass must not keep a graph alive
            self._passing = {site: [x.detach() for x in parts] for site, parts in self._passing.items()}
        rows, tokens = self._shape
        with self._lock:
            self._kept.append(self._passing)
            self._owed.append((self._written, tokens, self._logs))
            self._written += rows * tokens
            if self.by_index or len(self._kept) * rows * tokens >= TOGETHER:
                self._write()

    def _write(self) -> None:
        """The passes that are kept into the rings."""
        with self._lock, torch.no_grad():
            if not self._kept:
                return
            ids, gates, scores = (self._rows(site) for site in TAKEN)  # [passes B T, L, K or K + 1]
            margins = scores[..., :-1] - scores[..., -1:]
            new = ids.shape[0]
            for ring, values in zip(self._rings, (ids, gates, margins), strict=True):
                if self.by_index:
                    ring.index_copy_(0, self._cursor + self._count[:new], values.to(ring.dtype))
                else:
                    ring[self._written - new : self._written] = values
            if self.by_index:
                self._cursor += new
            self._kept = []

    def _rows(self, site: str) -> torch.Tensor:
        whole = torch.cat([x for passing in self._kept for x in passing[site]])  # [passes L B, T, K]
        each = whole.unflatten(0, (len(self._kept), len(self.layers), -1)).flatten(2, 3)  # [passes, L, B T, K]
        return each.transpose(1, 2).flatten(0, 1)

    def drain(self) -> None:
        """Hands everything written so far to the logs."""
        with self._lock:
            owed, written = self._owed, self._written
            if not owed:
                return
            self._write()
            ids, gates, margins = (ring[:written].to("cpu", copy=True) for ring in self._rings)
            experts = ids.to(torch.int16)
            experts[ids == self._unused] = -1
            used = (experts >= 0).numpy()
            rows = Routing(
                experts.numpy(),
                np.where(used, gates.float().numpy(), np.float32(0)),
                np.where(used, margins.float().numpy(), np.float32("nan")),
            )
            for first, tokens, logs in owed:
                for number, log in enumerate(logs):
                    start = first + number * tokens
                    log._add(Routing(*(part[start : start + tokens] for part in rows)))
            self._owed, self._written = [], 0
            self._cursor.zero_()

    def _resize(self, capacity: int) -> None:
        shape = (capacity, len(self.layers), self.slots)
        with torch.inference_mode(False):  # it outlives whatever mode the caller is in
            self._rings = [torch.empty(shape, dtype=kind, device=self.device) for kind in self._types]
            self._cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._count = torch.arange(capacity, device=self.device)
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Held on the device."""
        return sum(ring.nbytes for ring in self._rings)


def _widened(site: str, x: torch.Tensor, missing: int) -> torch.Tensor:
    """With slots that are not used, where an edit gives another layer or pass more of them."""
    assert missing > 0, f"{-missing} slots too few: make RoutingRing(..., slots=n) as wide as the edits do"
    unused = x.new_full((*x.shape[:-1], missing), -1 if site == "moe.experts" else 0)
    chosen = x.shape[-1] - (site == "moe.scores")  # its last entry is the best that was not chosen
    return torch.cat([x[..., :chosen], unused, x[..., chosen:]], -1)


def _nothing(layers: int, slots: int) -> Routing:
    empty = np.empty((0, layers, slots))
    return Routing(empty.astype(np.int16), empty.astype(np.float32), empty.astype(np.float32))
