"""Quantising: a Source that packs the plain weights of another one by a recipe, as they are asked for."""

from collections.abc import Callable

import torch

from workbench.blocks import Layout
from workbench.codec import Codec
from workbench.matrix import Matrix
from workbench.recipe import Recipe
from workbench.weights import Source, expert_names

Round = Callable[[str, Codec, torch.Tensor], Matrix]  # name, codec, weights [out, in] -> packed


def nearest(name: str, codec: Codec, weights: torch.Tensor) -> Matrix:
    """Every weight to the nearest number that can be stored."""
    return Matrix.pack(codec, weights)


class Quantising:
    """`source` has plain weights. `round` packs one matrix; see rounding.py for a better one than the nearest."""

    def __init__(self, source: Source, recipe: Recipe, round: Round = nearest):
        self.source, self.recipe, self.round = source, recipe, round
        self.dtype, self.device = source.dtype, source.device

    def codec(self, name: str) -> Codec | None:
        return self.recipe.codec(name)

    def take(self, name: str, shape: tuple[int, ...], into: torch.Tensor | None = None) -> torch.Tensor:
        """Of a tensor that is computed with as plain numbers, what packing leaves of it, if the recipe packs it."""
        plain, codec = self.source.take(name, shape), self.codec(name)
        if codec is not None and self.device.type != "meta":
            plain = nearest(name, codec, plain).dense(self.dtype)
        return plain if into is None else into.copy_(plain)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        if self.device.type == "meta":
            self.source.take(name, shape)
            return Matrix.empty(self.codec(name), shape, "meta")
        return self.round(name, self.codec(name), self.source.take(name, shape))

    def block(self, layer: int, expert: int, layout: Layout, into: torch.Tensor) -> None:
        names = expert_names(layer, expert)
        shapes = (layout.width, layout.hidden), (layout.width, layout.hidden), (layout.hidden, layout.width)
        gate, up, down = map(self.matrix, names, shapes)
        if self.device.type != "meta":
            layout.pack(Matrix.stacked([gate, up]), down, into)

    def unused(self) -> list[str]:
        return self.source.unused()
