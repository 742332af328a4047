"""Text as the model reads it: tokens, what they cost per character, and whose words they are."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from workbench.tokenizer import Tokenizer

# control characters have pictures in Unicode; as they are, no SVG may contain them
SIGNS = {code: chr(0x2400 + code) for code in range(32)} | str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\x7f": "␡"})


def visible(piece: str) -> str:
    """A token's text with its white space and control characters shown."""
    return piece.translate(SIGNS)


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """Each token's text, white space shown; a part of a character as `<0xE4>`."""
    return [visible(tokenizer.piece(token)) for token in tokens]


def cut(tokenizer: Tokenizer, text: str) -> pd.DataFrame:
    """One row a token of plain `text`: its id, its text, and how many bytes it stands for."""
    tokens = tokenizer.encode(text)
    sizes = [len(tokenizer.bytes(token)) for token in tokens]
    return pd.DataFrame({"id": tokens, "token": pieces(tokenizer, tokens), "bytes": sizes})


def density(tokenizer: Tokenizer, texts: Mapping[str, str]) -> pd.DataFrame:
    """One row a text: characters, UTF-8 bytes, tokens, and tokens per character."""
    rows = [(len(text), len(text.encode()), len(tokenizer.encode(text))) for text in texts.values()]
    frame = pd.DataFrame(rows, columns=["characters", "bytes", "tokens"], index=pd.Index(texts, name="text"))
    frame["tokens per character"] = frame["tokens"] / frame["characters"]
    return frame


def runs(tokenizer: Tokenizer, tokens: Sequence[int], spans: Iterable[tuple]) -> pd.DataFrame:
    """One row a span of a prompt, which is (role, start, end, message): its number of tokens and its text."""
    rows = [(role, end - start, visible(tokenizer.decode(tokens[start:end]))) for role, start, end, _ in spans]
    return pd.DataFrame(rows, columns=["written by", "tokens", "text"])
