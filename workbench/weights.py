"""Where the weights of a model come from, and the list of those it took."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from workbench.blocks import Bank, Layout
from workbench.codec import Codec
from workbench.config import Config
from workbench.errors import CheckpointError
from workbench.matrix import Matrix, Weight


class Source(Protocol):
    """Where weights come from. A constructor asks for each one where it is used, by its name in the checkpoint."""

    dtype: torch.dtype
    device: torch.device

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        """That tensor in `dtype`, on `device`."""

    def codec(self, name: str) -> Codec | None:
        """How a matrix is packed here; None where it is a plain tensor, to be taken."""

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """That matrix, packed by `codec(name)`, on `device`."""

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        """Writes an expert whose matrices are packed into `into`, uint8 [layout.nbytes] on the CPU."""


class Plain:
    """What a Source says whose weights are not packed."""

    def codec(self, name: str) -> Codec | None:
        return None


class Inventory:
    """Remembers where every weight went, so that what was taken is what is saved."""

    def __init__(self, source: Source):
        self.source = source
        self.tensors: dict[str, Weight] = {}

    def take(self, name: str, *shape: int, into: torch.Tensor | None = None) -> nn.Parameter:
        tensor = self.source.take(name, shape, into)
        self.tensors[name] = tensor
        return nn.Parameter(tensor, requires_grad=False)

    def matrix(self, name: str, rows: int, width: int) -> nn.Parameter | Matrix:
        """A matrix that may be packed."""
        return self.stacked({name: rows}, width)

    def stacked(self, names: dict[str, int], width: int) -> nn.Parameter | Matrix:
        """Matrices with the same input, one below the other: one product instead of several."""
        codecs = {self.source.codec(name) for name in names}
        if len(codecs) > 1:
            raise CheckpointError(
                f"{', '.join(names)} are read as one matrix, so they must be packed alike: give them one format."
            )
        if codecs == {None}:
            if len(names) == 1:
                return self.take(*names, *names.values(), width)
            whole = self.empty(sum(names.values()), width)
            for (name, rows), into in zip(names.items(), whole.split(list(names.values())), strict=True):
                self.take(name, rows, width, into=into)
            return nn.Parameter(whole, requires_grad=False)
        first = self.source.codec(next(iter(names)))
        whole, start = Matrix.empty(first, (sum(names.values()), width), self.source.device), 0
        for name, rows in names.items():
            self.tensors[name] = whole[start : start + rows].copy_(self.source.matrix(name, (rows, width)))
            start += rows
        return whole

    def layout(self, config: Config, layer: int) -> Layout | None:
        """Of the experts of a layer: None where they are plain."""
        return expert_layout(config, layer, self.source.codec)

    def bank(self, config: Config, layer: int) -> Bank:
        """The experts of a layer, plain and stacked: gate_up [E, 2 I, D], down [E, D, I]."""
        hidden, width = config.hidden_size, config.moe_intermediate_size
        bank = Bank(
            self.empty(config.n_routed_experts, 2 * width, hidden),
            self.empty(config.n_routed_experts, hidden, width),
        )
        for expert in range(config.n_routed_experts):
            gate, up, down = expert_names(layer, expert)
            self.take(gate, width, hidden, into=bank.gate_up[expert, :width])
            self.take(up, width, hidden, into=bank.gate_up[expert, width:])
            self.take(down, hidden, width, into=bank.down[expert])
        return bank

    def blocks(self, config: Config, layer: int, layout: Layout, slab: torch.Tensor) -> Bank:
        """The experts of a layer, packed, in a slab [E, layout.nbytes]."""
        passed = torch.empty(layout.nbytes, dtype=torch.uint8)
        for expert in range(config.n_routed_experts):
            self.source.block(layer, expert, layout, passed)
            slab[expert].copy_(passed)
        bank = layout.bank(slab)
        for expert in range(config.n_routed_experts):
            gate_up, down = bank.gate_up[expert], bank.down[expert]
            matrices = gate_up[: layout.width], gate_up[layout.width :], down
            self.tensors.update(zip(expert_names(layer, expert), matrices))
        return bank

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.source.dtype, device=self.source.device)


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Of its gate, up and down projection in a checkpoint."""
    return tuple(f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down"))


def expert_layout(config: Config, layer: int, codec: Callable[[str], Codec | None]) -> Layout | None:
    """How the experts of a layer are packed, if they are. CheckpointError where they are not packed alike."""
    found = {tuple(map(codec, expert_names(layer, expert))) for expert in range(config.n_routed_experts)}
    gate, up, down = next(iter(found))
    if len(found) > 1 or gate != up or (gate is None) != (down is None):
        raise CheckpointError(
            f"layer {layer}: its experts are not packed alike. One format serves all gate and up projections of a "
            "layer, and one all down projections, plain for all of them or for none."
        )
    return None if gate is None else Layout(config.hidden_size, config.moe_intermediate_size, gate, down)
