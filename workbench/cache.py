"""The latent cache: per token and layer one compressed vector and one rotary key shared by all heads, nothing else.

Rows live in blocks of 64 tokens taken from a pool, so sequences grow, shrink and share without moving each other.
B sequences, T new tokens, S tokens so far, W row width (kv_lora_rank + qk_rope_head_dim, 576 in V2).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from workbench.config import Config
from workbench.errors import RequestError, WorkbenchError
from workbench.formats import Format, Plain, Row, cache_format
from workbench.pages import BLOCK, Latents, Pages, page_of, pages_of
from workbench.window import Window

Device = torch.device | str

PIECE = 16 * BLOCK  # rows that are converted together


class Pool:
    """The storage of one or more caches: for every layer, `blocks` x 64 packed rows.

    On a CPU it grows by exactly what is asked for. Copying a layer when a block is added costs two passes over it every
    64 tokens, 3 % of what attention reads in the same 64 steps, and no byte is held that no token needs. On a GPU,
    where a batch adds blocks at every step and a captured pass holds addresses, it grows by a part of itself, and is
    given back when half of it is free; `moves` counts how often it changed its place.
    """

    AHEAD = 4  # on a GPU: a quarter more than is asked for

    def __init__(self, config: Config, format: Format, device: Device):
        self.format = format
        self.row = Row(config.kv_lora_rank, config.qk_rope_head_dim)
        self.device = torch.device(device)
        self.blocks = self.moves = 0
        self.users: Counter[int] = Counter()  # how many sequences share a block; a free block is absent
        self.orphans: list[list[int]] = []  # tables of sequences that were dropped, to be released
        self.sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self.admit: Callable[[int], None] = int  # told how many bytes more are wanted; refuses by raising
        self.recent = min(format.recent, config.max_position_embeddings)
        self.layers = [self._empty(0) for _ in range(config.num_hidden_layers)]

    def _empty(self, blocks: int) -> list[torch.Tensor]:
        # not inference tensors, whatever mode the caller is in: a cache outlives the mode it grew in
        with torch.inference_mode(False):
            return [
                torch.empty(blocks * BLOCK, width, dtype=dtype, device=self.device)
                for dtype, width in self.format.layout(self.row)
            ]

    @property
    def nbytes(self) -> int:
        packed = sum(part.untyped_storage().nbytes() for parts in self.layers for part in parts)
        return packed + sum(sequence.window.nbytes for sequence in self.sequences if sequence.window)

    def block_bytes(self, format: Format | None = None) -> int:
        """Of 64 rows in every layer, packed in this format or in the one they are in."""
        return BLOCK * (format or self.format).nbytes(self.row) * len(self.layers)

    @property
    def window_bytes(self) -> int:
        """Of what one sequence keeps wide."""
        return self.recent * self.row.width * torch.bfloat16.itemsize * len(self.layers)

    def take(self, count: int) -> list[int]:
        """Blocks nobody uses, lowest first, so that a lone sequence stays contiguous."""
        free = [block for block in range(self.blocks) if block not in self.users][:count]
        missing = count - len(free)
        if missing:
            grown = missing + self._ahead()
            try:
                self.admit(grown * self.block_bytes())
            except WorkbenchError:
                if grown == missing:
                    raise
                grown = missing
                self.admit(grown * self.block_bytes())
            free += range(self.blocks, self.blocks + missing)
            self._resize(self.blocks + grown)
        self.users.update(free)
        return free

    def _ahead(self) -> int:
        return self.blocks // self.AHEAD if self.device.type == "cuda" else 0

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
        if needed < (self.blocks // 2 if self._ahead() else self.blocks):
            self._resize(needed)

    def copy_block(self, source: int, target: int) -> None:
        for parts in self.layers:
            for part in parts:
                part[target * BLOCK : (target + 1) * BLOCK] = part[source * BLOCK : (source + 1) * BLOCK]

    @torch.inference_mode(False)
    def convert(self, format: Format) -> list[tuple[float, float]]:
        """Packs every row anew, a few blocks at a time. Of each layer the relative error of latent and rotary key, over
        the rows that hold a token: root mean square of what changed over that of what was there.

        The old rows are held to the end, so that an interrupt leaves the pool as it was.
        """
        written = self._written()
        layers, errors = [], []
        for parts in self.layers:
            packed, sums = [], torch.zeros(2, 2, dtype=torch.float64, device=self.device)
            for start in range(0, max(1, len(written)), PIECE):
                rows = self.format.unpack(tuple(part[start : start + PIECE] for part in parts), self.row, torch.float32)
                packed.append(format.pack(rows, self.row))
                there = written[start : start + PIECE]
                rows, after = rows[there], format.unpack(packed[-1], self.row, torch.float32)[there]
                for of, kind in enumerate((after - rows, rows)):
                    sums[of] += torch.stack([x.double().square().sum() for x in kind.split(list(self.row), -1)])
            layers.append([torch.cat(pieces) for pieces in zip(*packed, strict=True)])
            changed, there = sums.sqrt().tolist()
            errors.append(tuple(a / b if b else 0.0 for a, b in zip(changed, there, strict=True)))
        self.format, self.layers = format, layers
        self.moves += 1
        return errors

    def _written(self) -> torch.Tensor:
        """For every row, whether it holds a token: bool [blocks x 64]."""
        written = torch.zeros(self.blocks * BLOCK, dtype=torch.bool, device=self.device)
        for sequence in self.sequences:
            written[_span(sequence.where, 0, sequence.length)] = True
        return written

    def _resize(self, blocks: int) -> None:
        kept = min(blocks, self.blocks) * BLOCK
        for layer, old in enumerate(self.layers):  # layer by layer: never twice the whole cache
            new = self._empty(blocks)
            for target, part in zip(new, old, strict=True):
                target[:kept] = part[:kept]
            self.layers[layer] = new
        self.blocks = blocks
        self.moves += 1


class Sequence:
    """One token sequence: which blocks hold it, in order, and how many tokens are written."""

    def __init__(self, pool: Pool, table: list[int], length: int, window: Window | None = None):
        self.table, self.length, self.window = table, length, window
        self.end: int  # position after the last one that `where` covers
        self.where: slice | torch.Tensor  # rows of the pool, in order of position
        self.locate(length, pool.device)
        pool.sequences.add(self)
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

    def __init__(self, config: Config, batch: int = 1, format: str | Format = "bf16", device: Device = "cpu"):
        self.config = config
        self.pool = Pool(config, cache_format(format), device)
        self.sequences = [Sequence(self.pool, [], 0) for _ in range(batch)]

    @classmethod
    def for_model(cls, config: Config, batch: int = 1, format: str | Format = "bf16", device: Device = "cpu"):
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
        self.pool.admit(self.pool.window_bytes * sum(1 for sequence in self.sequences if sequence.window))
        windows = [sequence.window and sequence.window.copy() for sequence in self.sequences]
        for table in tables:
            self.pool.share(table)
        return self._over([Sequence(self.pool, *each) for each in zip(tables, self.lengths, windows, strict=True)])

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
            each.locate(length, self.pool.device)
            if each.window:
                each.window.truncate(length)
            if not length:
                each.window = None  # an empty sequence holds nothing
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
            if sequence.window:
                sequence.window.truncate(sequence.length)  # of what a pass wrote that was interrupted
            elif self.pool.recent:
                self.pool.admit(self.pool.window_bytes)
                sequence.window = Window(len(self.pool.layers), self.pool.recent, self.pool.row.width, self.pool.device)

    def append(self, layer: int, rows: torch.Tensor) -> None:
        """Writes rows [B, T, W] of one layer after the last token. Lengths move once per pass, in advance()."""
        if rows.dim() != 3 or rows.shape[0] != self.batch or rows.shape[2] != self.pool.row.width:
            wanted = f"[{self.batch}, tokens, {self.pool.row.width}]"
            raise RequestError(f"rows must be {wanted} for this cache, not {list(rows.shape)}.")
        if any(sequence.end != sequence.length + rows.shape[1] for sequence in self.sequences):
            self.reserve(rows.shape[1])
        for sequence, new in zip(self.sequences, rows.detach(), strict=True):
            where = _span(sequence.where, sequence.length, sequence.end)
            packed = self.pool.format.pack(new, self.pool.row)
            for part, values in zip(self.pool.layers[layer], packed, strict=True):
                part[where] = values
            if sequence.window:
                sequence.window.write(layer, sequence.length, new)

    def page(self, blocks: int = 0) -> torch.Tensor:
        """Where the sequences are in the pass that `reserve` made room for, on the host: see pages.py."""
        return page_of([(one.length, one.end, one.table) for one in self.sequences], blocks)

    @property
    def pages(self) -> Pages:
        """The same on the device."""
        return pages_of(self.page().to(self.pool.device), self.batch)

    def latents(self, layer: int, pages: Pages) -> Latents:
        """What a layer holds, for kernels. The format keeps no window."""
        return Latents(tuple(self.pool.layers[layer]), self.pool.format, self.pool.row, pages.table, pages.ends)

    def rows(self, layer: int, sequence: int, dtype: torch.dtype) -> torch.Tensor:
        """[S, W] of one sequence, the reserved positions included; a view where blocks and dtype allow."""
        return self._unpacked(layer, self.sequences[sequence], 0, self.sequences[sequence].end, dtype)

    def chunks(self, layer: int, sequence: int, dtype: torch.dtype, size: int) -> Iterator[torch.Tensor]:
        """The same in order, at most `size` rows at a time; in one piece where nothing has to be unpacked."""
        one = self.sequences[sequence]
        format = self.pool.format
        whole = isinstance(format, Plain) and format.dtype == dtype and isinstance(one.where, slice) and not one.window
        size = max(1, one.end) if whole else size
        for start in range(0, one.end, size):
            yield self._unpacked(layer, one, start, min(start + size, one.end), dtype)

    def convert(self, format: str | Format) -> list[tuple[float, float]]:
        """Stores every row, of all sequences and forks that share the pool, in another format from now on.

        What the old format lost stays lost. Of each layer the relative error that the new one adds to latent and rotary
        key: the root mean square of the change over that of the rows. RequestError for a format with recent tokens kept
        wide, or from one: what a window holds belongs to its sequence.
        """
        format = cache_format(format)
        if format.recent or self.pool.format.recent:
            raise RequestError("a cache with recent tokens kept wide is made anew, not converted: bench.new_cache().")
        self.pool.reap()
        if format == self.pool.format:
            return [(0.0, 0.0)] * len(self.pool.layers)
        return self.pool.convert(format)

    def _unpacked(self, layer: int, sequence: Sequence, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        where = _span(sequence.where, start, end)
        parts = tuple(part[where] for part in self.pool.layers[layer])
        rows = self.pool.format.unpack(parts, self.pool.row, dtype)
        return sequence.window.overlay(layer, start, rows) if sequence.window else rows

    def advance(self, tokens: int) -> None:
        for sequence in self.sequences:
            sequence.length += tokens


def _span(where: slice | torch.Tensor, start: int, end: int) -> slice | torch.Tensor:
    return slice(where.start + start, where.start + end) if isinstance(where, slice) else where[start:end]
