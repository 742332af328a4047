"""Fetching: the experts that one layer needs in one pass, brought in while those that are near are computed."""

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from workbench.link import Link
from workbench.slots import Slots, Worth
from workbench.transfers import Visit


class Tiers(Protocol):
    """What is visited: see offloaded.Offloaded."""

    near: Slots
    far: Slots | None
    landing: Slots
    worth: Worth
    link: Link
    early: dict[int, Future]
    place: dict[int, int]
    experts: int
    passes: int

    def fetch(self, key: int) -> Future: ...

    def landed(self, key: int, reading: Future) -> BaseException | None: ...


class Fetching:
    """One visit to a store. Keys are MoE layer number x experts + expert.

    An expert goes through `unread`, `reading`, `behind` (in main memory behind the device), `ready`; one that is nearer
    skips what it has behind it. A guard keeps its slots from being given away until its wave has been computed.
    """

    def __init__(self, store: Tiers, layer: int, ids: torch.Tensor):
        self.store, self.layer, self.ids, self.device = store, layer, ids.cpu(), ids.device
        self.first = store.place[layer] * store.experts
        self.keys = self.ids.unique().numpy() + self.first
        self.unread: deque[int] = deque()
        self.reading: dict[Future, int] = {}
        self.behind: dict[int, ExitStack] = {}
        self.ready: deque[tuple[Slots, np.ndarray, ExitStack]] = deque()
        self.current = ExitStack()
        self.hits = np.zeros(len(self.keys), dtype=bool)
        self.waited, self.near, self.early, self.disk, self.computed_far = 0.0, 0, 0, 0, 0

    def begin(self) -> None:
        """Sees what is where, and starts to read what is only on the shelf."""
        store = self.store
        foretold = np.isin(self.keys, self._take_early())
        store.worth.use(self.keys, store.passes)
        here = store.near.find(self.keys) >= 0
        self.hits = here & ~foretold
        if here.any():
            self._make_ready(store.near, self.keys[here])
        coming = set(self.reading.values())
        for key in self.keys[~here].tolist():
            if store.far is not None and store.far.find(np.array([key]))[0] >= 0:
                self.behind[key] = self._guard(store.far, [key])
            elif key not in coming:
                self.unread.append(key)
        self.near, self.early, self.disk = int(self.hits.sum()), int(foretold.sum()), len(self.unread)
        self._read()

    def wave(self) -> tuple[Slots, np.ndarray] | None:
        """The next experts to compute, and the slots they are in. The ones before have been computed."""
        self.current.close()
        self._read()
        if not self.ready and not self.behind:
            self._await()
        if not self.ready and self.behind:
            self._bring()
        if not self.ready:
            return None
        source, keys, self.current = self.ready.popleft()
        return source, keys

    def choices(self, source: Slots, keys: np.ndarray) -> torch.Tensor:
        """The slot of every choice [N, K] that is among these experts, -1 for the others."""
        table = torch.full((self.store.experts,), -1)
        table[torch.from_numpy(keys - self.first)] = torch.from_numpy(source.slot_of[keys])
        return table[self.ids].to(self.device)

    def end(self) -> None:
        """However it ends: nothing stays guarded, and what is still being read is waited for."""
        self.current.close()
        for *_, guard in self.ready:
            guard.close()
        for guard in self.behind.values():
            guard.close()
        wait(self.reading)
        for future, key in self.reading.items():
            self.store.landed(key, future)

    def seen(self, read: int) -> Visit:
        """`read`: blocks that were read since the visit before."""
        needed = len(self.keys)
        far = needed - self.near - self.early - self.disk
        return Visit(
            self.store.passes, self.layer, len(self.ids), needed, self.near, far, self.disk, self.early, read,
            self.computed_far, self.waited, perf_counter(),
        )  # fmt: skip

    def _take_early(self) -> list[int]:
        """What was read ahead: that of this layer is awaited with the rest, that of others taken in if it is there.
        Those of this layer.
        """
        mine, found = set(self.keys.tolist()), []
        for key, future in list(self.store.early.items()):
            if not future.done() and key not in mine:
                continue
            del self.store.early[key]
            if not future.done():
                self.reading[future] = key
            elif self.store.landed(key, future):
                continue  # it failed: it is read again when it is asked for, and fails then
            if key in mine:
                found.append(key)
        return found

    def _read(self) -> None:
        while self.unread and self.store.landing.spare:
            key = self.unread.popleft()
            self.reading[self.store.fetch(key)] = key

    def _await(self) -> None:
        """Waits for at least one read. Where it failed, its error: CheckpointError from a shelf."""
        if not self.reading:
            return
        started = perf_counter()
        done, _ = wait(self.reading, return_when=FIRST_COMPLETED)
        self.waited += perf_counter() - started
        keys = []
        for future in done:
            key = self.reading[future]
            error = self.store.landed(key, future)
            del self.reading[future]
            if error:
                raise error
            keys.append(key)
        if self.store.far is None:
            self._make_ready(self.store.near, np.array(keys))
        else:
            self.behind |= {key: self._guard(self.store.far, [key]) for key in keys}

    def _bring(self) -> None:
        """From main memory to the device; or they are computed in main memory, the ones least worth a place near."""
        store = self.store
        keys = sorted(self.behind, key=lambda key: store.worth.value[key])
        there = store.link.split(len(keys)) if len(self.ids) == 1 else 0
        stay, go = keys[:there], keys[there:][::-1][: store.near.spare]
        if go:
            slots = [store.near.claim(key) for key in go]  # loading: none of them is given away for the next
            pairs = [(store.far.slab[store.far.slot_of[key]], store.near.slab[slot]) for key, slot in zip(go, slots)]
            with ExitStack() as undo:
                for key in go:
                    undo.callback(store.near.dropped, key)
                copied = store.link.copy(pairs)
                undo.pop_all()
            for key in go:
                store.near.loaded(key)
        if stay:
            guard = ExitStack()
            for key in stay:
                guard.push(self.behind.pop(key))
            self.ready.append((store.far, np.array(stay), guard))
            self.computed_far += len(stay)
        if go:
            guard = self._guard(store.near, go)
            for key in go:
                guard.push(self.behind.pop(key))
            guard.callback(copied)
            self.ready.append((store.near, np.array(go), guard))

    def _make_ready(self, source: Slots, keys: np.ndarray) -> None:
        self.ready.append((source, keys, self._guard(source, keys)))

    def _guard(self, source: Slots, keys: np.ndarray | list[int]) -> ExitStack:
        guard = ExitStack()
        guard.enter_context(source.using(source.slot_of[keys]))
        return guard
