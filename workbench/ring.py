"""The static routing recorder: ids, gates and margins of every token, written into tensors that are there beforehand.

A pass only writes; the host reads later, when somebody asks or room is needed, so generation never waits for it. Where
routers are kernels they write what they chose themselves (`RingRow`), also in a captured pass. On a CPU, where any
operation costs as much as a small product, what passed is only kept, and written some passes at a time.
L layers with experts, B batch, T new tokens, K chosen.
"""

import math
import threading
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from workbench.config import Config
from workbench.probe import OFF, Probe, Silent

CAPACITY = 1024  # tokens
TOGETHER = 64  # tokens written at once on a CPU


class Routing(NamedTuple):
    """Of n tokens: experts int16 [n, L, K] (-1: slot not used), gates and margins float32 [n, L, K].

    A margin is the router probability of the slot's expert minus that of the best expert that was not chosen.
    """

    experts: np.ndarray
    gates: np.ndarray
    margins: np.ndarray


class RingRow(NamedTuple):
    """Where the router of one layer writes: token n of the pass at row cursor + n, column `layer`, [any, L, K] each."""

    experts: torch.Tensor  # uint8 or int16
    gates: torch.Tensor  # fp16
    margins: torch.Tensor  # fp16
    cursor: torch.Tensor  # int64 [1], on the device
    layer: int  # of those with experts, counted from 0

    def write(self, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor) -> None:
        """Of N tokens, ids and gates [N, K], scores [N, K + 1]: at a place that a captured pass can read."""
        where = self.cursor + torch.arange(len(ids), device=ids.device)
        for ring, values in zip(self[:3], (ids, gates, scores[:, :-1] - scores[:, -1:]), strict=True):
            ring[:, self.layer].index_copy_(0, where, values.to(ring.dtype))


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


class _Run(NamedTuple):
    """Passes of one shape for the same sequences, one after the other: rows `first` on are [passes, B, T]."""

    first: int
    passes: int
    tokens: int  # T
    logs: tuple[RoutingLog, ...]


