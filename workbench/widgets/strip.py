"""Text as a strip of tokens: every piece in its own box, shaded by a number where there is one."""

from collections.abc import Sequence
from html import escape

from workbench.errors import RequestError


class Strip:
    """`pieces` in order. `shade`: for each piece a number from 0 (clear) to 1 (full colour), named `label` on hover.

    On GitHub, which drops colours, the boxes remain.
    """

    def __init__(self, pieces: Sequence[str], shade: Sequence[float] | None = None, label: str = "") -> None:
        if shade is not None and len(shade) != len(pieces):
            raise RequestError(f"{len(pieces)} pieces need as many shades; got {len(shade)}.")
        self.pieces, self.shade, self.label = list(pieces), None if shade is None else list(shade), label

    def __repr__(self) -> str:
        return " | ".join(self.pieces)

    def _repr_html_(self) -> str:
        style = "padding:1px 3px;border:1px solid rgba(128,128,128,.6);border-radius:3px;color:inherit;"
        boxes = []
        for index, piece in enumerate(self.pieces):
            colour, title = "background:transparent", ""
            if self.shade is not None:
                value = min(1.0, max(0.0, self.shade[index]))
                colour = f"background:rgba(230,159,0,{0.75 * value:.2f})"  # orange is told apart by every kind of eye
                title = f' title="{escape(self.label)} {self.shade[index]:.3f}"'
            boxes.append(f'<code style="{style}{colour}"{title}>{escape(piece)}</code>')
        return f'<div style="line-height:2.1;max-width:60em">{" ".join(boxes)}</div>'
