"""Progress: how far a long work on files is, in bytes, and the same as text for a terminal."""

import time
from collections.abc import Callable
from typing import NamedTuple

LIVE, SELDOM = 0.2, 10.0  # seconds between two lines: on a terminal, where each replaces the last, and else


class Progress(NamedTuple):
    """How far packing or verifying is. Bytes are those of the packed files."""

    name: str  # of the file it is at
    file: int  # its number, from 1
    files: int
    done: int  # bytes, with those that an earlier run wrote
    total: int
    made: int  # bytes of this run
    seconds: float

    @property
    def eta(self) -> float | None:
        """Seconds that are left at the speed so far."""
        return (self.total - self.done) * self.seconds / self.made if self.made else None


Tell = Callable[[Progress], object]


class Clock:
    """Counts bytes and tells of them."""

    def __init__(self, total: int, files: int, tell: Tell, done: int = 0, file: int = 0):
        self.total, self.files, self.tell, self.done, self.file = total, files, tell, done, file
        self.name, self._before, self._started = "", done, time.perf_counter()

    def begin(self, name: str) -> None:
        self.name, self.file = name, self.file + 1

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        seconds, made = time.perf_counter() - self._started, self.done - self._before
        self.tell(Progress(self.name, self.file, self.files, self.done, self.total, made, seconds))


class Bar:
    """Says how far it is: on one line that is replaced where it is `live`, else on a line now and then."""

    def __init__(self, write: Callable[[str], object], live: bool):
        self.write, self.live = write, live
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now, end = time.monotonic(), progress.done == progress.total
        if not end and now - self._said < (LIVE if self.live else SELDOM):
            return
        self._said = now
        speed = progress.made / max(progress.seconds, 1e-9) / 1e6
        line = (
            f"{progress.file:,} of {progress.files:,} files, {progress.done / 1e9:,.2f} of "
            f"{progress.total / 1e9:,.2f} GB, {speed:,.0f} MB/s"
        )
        if not end and progress.eta is not None:
            line += f", {progress.eta / 60:,.0f} min left"
        self.write(f"\r{line}\x1b[K" + ("\n" if end else "") if self.live else line + "\n")
