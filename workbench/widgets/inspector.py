"""The token inspector: one token opened, layer by layer, with a button for every change of its routing."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from workbench.edits import Ablate, Bias, Edit, Force, describe
from workbench.errors import RequestError, WorkbenchError
from workbench.widgets import picture
from workbench.widgets.inspection import Inspection, RoutedLayer, as_html, as_text
from workbench.widgets.live import whole
from workbench.widgets.view import View, script, short

if TYPE_CHECKING:
    from workbench.widgets.selection import Selection

NOBODY = -1  # in a Selection: no token, layer or expert


class TokenInspector(View):
    """Shows an Inspection. `source` gives that of a token by its number; `on_edit` gets an edit of each press.

    Linked to a `selection`, it opens the token chosen there, and writes there what is looked at. What a click or the
    selection asks for is fetched in a thread of its own, only the newest token if several are asked for, so a slow
    source holds up neither the page nor the kernel: `wait` is how a script waits for it.
    """

    _esm = script("view.js", "router.js", "inspector.js")
    _css = script("view.css", "inspector.css")

    selection: "Selection | None" = None  # also while a refused one is thrown away

    def __init__(
        self,
        source: Callable[[int], Inspection] | None = None,
        selection: "Selection | None" = None,
        on_edit: Callable[[Edit], object] | None = None,
    ) -> None:
        self.source, self.selection, self.on_edit = source, selection, on_edit
        self.inspection: Inspection | None = None
        self.layer, self.expert = NOBODY, NOBODY
        self._newest = _Newest(self._fetch)
        super().__init__()
        if selection is not None:
            selection.observe(self._selected, ["token", "layer", "expert"])
            if selection.token != NOBODY and source is not None:
                self.open(selection.token)

    # What the reader does, as methods

    def open(self, token: int | None = None) -> Inspection | None:
        """Asks the source for token number `token` and shows it. RequestError if there is no such token."""
        if token is None:  # how ipywidgets opens the wire of a widget when it is made
            return super().open()
        if self.source is None:
            raise RequestError("this inspector has no source of tokens; give it one, or show(inspection).")
        inspection = self.source(token)
        self.show(inspection)
        if self.selection is not None:
            self.selection.token = token
        return inspection

    def show(self, inspection: Inspection) -> None:
        """Shows what is known of a token, in the same layer as the one before if it was recorded."""
        self.inspection = inspection
        layers = [each.layer for each in inspection.layers]
        wished = self.selection.layer if self.selection is not None else NOBODY
        if self.layer not in layers:
            self.layer = wished if wished in layers else layers[0] if layers else NOBODY
        self._snapshot()

    def choose(self, layer: int, expert: int = NOBODY) -> None:
        """Looks at this layer, and there at this expert. RequestError for what the token does not have."""
        self._choose(layer, expert)

    def edit(self, kind: str, expert: int, amount: float = 0.0, here: bool = False) -> Edit:
        """Hands `on_edit` what a button asks for: "ablate", "force" or "bias" (by `amount`) in the layer looked at.

        here: only where this token stands, instead of everywhere.
        """
        if self.on_edit is None:
            raise RequestError("nothing can be edited here: make the inspector with on_edit=.")
        if self.inspection is None or self.layer == NOBODY:
            raise RequestError("open a token first: its layer is the one that is edited.")
        self._check(self.layer, expert)
        at = self.inspection.position
        where = {"positions": (at, at + 1)} if here else {}
        match kind:
            case "ablate":
                edit = Ablate(self.layer, (expert,), **where)
            case "force":
                edit = Force(self.layer, (expert,), **where)
            case "bias":
                edit = Bias(self.layer, expert, amount, **where)
            case _:
                raise RequestError(f"kind must be 'ablate', 'force' or 'bias'; got {kind!r}.")
        self.on_edit(edit)
        self._tell({"kind": "edited", "text": describe(edit)})
        return edit

    def wait(self, seconds: float | None = None) -> None:
        """Until what was last asked for is shown or refused. TimeoutError after `seconds`."""
        self._newest.wait(seconds)

    def close(self) -> None:
        """Takes the inspector off the screen and off its selection."""
        if self.selection is not None:
            self.selection.unobserve(self._selected, ["token", "layer", "expert"])
            self.selection = None
        super().close()

    # Behind the buttons

    def _obey(self, message: dict) -> None:
        match message:
            case {"kind": "open", "token": int(token)} if self.source is not None:
                self._newest.ask(token)
            case {"kind": "choose", "layer": int(layer), "expert": int(expert), "view": str(view)}:
                self._choose(layer, expert, view)
            case {"kind": "edit", "edit": str(kind), "expert": int(expert), "layer": int(layer)}:
                self._choose(layer, expert, message.get("view"))
                self.edit(kind, expert, message.get("amount", 0.0), message.get("here") is True)

    def _fetch(self, token: int) -> None:
        chosen = None if self.selection is None else self.selection.token
        try:
            self.show(self.source(token))
        except WorkbenchError as error:
            self._refuse(error)
        else:
            if chosen is not None and chosen == self.selection.token:  # or somebody went on while it was fetched
                self.selection.token = token

    def _choose(self, layer: int, expert: int, view: str | None = None) -> None:
        self._check(layer, expert)
        self.layer, self.expert = layer, expert
        self._tell({"kind": "chosen", "layer": layer, "expert": expert, "view": view})
        if self.selection is not None:
            with self.selection.hold_trait_notifications():
                self.selection.layer, self.selection.expert = layer, expert

    def _check(self, layer: int, expert: int) -> None:
        if self.inspection is None:
            raise RequestError("open a token first.")
        self.inspection.layer(layer)
        if not NOBODY <= expert < self.inspection.n_experts:
            raise RequestError(f"there is no expert {expert}; the model has {self.inspection.n_experts}, from 0.")

    def _selected(self, change: dict) -> None:
        chosen = self.selection
        if change["name"] == "token":
            if self.source is not None and chosen.token not in (NOBODY, self._token):
                self._newest.ask(chosen.token)
        elif self.inspection is not None and (chosen.layer, chosen.expert) != (self.layer, self.expert):
            known = {each.layer for each in self.inspection.layers}
            if chosen.layer in known:
                self._choose(chosen.layer, min(chosen.expert, self.inspection.n_experts - 1))

    @property
    def _token(self) -> int:
        return NOBODY if self.inspection is None else self.inspection.token

    def _snapshot(self, view: str | None = None) -> None:
        if self.inspection is None:
            return self._tell({"kind": "show", "view": view, "inspection": None})
        message = {
            "kind": "show",
            "view": view,
            "inspection": _message(self.inspection),
            "layer": self.layer,
            "expert": self.expert,
            "editable": self.on_edit is not None,
            "browsable": self.source is not None,
        }
        self._tell(message, [_scores(self.inspection)])

    def __repr__(self) -> str:
        if self.inspection is None:
            return "<TokenInspector: no token is open>"
        return f"<TokenInspector: token {self._token}, {self.inspection.text!r}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return self._page(as_text(self.inspection), as_html(self.inspection), _picture(self.inspection), **kwargs)


class _Newest:
    """Does only the newest of what it is asked for, one at a time, in a thread that lives while there is work."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self._work, self._lock = work, threading.Lock()
        self._asked: int | None = None
        self._thread: threading.Thread | None = None

    def ask(self, request: int) -> None:
        with self._lock:
            self._asked = request
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="inspector", daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                raise TimeoutError(f"no token came within {seconds} s")

    def _run(self) -> None:
        while True:
            with self._lock:
                request, self._asked = self._asked, None
                if request is None:
                    self._thread = None
                    return
            self._work(request)


