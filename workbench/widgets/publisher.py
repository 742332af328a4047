"""The publisher: views hear what they do not know yet, in few and small messages, and nothing while nothing happens."""

import math
import threading
from collections.abc import Callable
from time import monotonic

from workbench.session import Conversation, Event
from workbench.turns import Record, Tree, Turn
from workbench.widgets.tint import cache_bytes, readings

INTERVAL = 1 / 7  # seconds between two messages about steps: with those of the explorer fewer than 20 a second


class Publisher:
    """Subscribed to a conversation, it calls `send` with one of four messages.

    path      the visible path, with the turns that were not sent before; `fresh` tells views to forget all others
    steps     the steps of a reply since the last message
    done      how a reply ended
    readings  for a view that colours by it, how tokens were read; as long as one does, path and steps bring the news,
              which come a step later than the token: see tint.readings

    What is left to say is worked out from the conversation itself under one lock, so messages that cross each other
    cannot lose or repeat a step.
    """

    def __init__(
        self, conversation: Conversation, facts: dict, piece: Callable[[int], str], send: Callable[[dict], None]
    ) -> None:
        self.conversation, self.facts, self.piece, self.send = conversation, facts, piece, send
        self._lock = threading.RLock()
        self._tree: Tree | None = None
        self._sent: dict[int, int] = {}  # turn key -> steps the views know
        self._figures: dict = {}  # what they know of the reply being generated
        self._readers: set[str] = set()  # views that want readings
        self._read: dict[int, int] = {}  # turn key -> tokens whose readings they know
        self._last = 0.0
        self.unsubscribe = conversation.subscribe(self.hear)

    def hear(self, event: Event) -> None:
        with self._lock:
            if event.kind == "changed":
                if event.turn:
                    self._sent.pop(event.turn.key, None)
                self.path()
            elif event.kind == "step" and monotonic() - self._last >= INTERVAL:
                self.steps(event.turn)
            elif event.kind == "finished":
                self.steps(event.turn)
                self.send({"kind": "done"} | _ending(event.turn))

    def path(self, view: str | None = None) -> None:
        """For one new `view` everything that is visible, for all of them what is new."""
        conversation = self.conversation
        with self._lock, conversation.lock:
            fresh = view is not None or self._tree is not conversation.tree
            if fresh:
                self._tree, self._sent = conversation.tree, {}
                self._readers.clear()  # those that still want readings say so
            path, answering = conversation.tree.path(), conversation.answering
            if answering and answering.finish:  # its end is being announced
                answering = None
            unknown = [turn for turn in path if turn.key not in self._sent or turn is answering]
            self._sent |= {turn.key: len(turn.steps) for turn in unknown}
            self._figures = {}
            for turn in unknown:
                self._read.pop(turn.key, None)
            self.send(
                {
                    "kind": "path",
                    "view": view,
                    "fresh": fresh,
                    "facts": self.facts,
                    "path": [_place(turn) for turn in path],
                    "turns": [self._turn(turn) for turn in unknown],
                    "answering": answering.key if answering else None,
                    "readings": self._readings(path),
                }
            )

    def read(self, view: str, wanted: bool) -> None:
        """From now on `view` is told how tokens were read, beginning with all that are visible; or no more."""
        with self._lock, self.conversation.lock:
            self._readers.discard(view)
            if wanted:
                self._readers.add(view)
                self._read = {}
                self.send({"kind": "readings", "readings": self._readings(self.conversation.tree.path())})

    def steps(self, turn: Turn) -> None:
        with self._lock, self.conversation.lock:
            start = self._sent.get(turn.key, 0)
            if start == len(turn.steps):
                return
            rows = self._rows(turn, start)
            figures = {name: _short(value) for name, value in turn.stats.items()}
            news = dict(figures.items() - self._figures.items())
            self._figures, self._last = figures, monotonic()
            self._sent[turn.key] = len(turn.steps)
            self.send(
                {
                    "kind": "steps",
                    "turn": turn.key,
                    "from": start,
                    "steps": rows,
                    "stats": news,
                    "readings": self._readings([turn]),
                }
            )

    def _turn(self, turn: Turn) -> dict:
        if turn.role == "user":
            return {"key": turn.key, "role": turn.role, "text": turn.content}
        return _ending(turn) | {"key": turn.key, "role": turn.role, "steps": self._rows(turn, 0)}

    def _readings(self, turns: list[Turn]) -> list[dict]:
        """What views that want them do not know yet."""
        if not self._readers:
            return []
        found = [readings(turn, self._read.get(turn.key, 0), self.facts["experts"]) for turn in turns]
        news = [part for part in found if part]
        self._read |= {part["turn"]: part["to"] for part in news}
        return news

    def _rows(self, turn: Turn, start: int) -> list[list]:
        held = cache_bytes(turn, start)
        return [self._row(record, bytes_held) for record, bytes_held in zip(turn.steps[start:], held, strict=True)]

    def _row(self, record: Record, held: int | None) -> list:
        alternatives = [[a.token, self.piece(a.token), _short(a.before), _short(a.after)] for a in record.alternatives]
        model = None if record.logprob is None else math.exp(record.logprob)
        return [
            record.token, record.text, _short(model), _short(record.probability), _short(record.entropy),
            alternatives, int(record.by_hand), None if record.by_hand else _short(1000 * record.seconds), held,
        ]  # fmt: skip


def _place(turn: Turn) -> list:
    """[key, which version it is, how many there are, key of the version before, key of the one after]"""
    versions = turn.versions
    at = versions.index(turn)
    before = versions[at - 1].key if at else None
    after = versions[at + 1].key if at + 1 < len(versions) else None
    return [turn.key, at, len(versions), before, after]


def _ending(turn: Turn) -> dict:
    stats = {name: _short(value) for name, value in turn.stats.items()}
    return {"turn": turn.key, "finish": turn.finish, "error": turn.error, "stats": stats}


def _short(value: float | None) -> float | str | None:
    """Four digits are more than the eye reads. JSON has no NaN, and JavaScript no integer beyond 2^53."""
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
