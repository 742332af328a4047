"""A tally of what an offloaded store did: uses of each expert, what each pass took, and the best that was possible."""

from typing import NamedTuple

import numpy as np

from workbench.lens.accesses import Accesses
from workbench.lens.capacity import belady
from workbench.offloaded import Offloaded
from workbench.transfers import COLUMNS

WINDOW = 200  # passes that the perfect cache is worked out for
MOVING, LAYER, TOKENS, NEEDED, NEAR, READ, WAITED = (
    COLUMNS.index(name) for name in ("moving", "layer", "tokens", "needed", "near", "read", "waited")
)


class Pass(NamedTuple):
    """Sums over its visits, the first of which has the number `first`. waited: seconds."""

    number: int
    first: int
    tokens: int
    needed: int
    near: int
    read: int
    waited: float


class Best(NamedTuple):
    """Hit rates over the last `passes`: of a cache of as many slots that knows the future, and the store's own."""

    oracle: float
    own: float
    passes: int


class Log(NamedTuple):
    """Visits [V, columns], and of every access in them the visit, counted from the first of these, the key, a hit."""

    rows: np.ndarray
    visit: np.ndarray
    key: np.ndarray
    hit: np.ndarray


class Tally:
    """What the store did up to the last `read`. It runs on meanwhile: only whole visits are taken in. Holds no weights.

    uses    int64 [MoE layers x experts], visits that asked for the expert
    seen    int64, how many tokens had been read at the end of the last pass that used it
    tokens  how many were read
    passes  the last one may go on, see `finished`
    """

    def __init__(self, store: Offloaded):
        self.transfers, self.slots, self._end = store.transfers, store.near.count, store.layers[-1]
        keys = len(store.layers) * store.experts
        self.uses, self.seen = np.zeros(keys, np.int64), np.zeros(keys, np.int64)
        self.tokens = 0
        self.passes: list[Pass] = []
        self._visits, self._last = 0, -1  # how many were taken in, and the layer of the last one

    def read(self) -> list[tuple[int, np.ndarray]]:
        """Takes in what is new: (tokens read by then, ascending keys) of each pass, or of another part of it."""
        log, news = self._log(self._visits), []
        numbers, starts = np.unique(log.rows[:, MOVING], return_index=True)
        for number, start, stop in zip(numbers.astype(int), starts, [*starts[1:], len(log.rows)]):
            self._add(int(number), self._visits + int(start), log.rows[start:stop])
            begin, end = np.searchsorted(log.visit, (start, stop))
            used = np.sort(log.key[begin:end])
            self.uses[used] += 1  # no two are alike: a pass visits a layer once
            self.seen[used] = self.tokens
            news.append((self.tokens, used))
        if len(log.rows):
            self._visits, self._last = self._visits + len(log.rows), int(log.rows[-1, LAYER])
        return news

    @property
    def finished(self) -> list[Pass]:
        """The passes that are over; one that was stopped is over when the next begins."""
        return self.passes if self._last == self._end else self.passes[:-1]

    def best(self) -> Best | None:
        """Of passes of one token, or of all where there are none; None before any is over.

        The perfect cache begins as the store did: empty, or where the store has run for longer than the window, with
        what is best to have then. So no store of this size that reads nothing ahead hits more.
        """
        over = self.finished
        if not over:
            return None
        first = over[-WINDOW:][0].first
        stop = self._visits if len(over) == len(self.passes) else self.passes[-1].first
        log = self._log(first, stop)
        before = np.unique(log.key) if first else log.key[:0]
        visit = np.concatenate([np.zeros(len(before), np.int64), log.visit + 1])
        key = np.concatenate([before, log.key])
        # blocks go by their keys here, as if of one layer: the visit before all others is to every layer at once
        accesses = Accesses(visit, np.zeros_like(key), key, visit, blocks=len(self.uses))
        perfect = belady(accesses, self.slots)[len(before) :]
        answers = log.rows[:, TOKENS] == 1
        rows = answers if answers.any() else ~answers
        counted = rows[log.visit]
        passes = len(np.unique(log.rows[rows, MOVING]))
        return Best(float(perfect[counted].mean()), float(log.hit[counted].mean()), passes)

    def _add(self, number: int, first: int, rows: np.ndarray) -> None:
        sums = rows[:, [NEEDED, NEAR, READ]].sum(0).astype(int).tolist()
        one = Pass(number, first, int(rows[0, TOKENS]), *sums, float(rows[:, WAITED].sum()))
        if self.passes and self.passes[-1].number == number:
            before = self.passes.pop()
            one = Pass(*before[:3], *(a + b for a, b in zip(before[3:], one[3:])))
        else:
            self.tokens += one.tokens
        self.passes.append(one)

    def _log(self, start: int, stop: int | None = None) -> Log:
        """From visit `start` on. Those of a visit are there before it is counted."""
        stop = self.transfers.visits if stop is None else stop
        (visit, key), hit = self.transfers.accesses, self.transfers.hits
        begin, end = np.searchsorted(visit, (start, stop))
        return Log(
            self.transfers.rows[start:stop],
            visit[begin:end].astype(np.int64) - start,
            key[begin:end].astype(np.int64),
            hit[begin:end],
        )
