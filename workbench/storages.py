"""Bytes we allocated: the storages of the tensors of caches and weights, each counted once.

Looking changes nothing, so any thread may look while another one generates.
"""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from workbench.cache import BLOCK, Pool
from workbench.footprint import TABLE, WEIGHTS
from workbench.matrix import Matrix, Weight
from workbench.model import Mixture, Model


class Held(NamedTuple):
    """What one pool of cache rows holds.

    row      bytes of one packed row
    layers   bytes of the storages of each layer
    windows  bytes of the `window_rows` rows of each layer that are kept in bf16 beside the packed ones
    """

    format: str
    tokens: int
    blocks: int
    row: int
    layers: tuple[int, ...]
    window_rows: int
    windows: int

    @property
    def packed(self) -> int:
        return sum(self.layers)

    @property
    def written(self) -> int:
        """Bytes of packed rows that hold a token, in all layers."""
        return self.tokens * self.row * len(self.layers)

    @property
    def nbytes(self) -> int:
        return self.packed + self.windows


def measure(pool: Pool) -> Held:
    """What a pool holds at this moment. A token that forks share counts once."""
    format = pool.format
    sequences = together(pool.sequences)
    sizes = tuple(sum(part.untyped_storage().nbytes() for part in parts) for parts in list(pool.layers))
    windows = [sequence.window for sequence in sequences if sequence.window]
    return Held(
        format.name,
        _tokens(pool, [(list(sequence.table), sequence.length) for sequence in sequences]),
        pool.blocks,
        format.nbytes(pool.row),
        sizes,
        len(windows) * pool.recent,
        sum(window.nbytes for window in windows),
    )


def together(alive: weakref.WeakSet) -> list:
    """The members at one moment."""
    while True:
        try:
            return list(alive)
        except RuntimeError:  # another thread added one meanwhile
            continue


def weigh(model: Model) -> dict[str, int]:
    """Bytes of the weights by kind, and of the rotary table."""
    counted: set[tuple] = set()
    return {kind: _storages(tensors, counted) for kind, tensors in _weights(model).items()}


def _tokens(pool: Pool, sequences: list[tuple[list[int], int]]) -> int:
    if max(tuple(pool.users.values()), default=1) == 1:  # nothing is shared
        return sum(length for _, length in sequences)
    rows: dict[int, int] = {}  # of a block, that hold a token
    for table, length in sequences:
        for number, block in enumerate(table):
            rows[block] = max(rows.get(block, 0), min(BLOCK, max(0, length - number * BLOCK)))
    return sum(rows.values())


def _weights(model: Model) -> dict[str, list[torch.Tensor]]:
    kinds: dict[str, list[torch.Tensor]] = {kind: [] for kind in (*WEIGHTS, TABLE)}
    kinds["embedding"] = _parts(model.embedding)
    kinds["head"] = _parts(model.head)  # where it is the embedding, that has been counted
    kinds["router and norms"] = [model.norm]
    kinds["routed experts"] = list(model.store.tensors())
    kinds[TABLE] = [model.rope.table]
    for block in model.blocks:
        kinds["attention"] += _held(block.attention)
        kinds["router and norms"] += [block.attention_norm, block.mlp_norm]
        if isinstance(block.mlp, Mixture):
            kinds["router and norms"].append(block.mlp.router)
            kinds["shared experts"] += _held(block.mlp.shared) if block.mlp.shared else []
        else:
            kinds["dense"] += _held(block.mlp)
    return kinds


def _held(module: nn.Module) -> list[torch.Tensor]:
    """Its own weights, plain and packed."""
    packed = [part for value in vars(module).values() if isinstance(value, Matrix) for part in value.parts]
    return [*module.parameters(recurse=False), *packed]


def _parts(weight: Weight) -> list[torch.Tensor]:
    return list(weight.parts) if isinstance(weight, Matrix) else [weight]


def _storages(tensors: Iterable[torch.Tensor], counted: set[tuple]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in counted:
            counted.add(key)
            total += storage.nbytes()
    return total
