"""The chat panel: a conversation in the notebook, every control of which is also a method."""

import json
import weakref
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path

import anywidget
import ipywidgets
from IPython import get_ipython

from workbench.edits import Edit
from workbench.errors import RequestError, WorkbenchError
from workbench.sampling import Sampling
from workbench.session import Conversation
from workbench.turns import Turn
from workbench.widgets.controls import Controls
from workbench.widgets.explorer import Explorer
from workbench.widgets.looked import Looked
from workbench.widgets.publisher import Publisher
from workbench.widgets.status import cache_facts, held_after
from workbench.widgets.tint import tint_facts
from workbench.widgets.transcript import NO_PROMPT, as_html, as_text, prompt_parts
from workbench.workbench import Workbench

HERE = Path(__file__).parent
# one browser module, in the order of its parts: widgets have no import paths of their own
PARTS = ("markdown.js", "colours.js", "inspect.js", "tint.js", "looked.js", "message.js", "status.js", "chat.js")

_live: "weakref.WeakSet[ChatPanel]" = weakref.WeakSet()  # panels with a worker, so that a new one can end an old one


class ChatView(anywidget.AnyWidget):
    """What the browser draws. It is told everything by messages, so a saved notebook holds no history."""

    _esm = "\n".join((HERE / name).read_text(encoding="utf-8") for name in PARTS)
    _css = HERE / "chat.css"


