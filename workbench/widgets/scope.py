"""The routing scope: which experts of every layer read a token, by what margin, and the heat of the whole answer."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import traitlets

from workbench.errors import RequestError
from workbench.widgets import picture
from workbench.widgets.geometry import Geometry, last_margin
from workbench.widgets.live import LiveView, Message, following, whole
from workbench.widgets.rows import RoutingRows
from workbench.widgets.selection import Selection
from workbench.widgets.view import script

if TYPE_CHECKING:
    from workbench.trace import Trace

NO_MARGIN = -128  # int8


class RoutingScope(LiveView):
    """Layers down, experts across. Shows a Trace, or an answer that grows: `reset` once, then `push`.

    mode   "token": what the token chose, brighter for larger gates · "answer": how often each expert was chosen
    by     what the heat of the answer counts: "count" of tokens, or the sum of their "gate"s

    The browser gets gates and margins in 8 bits each and asks for the exact ones of the token it stays at.
    """

    _esm = script("view.js", "routing.js", "answer.js", "grid.js", "scope.js")

    mode = traitlets.Enum(("token", "answer"), "token").tag(sync=True)
    by = traitlets.Enum(("count", "gate"), "count").tag(sync=True)

    def __init__(
        self,
        trace: "Trace | None" = None,
        *,
        selection: Selection | None = None,
        geometry: Geometry | None = None,
        label: str = "",
    ) -> None:
        super().__init__(selection)
        self._fill(geometry or Geometry((), 0, 0), label, live=True)
        if trace is not None:
            self.show(trace)

    def reset(self, geometry: Geometry, label: str = "") -> None:
        """Forgets all tokens and waits for an answer of a model of this geometry; `label` is its name."""
        with self._lock:
            self._fill(geometry, label, live=True)
            self.token = -1
            self._snapshot()

    def show(self, trace: "Trace") -> None:
        """Shows a finished trace."""
        with self._lock:
            self._fill(Geometry.of_trace(trace), trace.header.get("model") or "", live=False)
            self._write(0, trace.tokens["text"].tolist(), trace.experts, trace.gates, trace.margins)
            self._stay(len(self))
            self._snapshot()

    def push(
        self, first_token: int, pieces: Sequence[str], experts: np.ndarray, gates: np.ndarray, margins: np.ndarray
    ) -> None:
        """Tokens first_token, first_token + 1 ...: their texts, and [tokens, layers, k] as in a Trace.

        `first_token` is how many were pushed before; a smaller one takes back what stood from there on. One message a
        call, so collect what came since the last screen. RequestError for a gap or a wrong shape.
        """
        with self._lock:
            taken_back = following(first_token, len(self)) < len(self)
            self._write(first_token, pieces, experts, gates, margins)
            if taken_back:
                self._stay(len(self))
            content, buffers = self._news(first_token)
            self._tell(content | {"kind": "tokens"}, buffers)

    def table(self, token: int | None = None) -> pd.DataFrame:
        """The choices of one token, by default the one that is shown: layer, slot, expert, gate, margin."""
        token = self._shown() if token is None else token
        if not 0 <= token < len(self):
            raise RequestError(f"no token {token}: there are {len(self)}, numbered from 0.")
        experts = self._routing.experts[token]
        row, slot = np.nonzero(experts >= 0)
        used = row, slot
        return pd.DataFrame(
            {
                "layer": np.array(self.geometry.layers, np.int32)[row],
                "slot": slot.astype(np.int8),
                "expert": experts[used],
                "gate": self._routing.gates[token][used],
                "margin": self._routing.margins[token][used],
            }
        )

    def heat(self, by: str | None = None) -> pd.DataFrame:
        """Layers down, experts across: by how many tokens each was chosen, or with "gate" the sum of their gates."""
        by = self.by if by is None else by
        experts = self._routing.experts
        _, row, _ = np.nonzero(experts >= 0)
        used = experts >= 0
        flat = row * self.geometry.n_experts + experts[used]
        shape = len(self.geometry.layers), self.geometry.n_experts
        weights = self._routing.gates[used] if by == "gate" else None
        values = np.bincount(flat, weights, shape[0] * shape[1]).reshape(shape)
        return pd.DataFrame(
            values, pd.Index(self.geometry.layers, name="layer"), pd.RangeIndex(shape[1], name="expert")
        )

    def load(self) -> pd.DataFrame:
        """A row a layer: its busiest expert, how often that was chosen, that over the mean, and how many never were."""
        counts = self.heat("count")
        mean = counts.mean(axis=1)
        return pd.DataFrame(
            {
                "busiest expert": counts.idxmax(axis=1),
                "chosen by tokens": counts.max(axis=1),
                "busiest / mean": counts.max(axis=1) / mean.where(mean > 0),
                "never chosen": (counts == 0).sum(axis=1),
            }
        )

    def __len__(self) -> int:
        """Tokens."""
        return len(self._routing)

    # Behind the methods

    def _fill(self, geometry: Geometry, label: str, live: bool) -> None:
        self.geometry, self.label, self._live = geometry, label, live
        self._pieces: list[str] = []
        self._routing = RoutingRows(geometry)

    def _write(
        self, start: int, pieces: Sequence[str], experts: np.ndarray, gates: np.ndarray, margins: np.ndarray
    ) -> None:
        arrays = self._routing.checked(len(pieces), experts=experts, gates=gates, margins=margins)
        self._routing.write(start, arrays)
        self._pieces[start:] = whole(pieces)

    def _shown(self) -> int:
        if 0 <= self.token < len(self):
            return self.token
        read = np.flatnonzero((self._routing.experts >= 0).any((1, 2)))
        return int(read[-1]) if len(read) else len(self) - 1

    def _news(self, start: int) -> Message:
        """Tokens from `start` on. See `decode` in scope.js, which reads this."""
        experts, gates = self._routing.experts[start:], self._routing.gates[start:]
        kind = "<u1" if self.geometry.n_experts <= 255 else "<u2"
        ids = np.where(experts >= 0, experts, np.iinfo(kind).max).astype(kind)
        scale = float(gates.max(initial=0)) or 1.0
        margins = last_margin(experts, self._routing.margins[start:])
        coded = np.sign(margins) * np.round(127 * np.sqrt(np.minimum(np.abs(margins), 1)))
        buffers = [
            ids.tobytes(),
            np.round(255 * np.sqrt(np.clip(gates / scale, 0, 1))).astype(np.uint8).tobytes(),
            np.where(np.isnan(margins), NO_MARGIN, coded).astype(np.int8).tobytes(),
        ]
        return {"from": start, "pieces": self._pieces[start:], "scale": scale}, buffers

    def _everything(self) -> Message:
        geometry = self.geometry
        facts = {
            "label": self.label,
            "about": str(geometry),
            "live": self._live,
            "layers": geometry.layers,
            "experts": geometry.n_experts,
            "k": geometry.k,
            "groups": geometry.n_group,
            "kept": geometry.topk_group,
        }
        content, buffers = self._news(0)
        return content | {"facts": facts}, buffers

    def _obey(self, message: dict) -> None:
        match message:
            case {"kind": "exact", "token": int(token)} if 0 <= token < len(self):
                with self._lock:
                    buffers = [self._routing.gates[token].tobytes(), self._routing.margins[token].tobytes()]
                    self._tell({"kind": "exact", "token": token}, buffers)

    def __repr__(self) -> str:
        return f"<RoutingScope {self.label}: {self.geometry}, {len(self)} tokens>"

    def _still(self) -> tuple[str, bytes | None]:
        said = f"Routing of {len(self)} tokens" + (f", {self.label}" if self.label else "")
        caption = f"<p>{escape(said)}: {escape(str(self.geometry))}</p>"
        if not len(self) or not self.geometry.layers:
            return caption, None
        unit = "tokens" if self.by == "count" else "sum of gates"
        title = f"{said}: how often each expert was chosen" + (", by gate" if self.by == "gate" else "")
        png = picture.heat(self.heat().to_numpy(), self.geometry.layers, self.geometry.n_group, title, unit)
        return caption + self.load().to_html(float_format="{:.3g}".format), png
