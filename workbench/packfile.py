"""One file of a packed checkpoint: safetensors whose data begins on a page, with a checksum of every tensor.

Any safetensors reader opens it. The checksums (CRC-32 of the bytes) are in its metadata, in the order of the tensors.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from workbench.blocks import PAGE, slab
from workbench.errors import CheckpointError, RequestError
from workbench.shards import DTYPES, read_header

NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUMS = "crc32"


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class PackWriter:
    """Writes a file tensor by tensor, in the order of `entries`: `with PackWriter(...) as file: file.write(tensor)`.

    Until it is complete and on the disk it has the suffix .part. An error or an interrupt removes that, a killed
    process leaves it; of the name itself there is a whole file or none.
    """

    def __init__(self, path: Path, entries: Iterable[Entry], metadata: dict[str, str]):
        self.path, self.entries, self.metadata = path, list(entries), metadata
        self.checksums: list[int] = []
        self._part = path.with_name(f"{path.name}.part")

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self._header()) + sum(entry.nbytes for entry in self.entries)

    def write(self, tensor: torch.Tensor) -> None:
        entry = self.entries[len(self.checksums)]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{entry} is not {tensor.shape}"
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw)
        self.checksums.append(zlib.crc32(raw))

    def __enter__(self) -> "PackWriter":
        self._file = self._part.open("wb")
        self._file.write(bytes(len(self._header())))  # zeros, which no reader takes for a header
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, frames: TracebackType | None) -> None:
        try:
            if kind is None:
                assert len(self.checksums) == len(self.entries), f"{self.path}: tensors are missing"
                self._file.seek(0)
                self._file.write(self._header())  # as long as before: a checksum has eight digits
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._part.replace(self.path)
        finally:
            with suppress(OSError):  # of a full disk, once more: the first one is on its way
                self._file.close()
            self._part.unlink(missing_ok=True)

    def _header(self) -> bytes:
        known = self.checksums + [0] * (len(self.entries) - len(self.checksums))
        header = {"__metadata__": self.metadata | {CHECKSUMS: " ".join(f"{one:08x}" for one in known)}}
        start = 0
        for entry in self.entries:
            offsets = [start, start + entry.nbytes]
            header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
            start += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text


class PackFile:
    """A packed file, opened: reads of whole tensors at known places, each checked against its checksum.

    `direct`: past the system's cache, where the file system can do that, so that what is read once does not push out
    what is used; where it cannot, the system is told after each read that the pages are not wanted.
    """

    _descriptor = -1

    def __init__(self, path: Path, direct: bool = False):
        self.path = path
        self.stored, self.metadata = read_header(path)
        try:
            checksums = [int(one, 16) for one in self.metadata[CHECKSUMS].split()]
        except (KeyError, ValueError):
            checksums = []
        if len(checksums) != len(self.stored):
            raise CheckpointError(f"{path}: its checksums are missing. It was not written by `workbench pack`.")
        self.checksums = dict(zip(self.stored, checksums))
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._descriptor = self._open()

    def read(self, name: str, into: torch.Tensor) -> None:
        """Fills `into`, uint8 [nbytes] in main memory. CheckpointError where the file is short, damaged or unreadable.

        Threads may read at the same time. Where another file has taken the place of a damaged one, that is read.
        """
        try:
            self._fill(name, into)
        except CheckpointError:
            if not self._replaced():
                raise
            self._fill(name, into)

    def _fill(self, name: str, into: torch.Tensor) -> None:
        stored = self.stored[name]
        assert into.nbytes == stored.nbytes and into.is_contiguous(), f"{name}: {into.nbytes} for {stored.nbytes} bytes"
        if self._direct and into.data_ptr() % PAGE:  # past the cache only whole pages are read, into whole pages
            aligned = slab(1, stored.nbytes)[0]
            self._fill(name, aligned)
            into.copy_(aligned)
            return
        buffer = memoryview(into.numpy())
        found = 0
        try:
            while found < stored.nbytes:
                more = os.preadv(self._descriptor, [buffer[found:]], stored.start + found)
                found += more
                if not more or self._direct and more % PAGE:  # the end of the file
                    break
            if not self._direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, stored.start, stored.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self.path}: reading {name} failed ({error}). Check the disk.") from None
        if found != stored.nbytes:
            raise CheckpointError(
                f"{self.path}: {name} ends after {found:,} of {stored.nbytes:,} bytes: the file was cut short while it "
                "was open. Copy or pack it again."
            )
        if zlib.crc32(buffer) != self.checksums[name]:
            raise CheckpointError(
                f"{self.path}: {name} is damaged: it is not as its checksum says. Copy the file again; or remove it "
                "and give the same `workbench pack` again, which makes it anew."
            )

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self):
        self.close()

    def _replaced(self) -> bool:
        """Whether there is another file of that name than the one that is open; it is open from now on."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return False
        except OSError:
            return False
        fresh = self._open()
        os.dup2(fresh, self._descriptor, inheritable=False)  # other threads read on by the same number
        os.close(fresh)
        return True

    def _open(self) -> int:
        pages = all(one.start % PAGE == 0 and one.nbytes % PAGE == 0 for one in self.stored.values())
        if self._direct and pages and (descriptor := _open_direct(self.path)) is not None:
            return descriptor
        self._direct = False
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error}).") from None


def _open_direct(path: Path) -> int | None:
    """None where the file system cannot: some say so when a file is opened, others when it is read."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(descriptor, [memoryview(slab(1, PAGE)[0].numpy())], 0)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def write_json(file: Path, content: dict) -> None:
    """Whole and on the disk, or not at all."""
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("w", encoding="utf-8") as opened:
            opened.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two that write in one directory at once would write the same files: RequestError for the second. The lock goes
    with the process, however that ends.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"{out}: another `workbench pack` or `workbench synth` writes there. Wait until it has ended."
            ) from None
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