class ChatPanel(ipywidgets.VBox):
    """Talk to `bench`. All methods return at once; `wait` is how a script waits.

    A `turn` is one of `history`, or its index there. A new panel on the same bench, or from the same cell run again,
    closes this one. While nobody displays it, the panel works all the same.
    """

    def __init__(self, bench: Workbench, system: str | None = None, sampling: Sampling | None = None) -> None:
        self._cell = _cell()
        self._context = copy_context()
        for panel in list(_live):
            if panel.conversation.bench is bench or _same_cell(panel._cell, self._cell):
                panel.retire("This panel was closed, because a newer one took its place.")
        self._name = Path(bench.name).name  # of a directory or hub id the last part
        self._view = ChatView()
        self._view.on_msg(self._hear)
        self.conversation = Conversation(bench, system, sampling)
        self.explorer = Explorer(self.conversation, self._refuse, self._cache_converted)
        self._looked = Looked(self.explorer, self._tell)
        self._publish()
        self._controls = Controls(
            self.conversation.sampling, self.system, self._sampling_changed, self._system_changed, self._refuse
        )
        super().__init__([self._view, self.explorer.memory, self.explorer, self._controls])
        _live.add(self)

    # Talking: what the buttons do

    def send(self, text: str) -> None:
        """Says `text`; the reply grows in the background. RequestError while one is still being generated."""
        self.conversation.send(text)

    def wait(self, seconds: float | None = None) -> None:
        """Until the reply is complete. Raises what went wrong in it; TimeoutError after `seconds`."""
        self.conversation.wait(seconds)

    def stop(self) -> None:
        """Ends the reply after the current token; what was said stays."""
        self.conversation.stop()

    def regenerate(self, turn: Turn | int | None = None) -> None:
        """Another version of a reply, by default the last."""
        self.conversation.regenerate(None if turn is None else self._turn(turn))

    def edit(self, turn: Turn | int, text: str) -> None:
        """Another version of one of your messages, with its own reply."""
        self.conversation.edit(self._turn(turn), text)

    def continue_(self, turn: Turn | int | None = None) -> None:
        """Goes on with a reply that was stopped or cut off, by default the last."""
        self.conversation.continue_(None if turn is None else self._turn(turn))

    def branch(self, turn: Turn | int, index: int, token: int) -> None:
        """Another version of a reply with `token` in place of its token number `index`."""
        self.conversation.branch(self._turn(turn), index, token)

    def rerun(self, edits: Sequence[Edit], turn: Turn | int | None = None) -> None:
        """Another version of a reply, by default the last: same prompt, settings and seed, on a model with these edits.
        When it is complete, `explorer.compared` shows both side by side.
        """
        if turn is not None or self.explorer.turn is None:
            self.explorer.turn = self._turn(-1 if turn is None else turn)
        self.explorer.rerun(edits)

    def look(self, turn: Turn | int, index: int) -> None:
        """Opens token number `index` of a reply in the explorer below the conversation."""
        closed = not self.exploring
        self.explorer.look(self._turn(turn), index)
        if closed:
            self._tell({"kind": "exploring", "on": True})

    @property
    def exploring(self) -> bool:
        """Whether the explorer is open: where each token went, one token in full, edits, side by side."""
        return self.explorer.opened

    @exploring.setter
    def exploring(self, wanted: bool) -> None:
        self.explorer.opened = wanted
        self._tell({"kind": "exploring", "on": wanted})

    @property
    def metering(self) -> bool:
        """Whether the memory is open: what the cache holds and in which format, memory over time, what-if."""
        return self.explorer.memory.opened

    @metering.setter
    def metering(self, wanted: bool) -> None:
        self.explorer.memory.opened = wanted
        self._tell({"kind": "exploring", "of": "memory", "on": wanted})

    @property
    def cache_format(self) -> str:
        """How the cache is stored. Another one converts what is cached; RequestError while a reply is generated."""
        return self.explorer.memory.format

    @cache_format.setter
    def cache_format(self, name: str) -> None:
        self.explorer.memory.format = name

    @property
    def edits(self) -> tuple[Edit, ...]:
        """How the model is changed, from the next reply on."""
        return self.conversation.edits

    @edits.setter
    def edits(self, edits: Sequence[Edit]) -> None:
        self.conversation.edits = edits
        self.explorer.edits.put(edits)

    def select(self, turn: Turn | int) -> None:
        """Shows this version: one of the `versions` of a turn."""
        self.conversation.select(self._turn(turn))

    def clear(self) -> None:
        """A new conversation with the same settings."""
        self.conversation.clear()

    @property
    def history(self) -> list[Turn]:
        """The visible turns, oldest first; each has `role`, `text`, and for replies `tokens`, `steps`, `stats`."""
        return self.conversation.path

    @property
    def system(self) -> str:
        """The system prompt, from the next reply on."""
        return self.conversation.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._controls.system.value = text or ""
        self.conversation.system = text

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen, from the next reply on."""
        return self.conversation.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.conversation.sampling = sampling
        self._controls.show(sampling)

    def export(self, path: str | Path | None = None) -> dict:
        """The whole conversation as JSON values, written to `path` if there is one."""
        data = self.conversation.export()
        if path is not None:
            Path(path).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return data

    def load(self, source: str | Path | dict) -> None:
        """Shows a conversation that was exported, from a file or as JSON values. RequestError leaves this one alone."""
        if not isinstance(source, dict):
            try:
                source = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"{source}: cannot be read ({error}).") from None
        self._load(source)

    def retire(self, reason: str = "This panel was closed.") -> None:
        """Ends the worker and lets the model go; what was said stays on the screen."""
        _live.discard(self)
        self.explorer.leave()
        self._looked.end()
        self.conversation.close()
        self._tell({"kind": "closed", "text": reason})

    def close(self) -> None:
        """Ends the worker and takes the panel off the screen."""
        if self in _live:
            self.retire()
        super().close()

    # Behind the buttons

    def _tell(self, message: dict) -> None:
        # ipykernel 7.4 routes what a view says next to the subshell in whose name it was last written to. A page that
        # is closed takes its subshells with it, so all is written in the name of the cell that made the panel.
        self._context.copy().run(self._view.send, message)

    def _publish(self) -> None:
        bench = self.conversation.bench
        facts = {"model": self._name, "context": bench.context} | cache_facts(bench) | tint_facts(bench.config)
        self._publisher = Publisher(self.conversation, facts, bench.tokenizer.piece, self._tell)

    def _turn(self, turn: Turn | int) -> Turn:
        if not isinstance(turn, int):
            return turn
        try:
            return self.history[turn]
        except IndexError:
            raise RequestError(f"there is no turn {turn}; the history has {len(self.history)}.") from None

    def _load(self, source: str | dict) -> None:
        if isinstance(source, str):
            try:
                source = json.loads(source)
            except json.JSONDecodeError as error:
                raise RequestError(f"this is not a conversation: it is not JSON ({error}).") from None
        old = self.conversation
        if old.bench is None:
            raise RequestError("this panel was closed; open another one with wb.chat(bench).")
        if old.answering:
            raise RequestError("still answering: stop() first, or wait().")
        self.conversation = Conversation.load(old.bench, source)
        self._publisher.unsubscribe()
        old.close()
        self.explorer.follow(self.conversation)
        self._publish()
        self._controls.show(self.sampling)
        self._controls.system.value = self.system
        self._publisher.path()

    def _hear(self, _view: ChatView, message: dict, _buffers: list) -> None:
        """Runs in the kernel's own thread: flags and queues only, never a token."""
        try:
            self._obey(message)
        except WorkbenchError as error:
            self._refuse(str(error), message.get("text") if message.get("kind") == "send" else None)

    def _obey(self, message: dict) -> None:
        talk = self.conversation
        match message:
            case {"kind": "ready", "view": str(view)}:
                self._publisher.path(view)
                if self.exploring:
                    self._tell({"kind": "exploring", "on": True})
                    self._looked.repeat()
                if self.metering:
                    self._tell({"kind": "exploring", "of": "memory", "on": True})
                if self not in _live:
                    self._tell({"kind": "closed", "text": "This panel was closed."})
            case {"kind": "send", "text": str(text)}:
                talk.send(text)
            case {"kind": "stop"}:
                talk.stop()
            case {"kind": "regenerate", "turn": int(key)}:
                talk.regenerate(talk.find(key))
            case {"kind": "edit", "turn": int(key), "text": str(text)}:
                talk.edit(talk.find(key), text)
            case {"kind": "continue", "turn": int(key)}:
                talk.continue_(talk.find(key))
            case {"kind": "branch", "turn": int(key), "index": int(index), "token": int(token)}:
                talk.branch(talk.find(key), index, token)
            case {"kind": "select", "turn": int(key)}:
                talk.select(talk.find(key))
            case {"kind": "clear"}:
                talk.clear()
            case {"kind": "explore", "on": bool(wanted)}:
                (self.explorer.memory if message.get("of") == "memory" else self.explorer).opened = wanted
            case {"kind": "look", "turn": int(key), "index": int(index)}:
                self.look(talk.find(key), index)
            case {"kind": "readings", "view": str(view), "on": bool(wanted)}:
                self._publisher.read(view, wanted)
            case {"kind": "prompt"}:
                self._tell({"kind": "prompt"} | self._prompt())
            case {"kind": "export"}:
                text = json.dumps(talk.export(), ensure_ascii=False)
                self._tell({"kind": "export", "name": f"conversation-{self._file_name()}.json", "text": text})
            case {"kind": "import", "text": str(text)}:
                self._load(text)

    def _prompt(self) -> dict:
        bench = self.conversation.bench
        return prompt_parts(self.conversation.prompt(), bench.tokenizer) if bench and self.history else NO_PROMPT

    def _file_name(self) -> str:
        return "".join(c if c.isalnum() or c in "-." else "-" for c in self._name)

    def _cache_converted(self) -> None:
        bench = self.conversation.bench
        self._publisher.facts |= cache_facts(bench) | {"cache_held": held_after(bench, self.history)}
        self._publisher.path()

    def _sampling_changed(self, sampling: Sampling) -> None:
        self.conversation.sampling = sampling

    def _system_changed(self, text: str) -> None:
        self.conversation.system = text

    def _refuse(self, text: str, draft: str | None = None) -> None:
        self._tell({"kind": "notice", "text": text, "draft": draft})

    def __repr__(self) -> str:
        return f"<ChatPanel {self._name}: {len(self.history)} turns>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run what was said up to the moment it was displayed."""
        still = {"text/plain": as_text(self._name, self.history), "text/html": as_html(self._name, self.history)}
        return super()._repr_mimebundle_(**kwargs) | still


def chat(bench: Workbench, system: str | None = None, sampling: Sampling | None = None) -> ChatPanel:
    """A panel to talk to `bench`; the last expression of a cell shows it."""
    return ChatPanel(bench, system, sampling)


def _cell() -> tuple[str, str] | None:
    """Which notebook cell is running, and in which of its runs; None outside a notebook."""
    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel else {}
    cell = parent.get("metadata", {}).get("cellId")
    return (cell, parent["header"]["msg_id"]) if cell else None


def _same_cell(old: tuple[str, str] | None, new: tuple[str, str] | None) -> bool:
    return bool(old and new) and old[0] == new[0] and old[1] != new[1]