class RoutingRing(Silent):
    """Records the routing of each pass into rings on the device, for the logs named in `to`.

    slots     of a token in each layer: the model's K, or as many as an edit makes it
    """

    static = quiet = True

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        slots: int | None = None,
        capacity: int = CAPACITY,
    ):
        self.layers = tuple(layer for layer in range(config.num_hidden_layers) if config.is_moe(layer))
        self.slots = slots or config.num_experts_per_tok
        self.device = torch.device(device)
        small = config.n_routed_experts is None or config.n_routed_experts < 255
        self._types = (torch.uint8 if small else torch.int16, torch.float16, torch.float16)
        self._unused = 255 if small else -1
        self._lock = threading.RLock()
        self._logs: tuple[RoutingLog, ...] = ()
        self._owed: list[_Run] = []  # written, not yet handed to the logs
        self._written = 0  # rows
        self._passed: list[torch.Tensor] = []  # ids, gates and scores of each layer, one after the other
        self._kept: list[tuple[list[torch.Tensor], tuple[RoutingLog, ...]]] = []  # passes that are not written yet
        # ids of one layer that are kept before they are written
        self._size, self._enough = 0, TOGETHER * self.slots if self.device.type == "cpu" else 1
        self._coming, self._direct = 0, False  # tokens of the pass that runs, and whether its routers write themselves
        self._resize(capacity)

    def log(self) -> RoutingLog:
        """An empty log for one sequence."""
        return RoutingLog(len(self.layers), self.slots)

    def to(self, *logs: RoutingLog) -> "RoutingRing":
        """The logs of the sequences of the next passes, in the order of the batch."""
        self._logs = logs
        for log in logs:
            log._ring = self
        return self

    def begin(self, config: Config, positions: torch.Tensor, dtype: torch.dtype) -> Probe:
        self._passed, self._coming, self._direct = [], positions.numel(), False
        return self

    def at(self, layer: int) -> Probe:
        return self if layer in self.layers else OFF

    def row(self, layer: int) -> RingRow:
        """Where the router of this layer writes in the passes that `direct` announces."""
        return RingRow(*self._rings, self._cursor, self.layers.index(layer))

    def held(self) -> object:
        return id(self), self.capacity

    def direct(self) -> None:
        """The routers of the pass that has begun write themselves: makes room, and sets the cursor on the device."""
        with self._lock, torch.no_grad():
            self._write()
            self._make_room(self._coming)
            self._cursor.fill_(self._written)
            self._direct = True

    def routed(
        self, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        missing = self.slots - ids.size(-1)
        self._passed += (ids, gates, scores) if not missing else _widened(ids, gates, scores, missing)
        return gates

    def end(self) -> None:
        if not self.layers:
            return
        if self._direct:
            with self._lock:
                self._owe(1, self._coming // len(self._logs), self._logs)
            return
        passed = [x.detach() for x in self._passed] if torch.is_grad_enabled() else self._passed
        with self._lock:
            self._kept.append((passed, self._logs))
            self._size += passed[0].numel()
            if self._size >= self._enough:
                self._write()

    def _write(self) -> None:
        """The passes that are kept into the rings, those of one shape and the same sequences together."""
        with self._lock, torch.no_grad():
            kept, self._kept, self._size = self._kept, [], 0
            for (shape, logs), run in groupby(kept, lambda one: (one[0][0].shape, one[1])):
                rows, tokens, _ = shape
                assert len(logs) == rows, f"{len(logs)} logs for {rows} sequences"
                passes = [passed for passed, _ in run]
                room = max(1, self.capacity // (rows * tokens))
                for first in range(0, len(passes), room):
                    self._put(passes[first : first + room], tokens, logs)

    def _put(self, passes: list[list[torch.Tensor]], tokens: int, logs: tuple[RoutingLog, ...]) -> None:
        ids, gates, scores = ([x for passed in passes for x in passed[kind::3]] for kind in range(3))
        ids, gates, scores = (self._rows(parts, len(passes)) for parts in (ids, gates, scores))
        new = len(ids)
        self._make_room(new)
        first = self._written
        for ring, values in zip(self._rings, (ids, gates, scores[..., :-1] - scores[..., -1:]), strict=True):
            ring[first : first + new] = values
        self._owe(len(passes), tokens, logs)

    def _make_room(self, new: int) -> None:
        if self._written + new > self.capacity:
            self._hand_over()
            if new > self.capacity:
                self._resize(new)

    def _owe(self, passes: int, tokens: int, logs: tuple[RoutingLog, ...]) -> None:
        """Notes whose the rows are that were written last."""
        before = self._owed[-1] if self._owed else None
        if before and before[2:] == (tokens, logs):
            self._owed[-1] = before._replace(passes=before.passes + passes)
        else:
            self._owed.append(_Run(self._written, passes, tokens, logs))
        self._written += passes * tokens * len(logs)

    def _rows(self, parts: list[torch.Tensor], passes: int) -> torch.Tensor:
        """[B, T, K] of each pass and layer, as [passes B T, L, K]."""
        each = torch.cat(parts).unflatten(0, (passes, len(self.layers), -1)).flatten(2, 3)
        return each.transpose(1, 2).flatten(0, 1)

    def drain(self) -> None:
        """Hands everything written so far to the logs."""
        with self._lock:
            self._write()
            self._hand_over()

    def _hand_over(self) -> None:
        if self._owed:
            self._give_to_logs()
        self._owed = []
        if not self._direct:  # else a pass may be writing behind what was read
            self._written = 0

    def _give_to_logs(self) -> None:
        ids, gates, margins = (ring[: self._written].cpu().numpy() for ring in self._rings)
        rows = [ids.astype(np.int16), gates.astype(np.float32), margins.astype(np.float32)]
        unused = ids == self._unused
        if unused.any():
            for part, filling in zip(rows, (-1, 0, np.nan), strict=True):
                part[unused] = filling
        for run in self._owed:
            shape = (run.passes, len(run.logs), run.tokens)
            stop = run.first + math.prod(shape)
            parts = [part[run.first : stop].reshape(*shape, *part.shape[1:]) for part in rows]
            for number, log in enumerate(run.logs):
                log._add(Routing(*(part[:, number].reshape(-1, *part.shape[3:]) for part in parts)))

    def _resize(self, capacity: int) -> None:
        shape = (capacity, len(self.layers), self.slots)
        with torch.inference_mode(False):  # it outlives whatever mode the caller is in
            self._rings = [torch.empty(shape, dtype=kind, device=self.device) for kind in self._types]
            self._cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Held on the device."""
        return sum(ring.nbytes for ring in self._rings)


def _widened(
    ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor, missing: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With slots that are not used, where an edit gives another layer or pass more of them."""
    assert missing > 0, f"{-missing} slots too few: make RoutingRing(..., slots=n) as wide as the edits do"
    pad = torch.nn.functional.pad
    chosen, best = scores[..., :-1], scores[..., -1:]
    return pad(ids, (0, missing), value=-1), pad(gates, (0, missing)), torch.cat([pad(chosen, (0, missing)), best], -1)


def _nothing(layers: int, slots: int) -> Routing:
    empty = np.empty((0, layers, slots))
    return Routing(empty.astype(np.int16), empty.astype(np.float32), empty.astype(np.float32))