def _message(seen: Inspection) -> dict:
    facts = "token position id phase n_experts n_group topk_group edits model"
    texts, measured = ("text", "before", "after"), ("logprob", "probability", "entropy", "ms")
    rows = seen.alternatives
    if rows is not None:
        texts_of = whole(row.text for row in rows)
        rows = [[row.id, text, short(row.before), short(row.after)] for row, text in zip(rows, texts_of)]
    return {
        **{name: getattr(seen, name) for name in facts.split()},
        **dict(zip(texts, whole(getattr(seen, name) for name in texts))),
        **{name: short(getattr(seen, name)) for name in measured},
        "alternatives": rows,
        "how": dict(seen.how),
        "layers": [_layer(each) for each in seen.layers],
    }


def _layer(layer: RoutedLayer) -> dict:
    lens = layer.lens and {
        expert: list(zip(whole(word.text for word in words), (short(word.logit) for word in words)))
        for expert, words in layer.lens.items()
    }
    return {
        "layer": layer.layer,
        "experts": layer.experts,
        "gates": [short(gate) for gate in layer.gates],
        "margins": [short(margin) for margin in layer.margins],
        "scored": layer.scores is not None,
        "kept": layer.groups_kept,
        "routed": short(layer.routed_norm),
        "shared": short(layer.shared_norm),
        "cosine": short(layer.cosine),
        "lens": lens,
    }


def _scores(seen: Inspection) -> bytes:
    """float32 [layers, experts], NaN where a layer has none: as JSON the scores of V2 would be twice as long."""
    scores = np.full((len(seen.layers), seen.n_experts), np.nan, "<f4")
    for place, layer in enumerate(seen.layers):
        if layer.scores is not None:
            scores[place] = layer.scores
    return scores.tobytes()


def _picture(seen: Inspection | None) -> bytes | None:
    """PNG of the gates in all layers."""
    if seen is None or not seen.layers:
        return None
    gates = np.zeros((len(seen.layers), seen.n_experts))
    for place, layer in enumerate(seen.layers):
        gates[place, list(layer.experts)] = layer.gates
    title = f"{seen.text!r}, position {seen.position}: gates of the experts that read it"
    return picture.heat(gates, [layer.layer for layer in seen.layers], seen.n_group, title, "gate")
