"""What opens below a conversation: where each token of a reply went, one token in full, edits, two replies compared."""

import itertools
from collections.abc import Callable, Sequence
from contextvars import copy_context
from html import escape
from pathlib import Path
from time import monotonic

import ipywidgets
import numpy as np

from workbench.edits import Edit
from workbench.errors import RequestError
from workbench.session import Conversation, Event
from workbench.turns import Turn
from workbench.widgets.cachemeter import CacheMeter
from workbench.widgets.compare import SideBySide
from workbench.widgets.editing import EditControls
from workbench.widgets.geometry import Geometry
from workbench.widgets.inspection import Inspection
from workbench.widgets.inspector import TokenInspector
from workbench.widgets.memory import Memory
from workbench.widgets.opened import inspect_model
from workbench.widgets.scope import RoutingScope
from workbench.widgets.selection import Selection
from workbench.widgets.tokens import TokenStrip

INTERVAL = 1 / 6  # seconds between two messages to the scope; with all others of a panel fewer than 20 a second
SHARED = 1 / 3  # the same while the memory is open, which is told something too
SELDOM = 4  # the strip, whose text is in the chat already, is told every fourth time


class Explorer(ipywidgets.VBox):
    """Follows one conversation, showing the reply that is looked at: by default the newest.

    Closed it listens to nothing and sends nothing. `refuse` shows the reader why something cannot be done. `memory`
    opens and closes by itself, nearer to the conversation; `converted` is called after the cache was converted there.
    """

    def __init__(
        self, conversation: Conversation, refuse: Callable[[str], None], converted: Callable[[], None] = lambda: None
    ) -> None:
        self._context = copy_context()
        self.memory = Memory(conversation, converted)
        self._refuse = refuse
        self.selection = Selection()
        config = conversation.bench.config
        self._geometry = Geometry.of(config)
        self.strip = TokenStrip(selection=self.selection)
        self.scope = RoutingScope(selection=self.selection, geometry=self._geometry, label=conversation.bench.name)
        self.inspector = TokenInspector(self._inspect, self.selection, self._edit_pressed)
        self.edits = EditControls(config, conversation.edits)
        self.edits.observe_edits(self._edits_changed)
        self.again = ipywidgets.Button(
            description="Run this reply again with these edits", icon="refresh", layout={"width": "auto"},
            tooltip="Another version of the reply: same prompt, same settings, same seed",
        )  # fmt: skip
        self.again.on_click(lambda _: self._try(lambda: self.rerun(self.edits.edits)))
        self.keep = ipywidgets.Button(
            description="Save the trace", icon="save", layout={"width": "auto"},
            tooltip="Everything seen of this reply as a parquet file beside the notebook: wb.Trace.load opens it",
        )  # fmt: skip
        self.keep.on_click(lambda _: self._try(self.save))
        self._kept = ipywidgets.HTML()
        self.compared: SideBySide | None = None
        self._beside = ipywidgets.VBox()
        edits = ipywidgets.VBox([self.edits, self.again])
        self._sections = ipywidgets.Accordion(
            [self.inspector, edits, self._beside],
            titles=("One token in full", "Edits, from the next reply on", "Side by side"),
            selected_index=0,
        )
        self._sections.add_class("wbc-controls")
        below = ipywidgets.HBox([self.keep, self._kept], layout={"align_items": "center"})
        super().__init__(
            [self.strip, self.scope, below, self._sections], layout={"display": "none", "max_width": "980px"}
        )
        self.turn: Turn | None = None
        self._told: dict = {}  # tokens each view knows, with their routing
        self._times, self._last = -1, 0.0
        self._waiting: tuple[Turn, Turn] | None = None  # two replies, to be compared when the second is complete
        self._unsubscribe: Callable[[], None] = lambda: None
        self.follow(conversation)

    # What the reader does, as methods

    @property
    def opened(self) -> bool:
        return self.layout.display != "none"

    @opened.setter
    def opened(self, wanted: bool) -> None:
        if wanted != self.opened:
            self.layout.display = "" if wanted else "none"
            if wanted:
                self.show(self.turn or self._newest())
            else:
                self.selection.token = -1

    @property
    def meter(self) -> CacheMeter:
        """The cache meter of the memory section."""
        return self.memory.meter

    def show(self, turn: Turn | None) -> None:
        """Looks at this reply."""
        self.turn, self._told, self._times = turn, {}, -1
        self.selection.token = -1
        for view in (self.scope, self.strip):
            if turn is not None and turn.trace is not None:
                view.show(turn.trace)
                self._told[view] = len(turn.trace)
            else:
                self._reset(view, self._geometry)
        if turn is not None and turn.stream is not None:
            self._grow(turn)

    def look(self, turn: Turn, index: int) -> None:
        """Opens token number `index` of a reply. RequestError where there is none."""
        if turn.role != "assistant" or not 0 <= index < len(turn.steps):
            raise RequestError(f"this turn has no token {index} to look at.")
        self.opened = True
        if turn is not self.turn:
            self.show(turn)
        self.selection.token = turn.steps[index].position

    @property
    def looked(self) -> tuple[int, int] | None:
        """(key of the reply, number of its token) that is selected; None where that is no token of a reply."""
        turn = self.turn if self.opened else None
        index = self.selection.token - turn.steps[0].position if turn and turn.steps else -1
        return (turn.key, index) if turn and self.selection.token >= 0 and 0 <= index < len(turn.steps) else None

    def rerun(self, edits: Sequence[Edit]) -> Turn:
        """Another version of the reply looked at, on a model with these edits; then both side by side."""
        if self.turn is None:
            raise RequestError("there is no reply to run again: send() something first.")
        before = self.turn
        self._waiting = None
        after = self.conversation.rerun(before, edits)
        self._waiting = (before, after)
        if after.finish:  # it was complete before we could say that we wait for it
            self._show_both()
        return after

    def compare(self, before: Turn, after: Turn) -> SideBySide:
        """Shows two replies side by side. RequestError unless both are complete."""
        if before.trace is None or after.trace is None:
            raise RequestError("both replies must be complete and made in this session, with their traces.")
        if self.compared is not None:
            self.compared.leave()  # not closed: a cell may show it
        self.compared = SideBySide(before.trace, after.trace, selection=self.selection)
        self._beside.children = (self.compared,)
        self._sections.selected_index = 2
        return self.compared

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the trace of the reply looked at; by default beside the notebook, under a name that is not taken."""
        if self.turn is None or self.turn.trace is None:
            raise RequestError("there is no complete reply to save: send() something, and wait for its end.")
        if path is None:
            numbers = itertools.count(1)
            path = next(p for n in numbers if not (p := Path(f"trace-{n}.parquet")).exists())
        self.turn.trace.save(path)
        self._kept.value = f"<small>saved as <code>{escape(str(path))}</code></small>"
        return Path(path)

    def follow(self, conversation: Conversation) -> None:
        """Listens to another conversation instead, one that was imported."""
        self._unsubscribe()
        self.memory.follow(conversation)
        self.conversation, self.turn, self._waiting = conversation, None, None
        self._unsubscribe = conversation.subscribe(self.hear)
        if self.opened:
            self.show(self._newest())

    def leave(self) -> None:
        """Listens no more."""
        self.memory.leave()
        self._unsubscribe()
        self._unsubscribe = lambda: None

    # What the conversation says, in the thread of its worker

    def hear(self, event: Event) -> None:
        if event.kind == "finished" and self._waiting and event.turn is self._waiting[1]:
            self._context.copy().run(self._show_both)
        if not self.opened:
            self.turn = None if event.kind == "changed" else self.turn
            return
        self._context.copy().run(self._hear, event)

    def _hear(self, event: Event) -> None:
        if event.kind == "changed":
            if self.turn not in self.conversation.path and not self.conversation.answering:
                self.show(self._newest())
        elif event.kind == "started":
            self.show(event.turn)
        elif event.turn is self.turn:
            interval = SHARED if self.memory.opened else INTERVAL
            step = event.kind == "step" and monotonic() - self._last >= interval
            if step or (event.kind == "finished" and event.turn.trace is not None):
                self._grow(event.turn)

    def _show_both(self) -> None:
        before, after = self._waiting
        self._waiting = None
        if after.error is None and before.trace is not None and after.trace is not None:
            self.compare(before, after)

    def _newest(self) -> Turn | None:
        replies = [turn for turn in self.conversation.path if turn.role == "assistant"]
        return replies[-1] if replies else None

    def _grow(self, turn: Turn) -> None:
        """Tells the views what they do not know yet."""
        self._last, self._times = monotonic(), self._times + 1
        self._push(turn, self.scope)
        if turn.trace is not None or self._times % SELDOM == 0:
            self._push(turn, self.strip)

    def _push(self, turn: Turn, view: RoutingScope | TokenStrip) -> None:
        """New tokens, and those told before they were read, whose routing was not known then."""
        start = self._told.get(view, 0)
        if turn.trace is not None:
            tokens, parts = turn.trace.tokens.iloc[start:], (turn.trace.experts, turn.trace.gates, turn.trace.margins)
            routing = [part[start:] for part in parts]
        else:
            watched = turn.stream.watched
            tokens = watched.tokens(turn.stream.steps, start)
            routing = [part[: len(tokens)] for part in watched.routing(start)]
        slots = routing[0].shape[2]
        if view not in self._told and slots != self._geometry.k:  # an edit chooses another number of experts
            self._reset(view, Geometry.of(self.conversation.bench.config, k=slots))
        view.push(start, tokens["text"].tolist() if view is self.scope else tokens, *routing)
        read = (routing[0] >= 0).any((1, 2)) if slots and self._geometry.layers else np.ones(len(tokens), bool)
        self._told[view] = start + int(read.sum())

    def _reset(self, view: RoutingScope | TokenStrip, geometry: Geometry) -> None:
        label = [self.conversation.bench.name] if view is self.scope else []
        view.reset(geometry, *label)

    # Behind the controls

    def _inspect(self, token: int) -> Inspection:
        turn, bench = self.turn, self.conversation.bench
        trace = turn and (turn.trace or (turn.stream and turn.stream.trace()))
        if not trace or bench is None:
            raise RequestError("there is no reply with tokens to look at.")
        first = turn.steps[0].position if turn.steps else len(trace)
        record = turn.steps[token - first] if 0 <= token - first < len(turn.steps) else None
        return inspect_model(bench, trace, token, turn.edits, record and record.alternatives)

    def _edit_pressed(self, edit: Edit) -> None:
        self.rerun((*(self.turn.edits if self.turn else ()), edit))

    def _edits_changed(self, edits: tuple[Edit, ...]) -> None:
        self.conversation.edits = edits

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RequestError as error:
            self._refuse(str(error))
