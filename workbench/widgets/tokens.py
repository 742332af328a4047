"""The token strip: a text in its tokens, coloured by what each cost or how sure the model was, or by who read it."""

import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import traitlets

from workbench.widgets import picture
from workbench.widgets.geometry import Geometry, last_margin
from workbench.widgets.live import LiveView, Message, following, whole
from workbench.widgets.rows import RoutingRows, Rows
from workbench.widgets.selection import Selection
from workbench.widgets.view import script

if TYPE_CHECKING:
    from workbench.trace import Trace


class Colour(NamedTuple):
    """A number that tints tokens: from none at `clear` to full at `full`; None is what 98 % of the tokens stay below.

    power: of the number between the two; 0.5 spreads out small ones
    """

    label: str
    unit: str
    clear: float | None
    full: float | None
    power: float = 1.0

    def scale(self, values: np.ndarray) -> tuple[float, float]:
        """(value without tint, value with full tint)"""
        known = values[~np.isnan(values)]
        most = float(np.quantile(known, 0.98)) if len(known) else 1.0
        return most if self.clear is None else self.clear, most if self.full is None else self.full

    def tint(self, values: np.ndarray, clear: float, full: float) -> np.ndarray:
        """Share of full tint, beyond 0 and 1 for values beyond the scale; NaN where not measured."""
        at, low, high = (np.sign(x) * np.abs(x) ** self.power for x in (values, clear, full))
        return (at - low) / (high - low) if high != low else values * 0


COLOURS = {
    "probability": Colour("probability", "under the model", 1.0, 0.0),
    "sampled": Colour("probability after sampling", "", 1.0, 0.0),
    "surprise": Colour("surprise", "nats", 0.0, None),
    "entropy": Colour("entropy", "nats", 0.0, None),
    "ms": Colour("latency", "ms", 0.0, None),
    "cache_bytes": Colour("cache", "bytes", 0.0, None),
    "margin": Colour("margin", "square root", None, 0.0, 0.5),
    "expert": Colour("expert", "", None, None),
}
MEASURED = ("logprob", "probability", "entropy", "ms", "cache_bytes")  # columns of a Trace's tokens, in wire order
PROMPT, SPECIAL = 1, 2  # flags
SIGNS = {code: chr(0x2400 + code) for code in range(32)} | str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\x7f": "␡"})
AS_TEXT, AS_PICTURE = 400, 100  # tokens in a saved notebook


