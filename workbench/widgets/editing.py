"""Edits built by hand: a row of fields to make one, and the list of those that are in force."""

from collections.abc import Callable, Iterable
from html import escape

import ipywidgets

from workbench.config import Config
from workbench.editing import check
from workbench.edits import PHASES, Ablate, Bias, Edit, Force, Scale, TopK, describe
from workbench.errors import RequestError
from workbench.probe import SITES, layers_with

KINDS = {
    "Ablate": "the router cannot choose these experts",
    "Force": "these experts are always among the chosen",
    "Bias": "adds to the router logit of these experts",
    "TopK": "chooses k experts",
    "Scale": "multiplies what passes a site; 0 removes it",
}
FIELDS = {
    "Ablate": ("layer", "experts"),
    "Force": ("layer", "experts", "gate"),
    "Bias": ("layer", "experts", "amount"),
    "TopK": ("layer", "k"),
    "Scale": ("site", "layer", "index", "factor"),
}
WHERE = ("phase", "positions")
EVERY = -1  # layer; None would be a dropdown in which nothing is chosen
_NARROW = {"description_width": "initial"}


class EditControls(ipywidgets.VBox):
    """The edits in force for a model of this `config`. What the buttons do is also a method: `add`, `remove`, `clear`.

    A wrong entry is answered below the fields and leaves them, and the edits, as they were.
    """

    def __init__(self, config: Config, edits: Iterable[Edit] = ()) -> None:
        self.config = config
        self._edits: tuple[Edit, ...] = ()
        self._watchers: list[Callable[[tuple[Edit, ...]], object]] = []
        self.kind = ipywidgets.Dropdown(options=list(KINDS), description="edit", style=_NARROW, layout=_wide("11em"))
        self.fields = _fields(config)
        self.add_button = ipywidgets.Button(description="Add", icon="plus", layout=_wide("6em"))
        self.clear_button = ipywidgets.Button(description="Clear", layout=_wide("6em"), tooltip="Takes all edits back")
        self.error = ipywidgets.HTML()
        self._says = ipywidgets.HTML()
        self._row = ipywidgets.HBox(layout={"flex_flow": "row wrap", "align_items": "center"})
        self._list = ipywidgets.VBox()
        self.kind.observe(lambda _: self._draw_fields(), "value")
        self.fields["site"].observe(lambda _: self._draw_layers(), "value")
        self.add_button.on_click(lambda _: self._try(self._add_typed))
        self.clear_button.on_click(lambda _: self.clear())
        super().__init__([self._row, self._says, self.error, self._list])
        self._draw_fields()
        self._draw_list()
        for edit in edits:
            self.add(edit)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Those in force, in the order they were added."""
        return self._edits

    def add(self, edit: Edit) -> None:
        """Any edit, also of a kind that has no fields here. RequestError if the model has no place for it."""
        self._add([edit])

    def put(self, edits: Iterable[Edit]) -> None:
        """These in place of all others. RequestError, and nothing changes, if the model has no place for one."""
        new = tuple(edits)
        check(new, self.config)
        self._set(new)

    def remove(self, number: int) -> None:
        """Takes back edit number `number` of `edits`."""
        if not -len(self._edits) <= number < len(self._edits):
            raise RequestError(f"there is no edit {number}; there are {len(self._edits)}, from 0.")
        left = list(self._edits)
        del left[number]
        self._set(left)

    def clear(self) -> None:
        """Takes all edits back."""
        self._set(())

    def observe_edits(self, callback: Callable[[tuple[Edit, ...]], object]) -> None:
        """From now on calls `callback(edits)` whenever they change."""
        self._watchers.append(callback)

    # Behind the fields

    def _add(self, edits: list[Edit]) -> None:
        self.put((*self._edits, *edits))

    def _set(self, edits: Iterable[Edit]) -> None:
        self.error.value = ""
        if tuple(edits) == self._edits:
            return
        self._edits = tuple(edits)
        self._draw_list()
        for callback in list(self._watchers):
            callback(self._edits)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RequestError as error:
            self.error.value = f'<span role="alert"><b>!</b> {escape(str(error))}</span>'

    def _add_typed(self) -> None:
        self._add(self._typed())

    def _typed(self) -> list[Edit]:
        """The edits the fields describe: one, or for Bias one an expert."""
        value = {name: field.value for name, field in self.fields.items()}
        where = {"phase": value["phase"] or None, "positions": _span(value["positions"])}
        layer = None if value["layer"] == EVERY else value["layer"]
        named = _experts(value["experts"], self.config.n_routed_experts or 0) if "experts" in self._shown else ()
        match self.kind.value:
            case "Ablate":
                return [Ablate(layer, named, **where)]
            case "Force":
                return [Force(layer, named, _number(value["gate"], "the gate"), **where)]
            case "Bias":
                return [Bias(layer, expert, value["amount"], **where) for expert in named]
            case "TopK":
                return [TopK(layer, value["k"], **where)]
        index = _number(value["index"], "the index")
        if index is not None and index != int(index):
            raise RequestError(f"the index must be a whole number, or empty for all; got {value['index']!r}.")
        return [Scale(value["site"], value["factor"], layer, None if index is None else int(index), **where)]

    @property
    def _shown(self) -> tuple[str, ...]:
        return FIELDS[self.kind.value]

    def _draw_fields(self) -> None:
        names = (*self._shown, *WHERE)
        self._says.value = f"<small>{escape(KINDS[self.kind.value])}</small>"
        self._draw_layers()
        self._row.children = (self.kind, *(self.fields[name] for name in names), self.add_button)

    def _draw_layers(self) -> None:
        """Every layer that has what the edit changes, and all of them at once."""
        site = self.fields["site"].value if self.kind.value == "Scale" else "moe.router_logits"
        layers = layers_with(site, self.config)
        field, chosen = self.fields["layer"], self.fields["layer"].value
        every = "every layer" if layers != [None] else "after the layers"
        field.options = [(every, EVERY), *((f"layer {layer}", layer) for layer in layers if layer is not None)]
        field.value = chosen if chosen in layers else EVERY

    def _draw_list(self) -> None:
        rows = []
        for number, edit in enumerate(self._edits):
            words = ipywidgets.Label(f"{type(edit).__name__}: {describe(edit)}", layout={"flex": "1 1 auto"})
            button = ipywidgets.Button(
                description="Remove", tooltip=f"Takes back: {describe(edit)}", layout=_wide("6em")
            )
            button.on_click(lambda _, number=number: self.remove(number))
            rows.append(ipywidgets.HBox([button, words]))
        nothing = ipywidgets.HTML("<i>No edits: the model runs as it is.</i>")
        self._list.children = (*rows, self.clear_button) if rows else (nothing,)

    def __repr__(self) -> str:
        return "\n".join(["Edits:", *(f"- {describe(edit)}" for edit in self._edits)]) if self._edits else "No edits"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the edits in words."""
        items = "".join(f"<li>{escape(describe(edit))}</li>" for edit in self._edits)
        html = f"<section><p>Edits</p><ul>{items}</ul></section>" if items else "<p>No edits.</p>"
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": repr(self), "text/html": html}


