"""The latent cache: per token and layer one compressed vector and one rotary key shared by all heads, nothing else.

Rows live in blocks of 64 tokens taken from a pool, so sequences grow, shrink and share without moving each other.
B sequences, T new tokens, S tokens so far, W row width (kv_lora_rank + qk_rope_head_dim, 576 in V2).
"""

import weakref
from collections import Counter

import torch

from workbench.config import Config
from workbench.errors import RequestError
from workbench.formats import Plain, cache_format

BLOCK = 64


class Pool:
    """The storage of one or more caches: for every layer, `blocks` x 64 packed rows.

    It grows by exactly what is asked for. Copying a layer when a block is added costs two passes over it every 64
    tokens, 3 % of what attention reads in the same 64 steps, and no byte is held that no token needs.
    """

    def __init__(self, config: Config, format: Plain, device: torch.device | str):
        self.format = format
        self.width = config.latent_width
        self.device = torch.device(device)
        self.blocks = 0
        self.users: Counter[int] = Counter()  # how many sequences share a block; a free block is absent
        self.orphans: list[list[int]] = []  # tables of sequences that were dropped, to be released
        self.layers = [self._empty(0) for _ in range(config.num_hidden_layers)]

    def _empty(self, blocks: int) -> list[torch.Tensor]:
        # not inference tensors, whatever mode the caller is in: a cache outlives the mode it grew in
        with torch.inference_mode(False):
            return [
                torch.empty(blocks * BLOCK, width, dtype=dtype, device=self.device)
                for dtype, width in self.format.parts(self.width)
            ]

    @property
    def nbytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for parts in self.layers for part in parts)

    def take(self, count: int) -> list[int]:
        """Blocks nobody uses, lowest first, so that a lone sequence stays contiguous."""
        free = [block for block in range(self.blocks) if block not in self.users][:count]
        missing = count - len(free)
        if missing:
            free += range(self.blocks, self.blocks + missing)
            self._resize(self.blocks + missing)
        self.users.update(free)
        return free

    def reap(self) -> None:
        """Releases the blocks of sequences nobody holds any more."""
        while self.orphans:
            self.release(self.orphans.pop())

    def share(self, table: list[int]) -> None:
        self.users.update(table)

    def release(self, table: list[int]) -> None:
        """Gives blocks back; free blocks at the end of the storage are returned to the system."""
        for block in table:
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
        needed = max(self.users, default=-1) + 1
        if needed < self.blocks:
            self._resize(needed)

    def copy_block(self, source: int, target: int) -> None:
        for parts in self.layers:
            for part in parts:
                part[target * BLOCK : (target + 1) * BLOCK] = part[source * BLOCK : (source + 1) * BLOCK]

    def _resize(self, blocks: int) -> None:
        kept = min(blocks, self.blocks) * BLOCK
        for layer, old in enumerate(self.layers):  # layer by layer: never twice the whole cache
            new = self._empty(blocks)
            for target, part in zip(new, old, strict=True):
                target[:kept] = part[:kept]
            self.layers[layer] = new
        self.blocks = blocks


class Sequence:
    """One token sequence: which blocks hold it, in order, and how many tokens are written."""

    def __init__(self, pool: Pool, table: list[int], length: int):
        self.table, self.length = table, length
        self.end = length  # position after the last one that `where` covers
        self.where: slice | torch.Tensor = slice(0, 0)  # rows of the pool, in order of position
        # only noted: the garbage collector may come by in the middle of anything, a resize for instance
        weakref.finalize(self, pool.orphans.append, table).atexit = False

    def locate(self, tokens: int, device: torch.device) -> None:
        """A slice while the blocks are neighbours, so that reading copies nothing; else row numbers."""
        self.end = tokens
        first = self.table[0] if self.table else 0
        if self.table == list(range(first, first + len(self.table))):
            self.where = slice(first * BLOCK, first * BLOCK + tokens)
        else:
            starts = torch.tensor(self.table, device=device) * BLOCK
            self.where = (starts[:, None] + torch.arange(BLOCK, device=device)).flatten()[:tokens]


