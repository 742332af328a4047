"""Slots: room for so many expert blocks on one device, which experts are in it, and which of them goes first."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from workbench.blocks import Layout, slab

# time in passes after which a use of an expert counts half: 0 is least recently used, infinity least frequently used
POLICIES = {"lru": 0.0, "lfu": math.inf, "blended": 64.0}
FREE, LOADING, HELD = 0, 1, 2


class Worth:
    """What each expert is worth keeping: uses, each halved every `half_life` passes (LRFU, Lee et al. 2001).

    Kept as a logarithm that later uses add to, so that nothing has to fade: log2 of the sum of 2^(pass / half_life).
    """

    def __init__(self, keys: int, half_life: float):
        self.half_life, self.visits = half_life, 0
        self.value = np.full(keys, -np.inf)
        self.pinned = np.zeros(keys, dtype=bool)

    def use(self, keys: np.ndarray, now: int) -> None:
        """One visit in pass `now` uses each of the keys, for however many tokens."""
        self.visits += 1
        if self.half_life == 0:
            self.value[keys] = self.visits
        else:
            self.value[keys] = np.logaddexp2(self.value[keys], now / self.half_life)

    def pin(self, keys: Sequence[int]) -> None:
        """These go only when nothing else can."""
        self.pinned[:] = False
        self.pinned[list(keys)] = True


class Slots:
    """`count` slots of one slab. A slot is free, loading or held; only a held one that nobody uses is given away."""

    def __init__(self, layout: Layout, count: int, worth: Worth, device: torch.device | str, pinned: bool = False):
        self.layout, self.count, self.worth = layout, count, worth
        self.slab = slab(count, layout.nbytes, device, pinned)
        self.bank = layout.bank(self.slab)
        self.slot_of = np.full(len(worth.value), -1, dtype=np.int64)
        self.key_of = np.full(count, -1, dtype=np.int64)
        self.state = np.full(count, FREE, dtype=np.uint8)
        self.used = np.zeros(count, dtype=np.int32)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The slots of these experts; -1 for one that is not held, or is still loading."""
        slots = self.slot_of[keys]
        return np.where((slots >= 0) & (self.state[slots] == HELD), slots, -1)

    @property
    def spare(self) -> int:
        """Slots that `claim` could give now."""
        return int(np.count_nonzero((self.used == 0) & (self.state != LOADING)))

    def claim(self, key: int) -> int:
        """A slot for this expert, loading from now on. What was in it, the least worth of all, is forgotten."""
        open = (self.used == 0) & (self.state != LOADING)
        held = np.maximum(self.key_of, 0)
        worth = np.where(self.worth.pinned[held], 1e300, self.worth.value[held])
        worth[self.state == FREE] = -np.inf
        slot = int(np.where(open, worth, np.inf).argmin())
        assert open[slot], "no slot is spare"
        if self.key_of[slot] >= 0:
            self.slot_of[self.key_of[slot]] = -1
        self.slot_of[key], self.key_of[slot], self.state[slot] = slot, key, LOADING
        return slot

    def loaded(self, key: int) -> None:
        self.state[self.slot_of[key]] = HELD

    def dropped(self, key: int) -> None:
        """It could not be loaded: its slot is free again."""
        slot = self.slot_of[key]
        if slot >= 0:
            self.slot_of[key], self.key_of[slot], self.state[slot] = -1, -1, FREE

    @contextmanager
    def using(self, slots: np.ndarray) -> Iterator[None]:
        """Meanwhile these are not given away."""
        self.used[slots] += 1
        try:
            yield
        finally:
            self.used[slots] -= 1

    @property
    def nbytes(self) -> int:
        return self.slab.untyped_storage().nbytes()
