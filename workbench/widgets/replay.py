"""A saved trace in the live views, without the model that made it."""

from html import escape
from typing import TYPE_CHECKING

import ipywidgets

from workbench.edits import describe, from_dict
from workbench.widgets.scope import RoutingScope
from workbench.widgets.selection import Selection
from workbench.widgets.tokens import TokenStrip

if TYPE_CHECKING:
    from workbench.trace import Trace

NOTES = ("synthetic", "foreign", "note")  # what a header may say about how far a trace is to be believed


class Replay(ipywidgets.VBox):
    """The token strip and the routing scope of a trace, with one `selection`, below a line on where it comes from."""

    def __init__(self, trace: "Trace") -> None:
        self.trace, self.selection = trace, Selection()
        self.strip = TokenStrip(trace, selection=self.selection)
        self.scope = RoutingScope(trace, selection=self.selection)
        self._about = about(trace)
        super().__init__([ipywidgets.HTML(self._about), self.strip, self.scope])

    def __repr__(self) -> str:
        return f"<Replay of {len(self.trace)} tokens, {self.trace.header.get('model')}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the still pictures of its parts."""
        strip, scope = self.strip._repr_mimebundle_(), self.scope._repr_mimebundle_()
        page = super()._repr_mimebundle_(**kwargs)
        page |= {"text/plain": repr(self), "text/html": self._about + strip["text/html"] + scope["text/html"]}
        return page | {name: scope[name] for name in ("image/png",) if name in scope}


def replay(trace: "Trace") -> Replay:
    """Shows `trace` as it was seen live; the last expression of a cell shows it."""
    return Replay(trace)


def about(trace: "Trace") -> str:
    """HTML: model, sampling, edits, and what the header says about how the trace was made."""
    header = trace.header
    sequences = len(header["sequences"])
    facts = [f"{len(trace):,} tokens" + (f" in {sequences} sequences" if sequences > 1 else "")]
    if header.get("created"):
        facts.append(f"recorded {header['created']}")
    sampling = header.get("sampling")
    if sampling:
        facts.append("sampling: " + ", ".join(f"{name} {value}" for name, value in sampling.items() if value))
    lines = [f"<b>{escape(str(header.get('model') or 'unknown model'))}</b> · {escape(' · '.join(facts))}"]
    edits = [describe(from_dict(edit)) for edit in header.get("edits") or ()]
    if edits:
        lines.append(f"<b>Edited:</b> {escape('; '.join(edits))}")
    for name in NOTES:
        if header.get(name):
            said = "" if header[name] is True else f": {header[name]}"
            lines.append(f"<b>{name.capitalize()}</b>{escape(said)}")
    return f'<div style="line-height:1.6">{"<br>".join(lines)}</div>'