class LatentCache:
    """What the model remembers of `batch` sequences. A forward pass reserves, appends in every layer, then advances."""

    def __init__(self, config: Config, batch: int = 1, format: str = "bf16", device: torch.device | str = "cpu"):
        self.config = config
        self.pool = Pool(config, cache_format(format), device)
        self.sequences = [Sequence(self.pool, [], 0) for _ in range(batch)]

    @classmethod
    def for_model(cls, config: Config, batch: int = 1, format: str = "bf16", device: torch.device | str = "cpu"):
        """An empty cache for a model of this shape."""
        return cls(config, batch, format, device)

    def _over(self, sequences: list[Sequence]) -> "LatentCache":
        other = object.__new__(LatentCache)
        other.config, other.pool, other.sequences = self.config, self.pool, sequences
        return other

    @property
    def format(self) -> str:
        return self.pool.format.name

    @property
    def nbytes(self) -> int:
        """Bytes of storage really held, for all sequences and forks that share the pool."""
        self.pool.reap()
        return self.pool.nbytes

    @property
    def blocks(self) -> int:
        """Blocks of 64 tokens held per layer, for all sequences and forks that share the pool."""
        self.pool.reap()
        return self.pool.blocks

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [sequence.length for sequence in self.sequences]

    def only(self, *sequences: int) -> "LatentCache":
        """The same sequences under another batch: what is written through one is seen through the other."""
        return self._over([self.sequences[sequence] for sequence in sequences])

    def fork(self) -> "LatentCache":
        """A copy that shares every block until one side writes to it."""
        # not the room reserved by a pass that was interrupted: both sides would write there
        tables = [sequence.table[: -(-sequence.length // BLOCK)] for sequence in self.sequences]
        for table in tables:
            self.pool.share(table)
        return self._over([Sequence(self.pool, *each) for each in zip(tables, self.lengths, strict=True)])

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forgets everything from position `length` on, in one sequence or in all."""
        chosen = self.sequences if sequence is None else [self.sequences[sequence]]
        for each in chosen:
            if not 0 <= length <= each.length:
                raise RequestError(f"cannot truncate to {length} tokens: the sequence has {each.length}.")
        for each in chosen:
            kept = -(-length // BLOCK)
            dropped = each.table[kept:]
            del each.table[kept:]
            each.length = length
            self.pool.release(dropped)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more in every sequence, and a private copy of a shared block about to be written."""
        self.pool.reap()
        for sequence in self.sequences:
            needed = sequence.length + tokens
            if needed > self.config.max_position_embeddings:
                raise RequestError(
                    f"{needed} tokens exceed the context of {self.config.max_position_embeddings}: "
                    "shorten the prompt or start a new conversation."
                )
        for sequence in self.sequences:
            needed = sequence.length + tokens
            last = sequence.length // BLOCK
            if sequence.length % BLOCK and self.pool.users[sequence.table[last]] > 1:
                [own] = self.pool.take(1)
                self.pool.copy_block(sequence.table[last], own)
                shared, sequence.table[last] = sequence.table[last], own
                self.pool.release([shared])
            missing = -(-needed // BLOCK) - len(sequence.table)  # negative after an interrupted pass that wanted more
            sequence.table += self.pool.take(max(0, missing))
            sequence.locate(needed, self.pool.device)

    def append(self, layer: int, rows: torch.Tensor) -> None:
        """Writes rows [B, T, W] of one layer after the last token. Lengths move once per pass, in advance()."""
        if rows.dim() != 3 or rows.shape[0] != self.batch or rows.shape[2] != self.pool.width:
            wanted = f"[{self.batch}, tokens, {self.pool.width}]"
            raise RequestError(f"rows must be {wanted} for this cache, not {list(rows.shape)}.")
        if any(sequence.end != sequence.length + rows.shape[1] for sequence in self.sequences):
            self.reserve(rows.shape[1])
        for sequence, new in zip(self.sequences, rows.detach(), strict=True):
            where = _after(sequence.where, sequence.length)
            for part, packed in zip(self.pool.layers[layer], self.pool.format.pack(new), strict=True):
                part[where] = packed

    def rows(self, layer: int, sequence: int, dtype: torch.dtype) -> torch.Tensor:
        """[S, W] of one sequence, the reserved positions included; a view where blocks and dtype allow."""
        where = self.sequences[sequence].where
        return self.pool.format.unpack(tuple(part[where] for part in self.pool.layers[layer]), dtype)

    def advance(self, tokens: int) -> None:
        for sequence in self.sequences:
            sequence.length += tokens


def _after(where: slice | torch.Tensor, start: int) -> slice | torch.Tensor:
    return slice(where.start + start, where.stop) if isinstance(where, slice) else where[start:]
