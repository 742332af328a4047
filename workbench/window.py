"""The last tokens of a sequence, wide beside their packed rows, where a cache format asks for it ("q6+128")."""

import torch


class Window:
    """The last tokens of one sequence in bf16, every layer: position p is at p modulo their number."""

    def __init__(self, layers: int, tokens: int, width: int, device: torch.device):
        with torch.inference_mode(False):
            self.layers = [torch.empty(tokens, width, dtype=torch.bfloat16, device=device) for _ in range(layers)]
        self.start = 0  # no position before it is here

    @property
    def nbytes(self) -> int:
        return sum(layer.untyped_storage().nbytes() for layer in self.layers)

    def write(self, layer: int, start: int, rows: torch.Tensor) -> None:
        """Rows [T, W] of the positions from `start` on; those that fall out are forgotten first, whatever follows."""
        count = len(self.layers[layer])
        end = start + len(rows)
        self.start = max(self.start, end - count)
        rows = rows[-count:]
        self.layers[layer][self._places(end - len(rows), end)] = rows.to(torch.bfloat16)

    def overlay(self, layer: int, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows [s, W] of the positions from `start` on, with those that are here in place of the packed ones."""
        end = start + len(rows)
        first = max(start, self.start)
        if first >= end:
            return rows
        wide = self.layers[layer][self._places(first, end)].to(rows.dtype)
        return torch.cat([rows[: first - start], wide])

    def truncate(self, length: int) -> None:
        """What is written next, at position `length`, is here again."""
        self.start = min(self.start, length)

    def copy(self) -> "Window":
        first = self.layers[0]
        other = Window(len(self.layers), *first.shape, first.device)
        other.start = self.start
        for mine, its in zip(self.layers, other.layers, strict=True):
            its.copy_(mine)
        return other

    def _places(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, device=self.layers[0].device) % len(self.layers[0])
