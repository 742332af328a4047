"""Pages: where the sequences of a cache lie, as kernels find them. Blocks of 64 rows, one table for each sequence.

B sequences, T new tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from workbench.formats import Format, Row

BLOCK = 64


class Pages(NamedTuple):
    """Of one pass, on the device."""

    table: torch.Tensor  # [B, blocks of the longest, or more] int32
    before: torch.Tensor  # [B] int32, tokens of each sequence before the pass
    ends: torch.Tensor  # [B] int32, and with those of the pass


class Latents(NamedTuple):
    """What one layer holds of the sequences of a cache, as a kernel finds it: position p of sequence b is row
    64 table[b, p // 64] + p % 64 of every part."""

    parts: tuple[torch.Tensor, ...]  # of the format, each [rows of the pool, part width]
    format: Format
    row: Row
    table: torch.Tensor  # [B, any] int32 on the device; what is beyond a sequence's end is not read
    ends: torch.Tensor  # [B] int32 on the device: tokens of each sequence, those of this pass included


def page_of(sequences: Sequence[tuple[int, int, list[int]]], blocks: int = 0) -> torch.Tensor:
    """Of (tokens before, tokens after, table) of each sequence, one int32 tensor on the host, to be copied at once.

    Tables are filled up to the longest, and to at least `blocks`.
    """
    before, ends, tables = zip(*sequences, strict=True)
    most = max(blocks, *map(len, tables))
    fill = [0] * (-len(tables) % 4)  # each part begins at a multiple of 16 bytes, which kernels are compiled for
    rows = [[*before, *fill], [*ends, *fill], *(table + [0] * (most - len(table)) for table in tables)]
    return torch.tensor([number for row in rows for number in row], dtype=torch.int32)


def pages_of(page: torch.Tensor, batch: int) -> Pages:
    """Its parts, as views."""
    padded = batch + -batch % 4
    return Pages(page[2 * padded :].view(batch, -1), page[:batch], page[padded : padded + batch])
