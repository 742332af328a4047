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
from workbench.widgets.tally import Best, Tally
from workbench.widgets.view import View, script, short

INTERVAL = 1 / 4  # seconds between two messages, so that a whole panel stays below twenty a second
SHARE = 0.02  # of a core at most works out the perfect cache
SHOWN = 240  # passes that a new page is told
LAST = 12  # passes of the table in a saved notebook
PLACES = {"near": NEAR, "far": FAR, "disk": DISK, "moving": MOVING}
COLOURS = {"near": "#2f86c6", "far": "#a9cfea", "disk": "#e9ecef", "moving": "#e69f00"}  # of the still picture


class ExpertMap(View):
    """Layers down, experts across, coloured by where each is. From its first display on a thread looks at `store`.

    RequestError for a store that has all experts in memory.
    """

    _esm = script("view.js", "routing.js", "passes.js", "expertmap.js")
    _css = script("view.css", "routing.css", "expertmap.css")

    def __init__(self, store: Store) -> None:
        # first: what is refused is closed all the same
        self._lock, self.store = threading.RLock(), None
        self._end: weakref.finalize | None = None  # ends the thread; also runs at exit
        if not isinstance(store, Offloaded):
            raise RequestError(
                "all experts of this model are in memory, so none ever moves. Open a packed model with a budget that "
                'they do not fit into, such as load(path, ram="8GiB").'
            )
        self.store = store
        self.layers, self.experts, self.slots = store.layers, store.experts, store.near.count
        self._facts = _facts(store)
        self._tally, self._where = Tally(store), store.where()
        self._best: Best | None = None
        self._due = 0.0  # when the perfect cache may be worked out again
        self._worked = 0  # for how many passes it was
        self._told, self._said = 0, None  # what the pages know: how many passes, and which perfect cache
        super().__init__()

    def where(self) -> pd.DataFrame:
        """ "near", "far", "disk" or "moving" as of the last look; layers down, experts across."""
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
        over, block = self._tally.finished, self._facts["block"]
        rows = [
            (p.tokens, p.needed, p.near / p.needed, p.read * block / p.tokens / 1e6, 1000 * p.waited / p.tokens)
            for p in over
        ]
        columns = ["tokens", "needed", "hit rate", "MB a token", "ms waited a token"]
        numbers = pd.Index([one.number for one in over], name="pass", dtype=int)
        return pd.DataFrame(rows, numbers, columns)

    @property
    def best(self) -> Best | None:
        """Hit rate over the last passes beside a perfect cache of the same size, see Tally.best; worked out now."""
        self.update()
        with self._lock:
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
            used, cells = [_marks(keys, self._where.size) for _, keys in news], self._where.reshape(-1)
            if sum(map(len, used)) > 4 * self._where.size + 20 * SHOWN:  # more than a page that knows nothing is told
                self._show(None)
                return
            done, best = self._rows(self._told), self._best
            if not (len(changed) or news or done or best != self._said):
                return
            moved, whole = [gaps(changed), packed(cells[changed])], [b"", packed(cells)]
            parts = {
                "passes": [number for (at, _), part in zip(news, used) for number in (at, len(part))],
                "done": done,
                "best": _rates(best) if best != self._said else None,
            }
            self._told, self._said = self._told + len(done), best
            content = {"kind": "news"} | {name: part for name, part in parts.items() if part}
            self._tell(content, [*min(moved, whole, key=lambda two: sum(map(len, two))), b"".join(used)])

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

    # Behind the view

    def _work_out(self) -> None:
        over, now = len(self._tally.finished), monotonic()
        if over == self._worked or now < self._due:
            return
        began = thread_time()
        self._best, self._worked = self._tally.best(), over
        self._due = now + max(1.0, (thread_time() - began) / SHARE)

    def _rows(self, start: int) -> list[list]:
        """[tokens, needed, near, read, ms waited] of passes that are over."""
        over = self._tally.finished[start:]
        return [[p.tokens, p.needed, p.near, p.read, short(1000 * p.waited)] for p in over]

    def _show(self, view: str | None) -> None:
        over, tally, best = len(self._tally.finished), self._tally, self._best
        if view is None:  # to all pages
            self._told, self._said = over, best
        message = {
            "kind": "show",
            "view": view,
            "facts": self._facts,
            "tokens": tally.tokens,
            "done": self._rows(max(0, over - SHOWN)),
            "best": _rates(best),
        }
        self._tell(message, [packed(self._where.reshape(-1)), small(tally.uses), small(tally.seen)])

    def _snapshot(self, view: str | None = None) -> None:
        with self._lock:
            self.update()  # told to all pages: the new one goes on from there with them
            self._show(view)
            if self._end is None and self.store is not None:
                stop = threading.Event()
                work = threading.Thread(
                    target=_look, args=(weakref.ref(self), stop), name="workbench-expertmap", daemon=True
                )
                self._end = weakref.finalize(self, _finish, work, stop)
                work.start()

    def _obey(self, message: dict) -> None:
        """The page only looks."""

    def __repr__(self) -> str:
        counts, places = self.counts(), self._facts["places"]
        said = ", ".join(f"{counts[name]:,} {places[code]}" for name, code in PLACES.items() if counts[name])
        return f"<ExpertMap of {len(self.layers)} layers of {self.experts} experts: {said}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run a picture of what is where, and the last passes as a table."""
        self.update()
        counts, places = self.counts(), self._facts["places"]
        legend = [(COLOURS[name], f"{counts[name]:,} {places[code]}") for name, code in PLACES.items()]
        title = f"{len(self.layers)} layers of {self.experts} experts, {self.slots:,} slots near"
        png = mosaic(self._where, self.layers, legend, title)
        table, best = self.passes().tail(LAST), self._best
        said = [repr(self)[1:-1]]
        if best:
            said.append(
                f"Hit rate over the last {best.passes:,} passes {best.own:.1%}; "
                f"a perfect cache of the same size {best.oracle:.1%}"
            )
        form = {"float_format": "{:.3g}".format}
        lines = "".join(f"<p>{escape(line)}</p>" for line in said)
        html = f"<section>{lines}{table.to_html(border=0, **form) if len(table) else ''}</section>"
        text = "\n".join(said + ([table.to_string(**form)] if len(table) else []))
        return self._page(text, html, png, **kwargs)


