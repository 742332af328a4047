"""Transfers: what an offloaded store did, visit by visit. A visit is one MoE layer in one forward pass."""

from typing import NamedTuple

import numpy as np

NEAR, FAR, DISK, MOVING = 0, 1, 2, 3  # where an expert is


class Visit(NamedTuple):
    """moving: the number of the pass begun last. needed = near + far + early + disk: experts that were in the slots
    that compute; in host memory behind them; read ahead, or being read; on disk alone. read: blocks that were read from
    disk since the visit before, foretold in vain or not. computed_far: experts multiplied in host memory. waited:
    seconds. at: its end, in perf_counter's seconds.
    """

    moving: int
    layer: int
    tokens: int
    needed: int
    near: int
    far: int
    disk: int
    early: int
    read: int
    computed_far: int
    waited: float
    at: float


COLUMNS = Visit._fields


class Transfers:
    """Every visit and every expert it asked for, in order, as arrays that grow by doubling."""

    def __init__(self):
        self.visits = 0
        self._rows = np.zeros((256, len(COLUMNS)))
        self._keys = np.zeros(2048, dtype=np.int32)
        self._of = np.zeros(2048, dtype=np.int32)
        self._hits = np.zeros(2048, dtype=bool)
        self.asked = 0

    def add(self, visit: Visit, keys: np.ndarray, hits: np.ndarray) -> None:
        """`hits`: which of the keys were near."""
        if self.visits == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        while self.asked + len(keys) > len(self._keys):
            self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)])
            self._of = np.concatenate([self._of, np.zeros_like(self._of)])
            self._hits = np.concatenate([self._hits, np.zeros_like(self._hits)])
        self._rows[self.visits] = visit
        self._keys[self.asked : self.asked + len(keys)] = keys
        self._of[self.asked : self.asked + len(keys)] = self.visits
        self._hits[self.asked : self.asked + len(keys)] = hits
        self.asked += len(keys)
        self.visits += 1  # last: what a thread sees of a visit that is counted is whole

    @property
    def rows(self) -> np.ndarray:
        """[visits, columns], see COLUMNS. A view of what there is now: another thread may look while it grows."""
        return self._rows[: self.visits]

    @property
    def accesses(self) -> tuple[np.ndarray, np.ndarray]:
        """For every expert asked for: the number of the visit, and its key, MoE layer number x experts + expert."""
        asked = self.asked
        return self._of[:asked], self._keys[:asked]

    @property
    def hits(self) -> np.ndarray:
        """For every expert asked for, whether it was near."""
        return self._hits[: self.asked]

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._keys.nbytes + self._of.nbytes + self._hits.nbytes
