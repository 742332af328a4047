"""A conversation as text: what a saved notebook shows where widgets cannot run, and the prompt the model reads."""

from collections.abc import Sequence
from html import escape

from workbench.chat import Prompt
from workbench.tokenizer import Tokenizer
from workbench.turns import Turn

NO_PROMPT = {"tokens": 0, "parts": []}


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


def prompt_parts(prompt: Prompt, tokenizer: Tokenizer) -> dict:
    """{tokens: their number, parts: a prompt as runs of text, [role, text, whether it is one special token]}."""
    parts = []
    for span in prompt.spans:
        run = []
        for token in prompt.tokens[span.start : span.end]:
            if not tokenizer.is_special(token):
                run.append(token)
                continue
            parts += [[span.role, tokenizer.decode(run), False], [span.role, tokenizer.piece(token), True]]
            run = []
        parts.append([span.role, tokenizer.decode(run), False])
    return {"tokens": len(prompt.tokens), "parts": [part for part in parts if part[1]]}


def _speaker(name: str, turn: Turn) -> str:
    return "You" if turn.role == "user" else name
