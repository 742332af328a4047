"""A Matrix of weights whose rows are stored by a codec: what `ops` multiplies with where a checkpoint is packed."""

from collections.abc import Sequence

import torch

from workbench.codec import Codec, Float, Parts

AT_ONCE = 1 << 20  # weights that are packed together


class Matrix:
    """Weights [..., out, in]: part i of the codec is a tensor [..., out, width of part i].

    Leading dimensions and rows are indexed as of a tensor, and give views; columns are not, as a row is packed whole.
    """

    def __init__(self, codec: Codec, width: int, parts: Parts):
        self.codec, self.width, self.parts = codec, width, parts

    @classmethod
    def pack(cls, codec: Codec, dense: torch.Tensor) -> "Matrix":
        """Packs [..., out, in], some rows at a time: packing takes some 40 bytes a weight."""
        if isinstance(codec, Float):
            return cls(codec, dense.shape[-1], codec.pack(dense))
        rows = dense.flatten(0, -2)
        made, step = cls.empty(codec, rows.shape, dense.device), max(1, AT_ONCE // dense.shape[-1])
        for at in range(0, len(rows), step):
            made[at : at + step].copy_(cls(codec, made.width, codec.pack(rows[at : at + step])))
        return cls(codec, made.width, tuple(part.view(*dense.shape[:-1], -1) for part in made.parts))

    @classmethod
    def empty(cls, codec: Codec, shape: Sequence[int], device: torch.device | str = "cpu") -> "Matrix":
        """Room for weights of that shape, to be filled with `copy_`."""
        *rows, width = shape
        layout = codec.layout(width)
        return cls(codec, width, tuple(torch.empty(*rows, size, dtype=dtype, device=device) for dtype, size in layout))

    @classmethod
    def stacked(cls, matrices: Sequence["Matrix"]) -> "Matrix":
        """One below the other. All have one codec and one width."""
        first = matrices[0]
        assert all((one.codec, one.width) == (first.codec, first.width) for one in matrices), "of different kinds"
        return cls(first.codec, first.width, tuple(map(torch.cat, zip(*(one.parts for one in matrices)))))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.parts[0].shape[:-1], self.width))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def bits(self) -> float:
        """Of a weight, scales and padding included."""
        return 8 * self.nbytes / self.shape.numel()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights as numbers: [..., out, in]. They themselves, not a copy, where they are stored in that type."""
        if isinstance(self.codec, Float):
            return self.parts[0].to(dtype)
        return self.codec.unpack(self.parts, self.width).to(dtype)

    def copy_(self, other: "Matrix") -> "Matrix":
        for mine, its in zip(self.parts, other.parts, strict=True):
            mine.copy_(its)
        return self

    def __getitem__(self, index: int | slice | torch.Tensor) -> "Matrix":
        return Matrix(self.codec, self.width, tuple(part[index] for part in self.parts))

    def __len__(self) -> int:
        return len(self.parts[0])

    def __repr__(self) -> str:
        return f"<Matrix {list(self.shape)}, {self.codec}, {self.bits:.2f} bits a weight>"


Weight = torch.Tensor | Matrix


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight of either kind as a tensor of that type."""
    return weight.dense(dtype) if isinstance(weight, Matrix) else weight.to(dtype)
