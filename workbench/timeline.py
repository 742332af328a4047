"""A timeline of memory: readings taken while something else runs, and marks for what happened meanwhile."""

import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from workbench.meter import ALLOCATED, DEVICE, ROWS, WINDOWS, Meter, Reading

if TYPE_CHECKING:
    from workbench.session import Conversation, Event

LIMIT = 2000  # readings a sampler keeps; then every second one is let go
NOISE = 2**18  # bytes by which a process grows and shrinks while nothing happens


class Mark(NamedTuple):
    """Something that happened, on the clock of the meter.

    kind   "prompt" (is about to be read), "prefill" (it was read), "block" (rows were allocated or given back),
           "format" (the cache was converted), "stop" or "end" (of a reply)
    """

    seconds: float
    tokens: int
    kind: str
    text: str


class Sampler:
    """Readings every `interval` seconds, by a thread of its own, from start() or `with` on. It ends with its owner.

    While nothing changes no reading is added: the last one is moved on. `listeners` are called after each look, in that
    thread.
    """

    def __init__(self, meter: Meter, interval: float = 0.1):
        self.meter: Meter | None = meter
        self.interval = interval
        self.readings: list[Reading] = []
        self.marks: list[Mark] = []
        self.revision = 0  # how often readings were thinned out, so that their numbers changed
        self.listeners: list[Callable[[], None]] = []
        self._steps: list[tuple[float, int, int]] = []  # seconds, tokens, bytes of the cache: a row a token
        self._lock = threading.RLock()
        self._end: weakref.finalize | None = None  # ends the thread; also runs at exit
        self._spent, self._running, self._since = 0.0, 0.0, 0.0

    @property
    def running(self) -> bool:
        return self._end is not None

    def start(self) -> "Sampler":
        if self._end is None:
            stop, self._since = threading.Event(), perf_counter()
            work = threading.Thread(
                target=_sample, args=(weakref.ref(self), stop, self.interval), name="workbench-meter", daemon=True
            )
            self._end = weakref.finalize(self, _end, work, stop)
            work.start()
        return self

    def stop(self) -> None:
        """Ends the thread; what was read stays."""
        if self._end is not None:
            end, self._end = self._end, None
            end()
            self._running += perf_counter() - self._since

    def retire(self) -> None:
        """Stops for good and lets the workbench go; what was read stays."""
        self.stop()
        self.meter = None

    def __enter__(self) -> "Sampler":
        self.sample()
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()
        self.sample()

    @property
    def cost(self) -> float:
        """Seconds of computing that its thread used per second it ran."""
        running = self._running + (perf_counter() - self._since if self.running else 0)
        return self._spent / running if running else 0.0

    def sample(self) -> Reading:
        """A reading now, in this thread."""
        with self._lock:
            reading = self.meter.now(full=False)
            before = self.readings[-1] if self.readings else None
            if len(self.readings) > 1 and _alike(self.readings[-2], before) and _alike(before, reading):
                self.readings[-1] = replace(before, seconds=reading.seconds)
            else:
                self._add(before, reading)
        for listener in tuple(self.listeners):
            listener()
        return reading

    def mark(self, kind: str, text: str = "") -> None:
        """Notes that something happened now."""
        with self._lock:
            tokens = self.readings[-1].tokens if self.readings else 0
            self.marks.append(Mark(self.meter.seconds, tokens, kind, text))

    def follow(self, conversation: "Conversation") -> Callable[[], None]:
        """Marks what its replies do, and notes every token; returns the way to end that."""
        return conversation.subscribe(self.hear)

    def hear(self, event: "Event") -> None:
        """One event of a conversation, in the thread of its worker: a few appends."""
        turn = event.turn
        if event.kind == "started":
            self.mark("prompt")
        elif event.kind == "prefill":
            self.mark("prefill", f"{turn.stats['prefilled_tokens']:,} tokens read")
        elif event.kind == "step":
            self._steps.append((self.meter.seconds, turn.steps[-1].position, turn.stats["cache_bytes"]))
        elif event.kind == "finished":
            self.mark("stop" if turn.finish == "stopped" else "end", turn.finish or "")

    def timeline(self) -> pd.DataFrame:
        """A row a reading, by seconds: tokens, bytes of each category allocated, and of process and device."""
        with self._lock:
            rows = [_row(reading) for reading in self.readings]
        return pd.DataFrame(rows, columns=_COLUMNS).astype(_TYPES).set_index("seconds")

    def per_token(self) -> pd.DataFrame:
        """The same, a row a token that was generated while a conversation was followed: bytes of the cache as they were
        after it, all others as in the last reading before it.
        """
        with self._lock:
            readings, steps = list(self.readings), list(self._steps)
        times, rows = [reading.seconds for reading in readings], []
        for seconds, tokens, cache in steps:
            row = _row(readings[max(0, bisect_right(times, seconds) - 1)]) if readings else {}
            rows.append(row | {"seconds": seconds, "tokens": tokens, ROWS: cache - row.get(WINDOWS, 0)})
        return pd.DataFrame(rows, columns=_COLUMNS).astype(_TYPES).set_index("tokens")

    def events(self) -> pd.DataFrame:
        """The marks, a row each."""
        return pd.DataFrame(list(self.marks), columns=Mark._fields)

    def _add(self, before: Reading | None, after: Reading) -> None:
        if before:
            self._notice(before, after)
        self.readings.append(after)
        if len(self.readings) > LIMIT:
            self.readings[:-1] = self.readings[:-1:2]
            self.revision += 1

    def _notice(self, before: Reading, after: Reading) -> None:
        formats = [" + ".join(sorted({held.format for held in one.caches})) for one in (before, after)]
        if all(formats) and formats[0] != formats[1]:
            self.marks.append(Mark(after.seconds, after.tokens, "format", f"{formats[0]} to {formats[1]}"))
        elif after.blocks != before.blocks:
            change = f"{after.blocks - before.blocks:+d}, {after.blocks} of each layer"
            self.marks.append(Mark(after.seconds, after.tokens, "block", change))


_COLUMNS = ["seconds", "tokens", *ALLOCATED, "rss", *(f"device {name}" for name in DEVICE)]
_TYPES = dict.fromkeys(_COLUMNS[1:], "Int64")


def _row(reading: Reading) -> dict[str, float | int | None]:
    known = {"seconds": reading.seconds, "tokens": reading.tokens, **reading.allocated, "rss": reading.process["rss"]}
    return known | {f"device {name}": size for name, size in reading.device.items()}


def _alike(a: Reading, b: Reading) -> bool:
    """Whether nothing but time has passed."""
    return (
        a.caches == b.caches
        and a.allocated == b.allocated
        and abs(a.process["rss"] - b.process["rss"]) < NOISE
        and abs((a.device["used"] or 0) - (b.device["used"] or 0)) < NOISE
    )


def _sample(ref: weakref.ref, stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        sampler = ref()
        if sampler is None:
            return
        began = thread_time()
        sampler.sample()
        sampler._spent += thread_time() - began
        del sampler


def _end(work: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if work is not threading.current_thread():
        work.join(2.0)  # a thread inside torch must not outlive the interpreter