def _wide(width: str) -> dict:
    return {"width": width}


def _text(label: str, hint: str, width: str, value: str = "") -> ipywidgets.Text:
    return ipywidgets.Text(
        value=value, description=label, placeholder=hint, tooltip=hint, style=_NARROW, layout=_wide(width)
    )


def _fields(config: Config) -> dict[str, ipywidgets.DOMWidget]:
    sites = [name for name, site in SITES.items() if site.writable and layers_with(name, config)]
    count, most = config.num_experts_per_tok, config.n_routed_experts or 1
    everywhere = [("prompt and answer", ""), *((f"{phase} only", phase) for phase in PHASES)]
    number = ipywidgets.FloatText
    return {
        "layer": ipywidgets.Dropdown(description="in", style=_NARROW, layout=_wide("10em")),
        "experts": _text("experts", f"such as 3, 17 or 4-7; below {most}", "20em"),
        "gate": _text("gate", "the router's own", "12em"),
        "amount": number(value=2.0, step=0.5, description="by (logits)", style=_NARROW, layout=_wide("10em")),
        "k": ipywidgets.BoundedIntText(
            value=count, min=1, max=most, description="k", style=_NARROW, layout=_wide("7em")
        ),
        "site": ipywidgets.Dropdown(
            options=sites, value="attn.z", description="site", style=_NARROW, layout=_wide("16em")
        ),
        "index": _text("index", "all", "8em"),
        "factor": number(value=0.0, step=0.1, description="factor", style=_NARROW, layout=_wide("9em")),
        "phase": ipywidgets.Dropdown(options=everywhere, description="for", style=_NARROW, layout=_wide("15em")),
        "positions": _text("positions", "all, or from-to", "14em"),
    }


def _experts(text: str, count: int) -> tuple[int, ...]:
    """Of "3, 17, 4-7", both ends of a range included; `count` experts there are."""
    found = []
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) > int(last or first):
            raise RequestError(f"experts are whole numbers such as 3, 17 or 4-7; got {part!r}.")
        if int(last or first) >= count:
            raise RequestError(f"there is no expert {int(last or first)}; there are {count}, counted from 0.")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise RequestError("name at least one expert, such as 3, 17 or 4-7.")
    return tuple(found)


def _span(text: str) -> tuple[int, int] | None:
    """Of "3-8" (3, 9), the ends included as they are written; of "5" (5, 6); None where it is empty."""
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not first and not dash:
        return None
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise RequestError(f"positions are from-to, such as 3-8, or empty for all; got {text!r}.")
    return int(first), int(last if dash else first) + 1


def _number(text: str, what: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{what} must be a number, or empty; got {text!r}.") from None