def gaps(keys: np.ndarray) -> bytes:
    """Ascending keys, mostly a byte each: how many are left out before it. 255 leaves out 255, and no key follows."""
    more, rest = np.divmod(np.diff(keys, prepend=-1) - 1, 255)
    coded = np.full(len(keys) + int(more.sum()), 255, np.uint8)
    coded[np.cumsum(more + 1) - 1] = rest
    return coded.tobytes()


def packed(codes: np.ndarray) -> bytes:
    """Codes from 0 to 3, four in a byte, the first in its lowest bits."""
    fours = np.zeros((-(-len(codes) // 4), 4), np.uint8)
    fours.reshape(-1)[: len(codes)] = codes
    return (fours << np.array([0, 2, 4, 6], np.uint8)).sum(1, dtype=np.uint8).tobytes()


def small(numbers: np.ndarray) -> bytes:
    """As unsigned numbers of 1, 2 or 4 bytes, as the largest needs; nothing where all are 0."""
    kind = np.min_scalar_type(int(numbers.max(initial=0))).newbyteorder("<")
    return numbers.astype(kind).tobytes() if numbers.any() else b""


def _marks(keys: np.ndarray, count: int) -> bytes:
    """Which keys: as gaps, or where that is no shorter as a bit for each of the `count` there are, lowest first."""
    marks = np.zeros(count, bool)
    marks[keys] = True
    bits = np.packbits(marks, bitorder="little").tobytes()
    return min(gaps(keys), bits, key=lambda coded: (len(coded), coded is not bits))


def _rates(best: Best | None) -> list | None:
    return best and [short(best.oracle), short(best.own), best.passes]


def _facts(store: Offloaded) -> dict:
    """What a page is told once. `places`: words for NEAR, FAR, DISK and MOVING."""
    near = "in VRAM" if store.device.type == "cuda" else "in place of VRAM" if store.far else "in memory"
    return {
        "layers": store.layers,
        "experts": store.experts,
        "slots": store.near.count,
        "far": store.far.count if store.far else 0,
        "block": store.layout.nbytes,
        "places": [near, "in main memory", "on disk", "on its way"],
    }


def _look(ref: weakref.ref, stop: threading.Event) -> None:
    while not stop.wait(INTERVAL):
        view = ref()
        if view is None:
            return
        view.update()
        del view


def _finish(work: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if work is not threading.current_thread():
        work.join(2.0)
