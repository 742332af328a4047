"""How fast blocks at random places of a file are read from a disk, with the page cache kept out of it."""

import errno
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from workbench.errors import BudgetError, RequestError

MIB = 2**20
FILE = 1024 * MIB  # at most
LEAST_FREE = 64 * MIB
PAGE = 4096  # O_DIRECT wants buffers, offsets and sizes in multiples of the disk's sector, which is at most this
ROUNDS = 7
ROUND_SECONDS, WRITE_SECONDS = 1.0, 20.0  # a slow disk gives fewer blocks, not a longer wait

DIRECT = "past the page cache (O_DIRECT)"
EMPTIED = "through the page cache, emptied before each reading (O_DIRECT was refused)"
NOWHERE = "not measured: this system cannot keep its page cache out of it"


class Reads(NamedTuple):
    """Bytes per second of every round, by number of readers; none where the system cannot keep its cache out.

    file         bytes of the file that was read
    past_cache   how the page cache was kept out of it
    file_system  its type, such as "ext4"
    """

    rates: dict[int, list[float]]
    file: int
    past_cache: str
    file_system: str


def read_blocks(folder: Path, block: int, readers: tuple[int, ...], progress: Callable[[str], None]) -> Reads:
    """Reads blocks of `block` bytes of a file written for it in `folder`: at most 1 GiB, or half of what is free.

    A round reads all of them once in random order, or stops after a second. The cache of a hypervisor or of the disk
    itself is not bypassed: it may still hold what was just written. Whatever ends this, the file is gone.
    BudgetError where too little is free; RequestError for a folder that cannot be written, or blocks of no whole pages.
    """
    if block < 1 or block % PAGE or not readers or min(readers) < 1:
        raise RequestError(f"blocks are whole pages of {PAGE} bytes and readers 1 or more; got {block} and {readers}.")
    if not hasattr(os, "preadv") or not hasattr(os, "posix_fadvise"):
        return Reads({}, 0, NOWHERE, "")
    try:
        free = psutil.disk_usage(str(folder)).free
        goal, least = min(FILE, free // 2), block * max(readers)
        if free < LEAST_FREE or goal < least:
            raise BudgetError(
                f"{free / MIB:.0f} MiB are free in {folder}, and measuring there takes "
                f"{max(LEAST_FREE, 2 * least) / MIB:.0f}: make room, or name a folder elsewhere."
            )
        progress(f"writing {goal / MIB:.0f} MiB")
        with _unnamed(folder) as (file, direct):
            size = _fill(file, goal, least)
            buffers = [mmap.mmap(-1, block) for _ in range(max(readers))]  # memory of its own is aligned to pages
            source = direct if direct is not None and _answers(direct, buffers[0]) else file
            rates = {count: [] for count in readers}
            for turn in range(ROUNDS):  # in turn, so that a burst favours none
                progress(f"reading from disk, {turn + 1} of {ROUNDS}")
                for count, readings in rates.items():
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    readings.append(_round(source, buffers[:count], size))
            how = EMPTIED if source is file else DIRECT
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BudgetError(f"{folder} is full: make room, or name a folder elsewhere.") from error
        raise RequestError(f"cannot measure in {folder}: {error.strerror}; name a folder to write to.") from error
    return Reads(rates, size, how, _file_system(folder))


@contextmanager
def _unnamed(folder: Path) -> Iterator[tuple[int, int | None]]:
    """A file that lost its name before the first byte: however this process ends, nothing is left of it.

    Two descriptors: to write and read, and to read past the page cache, None where that is refused.
    """
    file, name = tempfile.mkstemp(dir=folder, prefix=".measuring-")
    direct = None
    try:
        try:
            direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            os.unlink(name)
        yield file, direct
    finally:
        for descriptor in (file, direct):
            if descriptor is not None:
                os.close(descriptor)


def _fill(file: int, goal: int, least: int) -> int:
    """Bytes that nothing below can compress or guess, on the disk when this returns; fewer where it is slow."""
    size, end = 0, time.perf_counter() + WRITE_SECONDS
    while size < least or (size < goal and time.perf_counter() < end):
        size += os.write(file, os.urandom(min(16 * MIB, goal - size)))
        os.fdatasync(file)
    return size


def _answers(file: int, buffer: mmap.mmap) -> bool:
    """Some file systems take the flag when opening and refuse to read."""
    try:
        return os.preadv(file, [buffer], 0) > 0
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False


def _round(file: int, buffers: list[mmap.mmap], size: int) -> float:
    """Bytes per second: each reader fills its buffer again and again; no block is read twice, so no cache can help."""
    block = len(buffers[0])
    offsets = [block * index for index in range(size // block)]
    random.shuffle(offsets)
    left = iter(offsets)
    start = time.perf_counter()

    def read(buffer: mmap.mmap) -> int:
        done = 0
        for offset in left:
            filled = 0
            while filled < block:
                filled += os.preadv(file, [memoryview(buffer)[filled:]], offset + filled)
            done += block
            if time.perf_counter() - start > ROUND_SECONDS:
                break
        return done

    with ThreadPoolExecutor(len(buffers)) as pool:
        done = sum(pool.map(read, buffers))
    return done / (time.perf_counter() - start)


def _file_system(folder: Path) -> str:
    inside = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if inside.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "an unknown file system"
