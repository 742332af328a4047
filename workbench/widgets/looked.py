"""Which token of a reply the explorer looks at, told to the chat when it changes."""

import threading
from collections.abc import Callable
from time import monotonic

from workbench.widgets.explorer import Explorer

INTERVAL = 0.2  # seconds between two messages: who scrubs passes many tokens, and the last one counts


class Looked:
    """Calls `send` with {"kind": "looked", turn, index}: the key of a reply and the number of its token; None: none.

    One message a change: at once, or where changes come faster than that, after INTERVAL the last of them.
    """

    def __init__(self, explorer: Explorer, send: Callable[[dict], None]) -> None:
        self.explorer, self.send = explorer, send
        self._lock = threading.Lock()
        self._told: tuple[int, int] | None = None
        self._next = 0.0
        self._timer: threading.Timer | None = None
        explorer.selection.observe(self._changed, "token")
        explorer.layout.observe(self._changed, "display")

    def repeat(self) -> None:
        """Tells it again, for a view that is new."""
        with self._lock:
            if self._told:
                self._say()

    def end(self) -> None:
        self.explorer.selection.unobserve(self._changed, "token")
        self.explorer.layout.unobserve(self._changed, "display")
        with self._lock:
            if self._timer:
                self._timer.cancel()

    def _changed(self, _change: dict) -> None:
        with self._lock:
            wait = self._next - monotonic()
            if self._timer:
                return
            if wait <= 0:
                self._tell()
            else:
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            self._tell()

    def _tell(self) -> None:
        looked = self.explorer.looked
        if looked != self._told:
            self._told, self._next = looked, monotonic() + INTERVAL
            self._say()

    def _say(self) -> None:
        turn, index = self._told or (None, None)
        self.send({"kind": "looked", "turn": turn, "index": index})
