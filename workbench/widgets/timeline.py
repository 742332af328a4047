"""The memory timeline: what is held over time or over tokens, by category, with marks for what happened."""

import threading
from html import escape
from time import monotonic

import pandas as pd

from workbench.footprint import TABLE, WEIGHTS
from workbench.meter import RECORDED, RING, ROWS, WINDOWS, Meter, Reading
from workbench.timeline import Sampler
from workbench.widgets import picture
from workbench.widgets.view import View, script
from workbench.workbench import Workbench

INTERVAL = 2.0  # seconds between two messages
SHOWN = 12  # rows of the table in a saved notebook


class MemoryTimeline(View):
    """What a sampler saw and sees, stacked: the cache alone, all we allocated, or the whole process (or device).

    Given a bench it makes a sampler of its own, which runs from the first display on. While `live` is false the browser
    is told nothing of its own accord.
    """

    _esm = script("view.js", "bars.js", "areas.js", "timeline.js")
    _css = script("view.css", "memory.css")

    def __init__(self, of: Sampler | Workbench, live: bool = True) -> None:
        self._own = not isinstance(of, Sampler)
        self.sampler = Sampler(Meter(of)) if self._own else of
        self._lock = threading.RLock()
        self._last = 0.0
        self._told = (0, 0, 0)  # revision, readings and marks that the views know
        self._live = live
        super().__init__()
        self.sampler.listeners.append(self._look)

    @property
    def live(self) -> bool:
        """Whether news are told as they come."""
        return self._live

    @live.setter
    def live(self, wanted: bool) -> None:
        self._live = wanted
        if wanted:
            self.refresh()

    def table(self, by: str = "seconds") -> pd.DataFrame:
        """Bytes by category, a row a reading, or with by="tokens" a row a token; see Sampler."""
        return self.sampler.timeline() if by == "seconds" else self.sampler.per_token()

    def refresh(self) -> None:
        """Tells the browser what it does not know yet."""
        self._last = 0.0
        self._look()

    def retire(self) -> None:
        """Looks no more; what was seen stays."""
        if self._look in self.sampler.listeners:
            self.sampler.listeners.remove(self._look)
        if self._own:
            self.sampler.retire()

    def close(self) -> None:
        """Takes the timeline off the screen; a sampler that was given goes on."""
        self.retire()
        super().close()

    # Behind the view

    def _look(self) -> None:
        if not self._live or monotonic() - self._last < INTERVAL:
            return
        with self._lock:
            sampler = self.sampler
            revision, readings, marks = self._told
            now = (sampler.revision, len(sampler.readings), len(sampler.marks))
            if now == self._told:
                return
            self._last = monotonic()
            if revision != sampler.revision or not readings:
                self._snapshot()
                return
            self._told = now
            start = readings - 1  # the last one they know may have been moved on since
            rows, news = self._rows(start, now[1]), self._marks(marks, now[2])
            self._tell({"kind": "grow", "from": start, "rows": rows, "marks": news})

    def _snapshot(self, view: str | None = None) -> None:
        if self._own and view is not None and self.sampler.meter is not None:
            self.sampler.start()
        with self._lock:
            sampler, self._last = self.sampler, monotonic()
            if not sampler.readings:
                sampler.sample()
            self._told = (sampler.revision, len(sampler.readings), len(sampler.marks))
            allocated = sampler.readings[-1].allocated
            self._tell(
                {
                    "kind": "show",
                    "view": view,
                    "fixed": [[part, allocated[part]] for part in (*WEIGHTS, TABLE) if allocated[part]],
                    "device": sampler.readings[-1].on_device,
                    "rows": self._rows(0, self._told[1]),
                    "marks": self._marks(0, self._told[2]),
                }
            )

    def _rows(self, start: int, stop: int) -> list[list]:
        return [_row(reading) for reading in self.sampler.readings[start:stop]]

    def _marks(self, start: int, stop: int) -> list[list]:
        return [[round(m.seconds, 2), m.tokens, m.kind, m.text] for m in self.sampler.marks[start:stop]]

    def _obey(self, message: dict) -> None:
        """The page only looks."""

    def __repr__(self) -> str:
        readings, marks = len(self.sampler.readings), len(self.sampler.marks)
        return f"<MemoryTimeline: {readings} readings, {marks} marks, sampling took {self.sampler.cost:.2%} of a core>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the cache over time as a picture and the last readings as a table."""
        table = self.table()
        if not len(table):
            return self._page(repr(self), f"<p>{escape(repr(self))}</p>", **kwargs)
        columns = ["tokens", ROWS, WINDOWS, RING, RECORDED, "rss"]
        last = table[columns].iloc[-SHOWN:]
        parts = {name: table[name].astype(float).tolist() for name in (ROWS, WINDOWS) if table[name].any()}
        png = picture.areas(table.index.tolist(), parts, "What the cache holds", "seconds") if parts else None
        html = f"<section><p>{escape(repr(self))}</p>{last.to_html(na_rep='', float_format='{:.2f}'.format)}</section>"
        return self._page(f"{self!r}\n{last.to_string(na_rep='')}", html, png, **kwargs)


def _row(reading: Reading) -> list:
    """[seconds, tokens, rows written, allocated, windows, ring, recorder, RSS, device's allocated, reserved, used]"""
    held = reading.allocated
    return [
        round(reading.seconds, 2), reading.tokens, reading.theoretical[ROWS], held[ROWS], held[WINDOWS], held[RING],
        held[RECORDED], reading.process["rss"], reading.device["allocated"], reading.device["reserved"],
        reading.device["used"],
    ]  # fmt: skip