class TokenStrip(LiveView):
    """The tokens of a Trace, or of an answer that grows: `reset` once, then `push`. A click selects one.

    colour_by  a name in COLOURS. Where it was not measured a token is hatched
    slot       for "expert": whose colour, 0 is the strongest
    The layer of "expert" and "margin" is the selected one, by default the first. Tokens that the selected expert read
    are underlined.
    """

    _esm = script("view.js", "routing.js", "colours.js", "tokens.js")

    colour_by = traitlets.Enum(tuple(COLOURS), "probability").tag(sync=True)
    slot = traitlets.Int(0, min=0).tag(sync=True)

    def __init__(
        self, trace: "Trace | None" = None, *, selection: Selection | None = None, geometry: Geometry | None = None
    ) -> None:
        super().__init__(selection)
        self._fill(geometry or Geometry((), 0, 0), live=True)
        self._told = self.layer, self.expert, self.slot
        self.observe(self._column_changed, ["layer", "expert", "slot"])
        if trace is not None:
            self.show(trace)

    def reset(self, geometry: Geometry | None = None) -> None:
        """Forgets all tokens and waits for an answer, of a model of another `geometry` if one is given."""
        with self._lock:
            self._fill(self.geometry if geometry is None else geometry, live=True)
            self.token = -1
            self._snapshot()

    def show(self, trace: "Trace") -> None:
        """Shows a finished trace, its sequences one below the other."""
        with self._lock:
            self._fill(Geometry.of_trace(trace), live=False)
            starts = np.flatnonzero(np.diff(trace.tokens["sequence"].to_numpy(), prepend=-1))
            numbers = trace.tokens["sequence"].to_numpy()[starts]
            labels = [str(trace.header["sequences"][n].get("label") or f"sequence {n}") for n in numbers.tolist()]
            self._breaks = list(zip(starts.tolist(), whole(labels))) if len(labels) > 1 else []
            self._write(0, trace.tokens, trace.experts, trace.gates, trace.margins)
            self._stay(len(self))
            self._snapshot()

    def push(
        self,
        first_token: int,
        tokens: pd.DataFrame | Mapping,
        experts: np.ndarray | None = None,
        gates: np.ndarray | None = None,
        margins: np.ndarray | None = None,
    ) -> None:
        """Tokens first_token, first_token + 1 ...: columns as Trace.tokens has them, of which only `text` is needed.

        experts, gates, margins  [tokens, layers, k] as in a Trace, where they are known
        One message a call. A smaller `first_token` takes back what stood from there on. RequestError for a gap.
        """
        if not isinstance(tokens, pd.DataFrame):
            tokens = pd.DataFrame(dict(tokens) | {"text": whole(tokens["text"])})
        with self._lock:
            taken_back = following(first_token, len(self)) < len(self)
            self._write(first_token, tokens, experts, gates, margins)
            if taken_back:
                self._stay(len(self))
            content, buffers = self._news(first_token)
            self._tell(content | {"kind": "tokens"}, buffers)

    def values(self, colour_by: str | None = None) -> np.ndarray:
        """[tokens] the numbers that tint them, NaN where not measured; for "expert" ids, -1 where none."""
        name = self.colour_by if colour_by is None else colour_by
        if name in ("expert", "margin"):
            chosen, margin, _ = self._column(0)
            return chosen if name == "expert" else margin
        logprob, sampled, entropy, ms, cache = self._measured.values.T
        with np.errstate(under="ignore"):
            by_name = {"probability": np.exp(logprob), "surprise": 0 - logprob}
        return by_name.get(name, {"sampled": sampled, "entropy": entropy, "ms": ms, "cache_bytes": cache}.get(name))

    def __len__(self) -> int:
        """Tokens."""
        return len(self._pieces)

    # Behind the methods

    def _fill(self, geometry: Geometry, live: bool) -> None:
        self.geometry, self._live = geometry, live
        self._breaks: list[tuple[int, str]] = []
        self._pieces: list[str] = []
        self._measured, self._ids, self._flags = Rows((5,), np.float32), Rows((), np.int32), Rows((), np.uint8)
        self._routing = RoutingRows(geometry)

    def _write(
        self,
        start: int,
        tokens: pd.DataFrame,
        experts: np.ndarray | None,
        gates: np.ndarray | None,
        margins: np.ndarray | None,
    ) -> None:
        count = len(tokens)
        arrays = self._routing.checked(count, experts=experts, gates=gates, margins=margins)
        texts = [str(text) for text in tokens["text"]]
        measured = np.array(tokens.reindex(columns=list(MEASURED)), np.float32)
        measured[measured[:, 4] < 0, 4] = math.nan  # a Trace's -1: unknown
        ids = np.asarray(tokens["id"] if "id" in tokens else np.full(count, -1), np.int32)
        prompt = np.asarray(tokens["phase"] == "prefill" if "phase" in tokens else np.zeros(count, bool))
        special = np.array([_is_special(text) for text in texts], bool)
        self._routing.write(start, arrays)
        self._measured.write(start, measured)
        self._ids.write(start, ids)
        self._flags.write(start, (PROMPT * prompt + SPECIAL * special).astype(np.uint8))
        self._pieces[start:] = whole(texts)

    def _column(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of tokens from `start` on, in the layer that is looked at: the expert of the slot, the margin, and the gate
        of the selected expert (0: not chosen)."""
        experts, margins = self._routing.experts[start:], self._routing.margins[start:]
        if not self.geometry.layers or not self.geometry.k:
            count = len(experts)
            return np.full(count, -1, np.int16), np.full(count, math.nan, np.float32), np.zeros(count, np.float32)
        row = self._row()
        slot = min(self.slot, self.geometry.k - 1)
        gates = np.where(experts[:, row] == max(0, self.expert), self._routing.gates[start:, row], 0).sum(-1)
        if self.expert < 0 or self.layer not in self.geometry.layers:
            gates = np.zeros(len(experts))
        return experts[:, row, slot], last_margin(experts[:, row], margins[:, row]), gates.astype(np.float32)

    def _row(self) -> int:
        return self.geometry.layers.index(self.layer) if self.layer in self.geometry.layers else 0

    def _column_changed(self, _change: dict) -> None:
        with self._lock:
            place = self.layer, self.expert, self.slot
            if place != self._told:
                self._told = place
                self._tell({"kind": "column"}, _bytes(*self._column(0)))

    def _news(self, start: int) -> Message:
        content = {"from": start, "pieces": self._pieces[start:]}
        rows = self._measured.values[start:], self._ids.values[start:], self._flags.values[start:]
        return content, _bytes(*rows, *self._column(start))

    def _everything(self) -> Message:
        self._told = self.layer, self.expert, self.slot
        facts = {
            "live": self._live,
            "layers": self.geometry.layers,
            "experts": self.geometry.n_experts,
            "k": self.geometry.k,
            "groups": self.geometry.n_group,
            "breaks": self._breaks,
            "colours": [{"name": name} | colour._asdict() for name, colour in COLOURS.items()],
        }
        content, buffers = self._news(0)
        return content | {"facts": facts}, buffers

    def _obey(self, message: dict) -> None:
        """Everything else the reader does is a trait."""

    def __repr__(self) -> str:
        return f"<TokenStrip: {len(self)} tokens by {self.colour_by}>"

    def _still(self) -> tuple[str, bytes | None]:
        name = "surprise" if self.colour_by == "expert" else self.colour_by  # no picture tells 160 experts apart
        colour, values = COLOURS[name], self.values(name)
        clear, full = colour.scale(values)
        title = f"{len(self)} tokens by {colour.label}" + (f" ({colour.unit})" if colour.unit else "")
        if not len(self):
            return f"<p>{escape(title)}</p>", None
        shade = colour.tint(values, clear, full).tolist()
        prompt = ((self._flags.values & PROMPT) > 0).tolist()
        pieces = [visible(piece) for piece in self._pieces]
        boxes = [_box(*each) for each in zip(pieces[:AS_TEXT], shade, values.tolist(), prompt)]
        more = f" … and {len(self) - AS_TEXT} more" if len(self) > AS_TEXT else ""
        html = f'<p>{escape(title)}</p><div style="line-height:2.1;max-width:60em">{" ".join(boxes)}{more}</div>'
        first = f", the first {AS_PICTURE}" if len(self) > AS_PICTURE else ""
        ends = f"{clear:.3g}", f"{full:.3g}"
        count = slice(AS_PICTURE)
        return html, picture.strip(pieces[count], shade[count], prompt[count], title + first, ends)


def visible(text: str) -> str:
    """A token as text in which spaces, line breaks and control characters can be seen."""
    return text.translate(SIGNS) or "∅"


def _is_special(text: str) -> bool:
    return text.startswith(("<｜", "<|")) and text.endswith(("｜>", "|>"))


def _bytes(*arrays: np.ndarray) -> list[bytes]:
    return [np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes() for array in arrays]


def _box(piece: str, shade: float, value: float, prompt: bool) -> str:
    """One token of the HTML; dashed where nothing was measured, so that it is told from a zero."""
    if math.isnan(shade):
        style, title = "border:1px dashed rgba(128,128,128,.6)", "not measured"
    else:
        tint = 0.75 * min(1.0, max(0.0, shade))
        style, title = f"border:1px solid rgba(128,128,128,.6);background:rgba(230,159,0,{tint:.2f})", f"{value:.3g}"
    text = f"<i>{escape(piece)}</i>" if prompt else escape(piece)
    return f'<code style="{style}" title="{title}">{text}</code>'
