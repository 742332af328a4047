"""A Format is how the elements of a row are stored: packed into one or more tensors, unpacked to compute with."""

from dataclasses import dataclass

import torch

from workbench.errors import RequestError


@dataclass(frozen=True)
class Plain:
    """Stored as it is, in one floating-point type."""

    name: str
    dtype: torch.dtype

    def parts(self, width: int) -> tuple[tuple[torch.dtype, int], ...]:
        """Type and width of each tensor a row of `width` elements is packed into."""
        return ((self.dtype, width),)

    def pack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., width] to one tensor [..., part width] per part."""
        return (rows.to(self.dtype),)

    def unpack(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """The rows again, [..., width] in `dtype`; no copy where nothing has to be computed."""
        return parts[0].to(dtype)


CACHE_FORMATS = {f.name: f for f in (Plain("fp32", torch.float32), Plain("bf16", torch.bfloat16))}


def cache_format(name: str) -> Plain:
    """The cache format of that name; RequestError names the known ones."""
    if name not in CACHE_FORMATS:
        raise RequestError(f"no cache format called {name!r}; there are {', '.join(CACHE_FORMATS)}.")
    return CACHE_FORMATS[name]
