"""The expert map: where every expert is now, which ones the last tokens used, and what bringing them in takes."""

import threading
import weakref
from html import escape
from time import monotonic, thread_time

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.experts import Store
from workbench.offloaded import Offloaded
from workbench.transfers import DISK, FAR, MOVING, NEAR
from workbench.widgets.mosaic import mosaic
from workbench.widgets.tally import Best, Pass, Tally
from workbench.widgets.view import View, script, short

INTERVAL = 1 / 4  # seconds between two messages, so that a whole panel stays below twenty a second
SHARE = 0.02  # of a core at most works out the perfect cache
SHOWN = 240  # passes that a new page is told
PLACES = {"near": NEAR, "far": FAR, "disk": DISK, "moving": MOVING}
COLOURS = {"near": "#2f86c6", "far": "#a9cfea", "disk": "#e9ecef", "moving": "#e69f00"}  # of the still picture


class ExpertMap(View):
    """Layers down, experts across, coloured by where each is. From its first display on a thread looks at `store`.

    RequestError for a store that has all experts in memory.
    """

    _esm = script("view.js", "routing.js", "passes.js", "expertmap.js")
    _css = script("view.css", "routing.css", "expertmap.css")

    def __init__(self, store: Store) -> None:
        if not isinstance(store, Offloaded):
            raise RequestError(
                "all experts of this model are in memory, so none ever moves. Open a packed model with a budget that "
                'they do not fit into, such as load(path, ram="8GiB").'
            )
        self.store: Offloaded | None = store
        self.layers, self.experts, self.slots = store.layers, store.experts, store.near.count
        self._facts = _facts(store)
        self._tally, self._where = Tally(store), store.where()
        self._best: Best | None = None
        self._due = 0.0  # when the perfect cache may be worked out again
        self._told = 0  # passes
        self._lock = threading.RLock()
        self._end: weakref.finalize | None = None  # ends the thread; also runs at exit
        super().__init__()

    def where(self) -> pd.DataFrame:
        """"near", "far", "disk" or "moving" as of the last look; layers down, experts across."""
        names = np.array([name for name, _ in sorted(PLACES.items(), key=lambda item: item[1])])
        return pd.DataFrame(names[self._where], pd.Index(self.layers, name="layer")).rename_axis(columns="expert")

    def counts(self) -> dict[str, int]:
        """How many experts are near, far, on disk alone, and moving, as of the last look."""
        found = np.bincount(self._where.reshape(-1), minlength=len(PLACES))
        return {name: int(found[code]) for name, code in PLACES.items()}

    def describe(self, layer: int, expert: int) -> str:
        """Where it is, how often it was used, and when last: "layer 12, expert 37: on disk, used 14 times, last 3
        tokens ago". RequestError where there is no such expert.
        """
        if layer not in self.layers or not 0 <= expert < self.experts:
            raise RequestError(
                f"no expert {expert} in layer {layer}: there are {self.experts}, numbered from 0, in each of the "
                f"layers {self.layers[0]} to {self.layers[-1]}."
            )
        row = self.layers.index(layer)
        key = row * self.experts + expert
        said = f"layer {layer}, expert {expert}: {self._facts['places'][self._where[row, expert]]}"
        uses, ago = int(self._tally.uses[key]), int(self._tally.tokens - self._tally.seen[key])
        if not uses:
            return f"{said}, never used"
        when = f"{ago:,} token{'s' * (ago != 1)} ago" if ago else "just now"
        return f"{said}, used {'once' if uses == 1 else f'{uses:,} times'}, {'last ' * (uses > 1)}{when}"

    def passes(self) -> pd.DataFrame:
        """A row a pass that is over: tokens, experts needed, hit rate, MB read and ms waited a token."""
        rows = [(p.tokens, p.needed, p.near / p.needed, *self._per_token(p)) for p in self._tally.finished]
        columns = ["tokens", "needed", "hit rate", "MB a token", "ms waited a token"]
        numbers = pd.Index([one.number for one in self._tally.finished], name="pass", dtype=int)
        return pd.DataFrame(rows, numbers, columns)

    @property
    def best(self) -> Best | None:
        """Hit rate over the last passes beside a perfect cache of the same size, see Tally.best; worked out now."""
        with self._lock:
            if self.store is not None:
                self._tally.read()
                self._best = self._tally.best()
            return self._best

    def update(self) -> None:
        """Looks now, and tells the browser what is new."""
        with self._lock:
            if self.store is None:
                return
            before, self._where = self._where, self.store.where()
            news, changed = self._tally.read(), np.flatnonzero(self._where != before)
            self._work_out()
            used = [_used(keys, self._where.size) for _, keys in news]
            if sum(map(len, used)) > self._where.size:
                self._snapshot()
                return
            rows, best = self._finished(self._told), self._best
            if not len(changed) and not news and not rows and best == self._said:
                return
            self._told, self._said = self._told + len(rows), best
            moved = [gaps(changed), packed(self._where.reshape(-1)[changed])]
            whole = packed(self._where.reshape(-1))
            if sum(map(len, moved)) > len(whole):
                moved = [b"", whole]
            passes = [[at, len(one)] for (at, _), one in zip(news, used)]
            message = {"kind": "news", "tokens": self._tally.tokens, "passes": passes, "done": rows}
            self._tell(message | {"best": self._rates(best)}, [*moved, b"".join(used)])

    def retire(self) -> None:
        """Looks no more and lets the store go; what was seen stays."""
        if self._end is not None:
            end, self._end = self._end, None
            end()
        with self._lock:
            self.store = None

    def close(self) -> None:
        """Lets the store go and takes the map off the screen."""
        self.retire()
        super().close()
