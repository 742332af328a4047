"""Where routed experts live. The mixture asks a store for banks of weights and never knows which store it has."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Bank(NamedTuple):
    """Stacked experts. gate_up [E, 2 I, D] holds each expert's gate rows, then its up rows; down is [E, D, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor


class Resident(nn.Module):
    """All experts of a model on its device, as parameters: nothing is ever copied."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.ParameterDict()
        self.down = nn.ParameterDict()

    def put(self, layer: int, bank: Bank) -> None:
        self.gate_up[str(layer)] = nn.Parameter(bank.gate_up, requires_grad=False)
        self.down[str(layer)] = nn.Parameter(bank.down, requires_grad=False)

    def waves(self, layer: int, ids: torch.Tensor) -> Iterator[tuple[Bank, torch.Tensor]]:
        """Banks that together hold every expert in ids [N, K], each with the slot of each assignment in it."""
        yield Bank(self.gate_up[str(layer)], self.down[str(layer)]), ids
