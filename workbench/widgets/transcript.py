"""A conversation that needs no browser code: what a saved notebook shows where widgets cannot run."""

from collections.abc import Sequence
from html import escape

from workbench.turns import Turn


def as_text(name: str, turns: Sequence[Turn]) -> str:
    lines = [f"Chat with {name}"]
    for turn in turns:
        lines.append(f"{_speaker(name, turn)}: {turn.content}")
        if turn.error:
            lines.append(f"! {turn.error}")
    return "\n".join(lines)


def as_html(name: str, turns: Sequence[Turn]) -> str:
    """Every character of the conversation escaped, no styles beyond what GitHub keeps."""
    rows = []
    for turn in turns:
        said = escape(turn.content).replace("\n", "<br>")
        if turn.error:
            said += f"<br><em>{escape(turn.error)}</em>"
        rows.append(f"<dt><strong>{escape(_speaker(name, turn))}</strong></dt><dd>{said}</dd>")
    body = "".join(rows) or "<dt>Nothing said yet.</dt>"
    return f"<section><p>Chat with {escape(name)}</p><dl>{body}</dl></section>"


def _speaker(name: str, turn: Turn) -> str:
    return "You" if turn.role == "user" else name
