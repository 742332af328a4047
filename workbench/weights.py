"""Where the weights of a model come from, and the list of those it took."""

from typing import Protocol

import torch
from torch import nn


class Source(Protocol):
    """Where weights come from. A constructor asks for each one where it is used, by its name in the checkpoint."""

    dtype: torch.dtype
    device: torch.device

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor: ...


class Inventory:
    """Remembers where every weight went, so that what was taken is what is saved."""

    def __init__(self, source: Source):
        self.source = source
        self.tensors: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int, into: torch.Tensor | None = None) -> nn.Parameter:
        tensor = self.source.take(name, shape, into)
        self.tensors[name] = tensor
        return nn.Parameter(tensor, requires_grad=False)

    def stacked(self, names: dict[str, int], width: int) -> nn.Parameter:
        """Matrices with the same input, one below the other: one product instead of several."""
        whole = self.empty(sum(names.values()), width)
        for (name, rows), into in zip(names.items(), whole.split(list(names.values())), strict=True):
            self.take(name, rows, width, into=into)
        return nn.Parameter(whole, requires_grad=False)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.source.dtype, device=self.source.device)
