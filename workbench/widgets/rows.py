"""Arrays that grow: a row a token, written as tokens come."""

import math

import numpy as np

from workbench.widgets.geometry import Geometry

MISSING = {"experts": (np.int16, -1), "gates": (np.float32, 0.0), "margins": (np.float32, math.nan)}


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


class RoutingRows:
    """Experts, gates and margins of tokens as they come, [tokens, layers, k] each, as in a Trace."""

    def __init__(self, geometry: Geometry) -> None:
        shape = len(geometry.layers), geometry.k
        self.geometry = geometry
        self._rows = {name: Rows(shape, dtype) for name, (dtype, _) in MISSING.items()}

    def checked(self, count: int, **given: np.ndarray | None) -> dict[str, np.ndarray]:
        """What `write` takes, of `count` tokens; None: not recorded. RequestError for a wrong shape."""
        shape = count, len(self.geometry.layers), self.geometry.k
        arrays = {}
        for name, (dtype, missing) in MISSING.items():
            array = given[name]
            arrays[name] = (
                np.full(shape, missing, dtype) if array is None else self.geometry.check(name, array, count, dtype)
            )
        return arrays

    def write(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            self._rows[name].write(start, array)

    @property
    def experts(self) -> np.ndarray:
        return self._rows["experts"].values

    @property
    def gates(self) -> np.ndarray:
        return self._rows["gates"].values

    @property
    def margins(self) -> np.ndarray:
        return self._rows["margins"].values

    def __len__(self) -> int:
        return len(self.experts)
