"""Arrays that grow: a row a token, written as tokens come."""

import numpy as np


class Rows:
    """Rows of one `shape` and `dtype`. Written in doubling blocks, so a long answer costs no more a token."""

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        self._held = np.empty((64, *shape), dtype)
        self._count = 0

    def write(self, start: int, values: np.ndarray) -> None:
        """`values` [n, *shape] become rows start, start + 1 ...; what stood from there on is gone."""
        assert start <= self._count and values.shape[1:] == self._held.shape[1:], (start, self._count, values.shape)
        stop = start + len(values)
        if stop > len(self._held):
            held = np.empty((max(stop, 2 * len(self._held)), *self._held.shape[1:]), self._held.dtype)
            held[:start] = self._held[:start]
            self._held = held
        self._held[start:stop] = values
        self._count = stop

    @property
    def values(self) -> np.ndarray:
        """[rows written, *shape]; not to be changed."""
        return self._held[: self._count]

    def __len__(self) -> int:
        return self._count
