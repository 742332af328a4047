"""How one expert lies in memory and on disk: its parts in one contiguous block, so that one read or copy moves it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from workbench.codec import Codec
from workbench.matrix import Matrix, Weight

ALIGNED = 64  # bytes: where a part begins in its block, a line of the processor's caches
PAGE = 4096  # bytes: blocks are whole pages, as reads that bypass the system's cache want


class Bank(NamedTuple):
    """Stacked experts. gate_up [E, 2 I, D] holds each expert's gate rows, then its up rows; down is [E, D, I]."""

    gate_up: Weight
    down: Weight


class Place(NamedTuple):
    """Where a part of a matrix is in a block: bytes [start, start + nbytes), rows of `width` numbers."""

    start: int
    dtype: torch.dtype
    rows: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The block of one expert, hidden width D and expert width I: parts of gate_up [2 I, D], then of down [D, I]."""

    hidden: int
    width: int
    gate_up: Codec
    down: Codec

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        """Of gate_up and of down."""
        at, found = 0, []
        for codec, rows, width in ((self.gate_up, 2 * self.width, self.hidden), (self.down, self.hidden, self.width)):
            places = []
            for dtype, size in codec.layout(width):
                places.append(Place(at, dtype, rows, size))
                at += -(-places[-1].nbytes // ALIGNED) * ALIGNED
            found.append(tuple(places))
        return tuple(found)

    @cached_property
    def nbytes(self) -> int:
        """Of a block, whole pages."""
        last = self.places[1][-1]
        return -(-(last.start + last.nbytes) // PAGE) * PAGE

    @property
    def bits(self) -> float:
        """Of a weight, with scales and the padding of the block."""
        return 8 * self.nbytes / (3 * self.hidden * self.width)

    def bank(self, slab: torch.Tensor) -> Bank:
        """The experts in a slab [slots, nbytes] of bytes, without copying any."""
        assert slab.dtype == torch.uint8 and slab.shape[1] == self.nbytes and slab.stride(1) == 1
        matrices = []
        for codec, width, places in zip((self.gate_up, self.down), (self.hidden, self.width), self.places):
            parts = [
                slab[:, place.start : place.start + place.nbytes].view(place.dtype).unflatten(1, (place.rows, -1))
                for place in places
            ]
            matrices.append(Matrix(codec, width, tuple(parts)))
        return Bank(*matrices)

    def pack(self, gate_up: Matrix, down: Matrix, into: torch.Tensor) -> None:
        """Writes one expert into `into` [nbytes]; what no part covers becomes 0."""
        into.zero_()
        bank = self.bank(into[None])
        bank.gate_up[0].copy_(gate_up)
        bank.down[0].copy_(down)


def slab(count: int, nbytes: int, device: torch.device | str = "cpu", pinned: bool = False) -> torch.Tensor:
    """Room for that many blocks, uint8 [count, nbytes], on a page boundary. The system gives pages when written."""
    with torch.inference_mode(False):
        room = torch.empty(count * nbytes + PAGE, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -room.data_ptr() % PAGE
        return room[start : start + count * nbytes].view(count, nbytes)
