"""Where routed experts live. The mixture asks a store for banks of weights and never knows which store it has."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import nn

from workbench.blocks import Bank, slab
from workbench.config import Config
from workbench.weights import Inventory


class Store(Protocol):
    """The routed experts of a model."""

    def take(self, config: Config, layer: int, weights: Inventory) -> None:
        """Fetches the experts of a layer, or notes where they are, while the model is built."""

    def opened(self, blocks: Iterable[nn.Module]) -> None:
        """The model is complete: these are its blocks, in order."""

    def waves(self, layer: int, ids: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[Bank, torch.Tensor]]:
        """Banks that together hold every expert in ids [N, K], each with the slot of every choice in it; -1 for a
        choice that is in another wave. A bank may be used until the next is asked for. x [N, D] is what they read.
        """

    def tensors(self) -> Iterator[torch.Tensor]:
        """Those that hold weights, on any device."""


class Resident(nn.Module):
    """All experts of a model on its device: nothing is ever copied. Plain ones are parameters."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.ParameterDict()
        self.down = nn.ParameterDict()
        self.packed: dict[int, Bank] = {}
        self.slabs: list[torch.Tensor] = []

    def take(self, config: Config, layer: int, weights: Inventory) -> None:
        layout = weights.layout(config, layer)
        if layout is None:
            bank = weights.bank(config, layer)
            self.gate_up[str(layer)] = nn.Parameter(bank.gate_up, requires_grad=False)
            self.down[str(layer)] = nn.Parameter(bank.down, requires_grad=False)
        else:
            self.slabs.append(slab(config.n_routed_experts, layout.nbytes, weights.source.device))
            self.packed[layer] = weights.blocks(config, layer, layout, self.slabs[-1])

    def opened(self, blocks: Iterable[nn.Module]) -> None:
        pass

    def bank(self, layer: int) -> Bank:
        return self.packed.get(layer) or Bank(self.gate_up[str(layer)], self.down[str(layer)])

    def waves(self, layer: int, ids: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[Bank, torch.Tensor]]:
        yield self.bank(layer), ids

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.parameters()
        yield from self.slabs
