"""Text to tokens and back, by the checkpoint's own tokenizer.json; text never becomes a special token."""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from workbench.errors import CheckpointError, RequestError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a vocabulary: itself if printable, else one from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer from a checkpoint directory or a `tokenizer.json`.

    CheckpointError if the file is missing, unreadable, or of another kind.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        self._tokenizer = _read_tokenizer(self.path)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.bos = self._named("bos_token", BOS)
        self.eos = self._named("eos_token", EOS)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, without BOS; special strings stay text. RequestError for half a surrogate pair."""
        return self.align(text)[0]

    def align(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of plain text, and for each the characters [start, end) of `text` it stands for.

        The tokens that share one character all carry that character's range.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has half a surrogate pair ({text[error.start]!r}) at character {error.start}: "
                "remove or replace that character"
            ) from error
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: Iterable[int], special: bool = True) -> str:
        """Text of `tokens`; bytes that form no character become U+FFFD, ids without a token (padding) nothing."""
        decoder = self.stream(special)
        return "".join([decoder.push(token) for token in tokens]) + decoder.flush()

    def stream(self, special: bool = True) -> "Decoder":
        """A decoder for one generation; with `special` false, special tokens give no text."""
        return Decoder(self, special)

    def special(self, text: str) -> int:
        """Id of the special token written `text`. CheckpointError if the tokenizer has none of that name."""
        if not self.has(text):
            known = " ".join(token.content for _, token in sorted(self._added.items()) if token.special)
            raise CheckpointError(f"{self.path}: no special token {text!r}. It has: {known or 'none'}")
        return self._tokenizer.token_to_id(text)

    def has(self, text: str) -> bool:
        """Whether `text` is a special token."""
        token = self._tokenizer.token_to_id(text)
        return token is not None and self.is_special(token)

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token].special

    def piece(self, token: int) -> str:
        """One token for display: incomplete characters as `<0xE4>`, an id without a token as `<unused 102000>`."""
        text = self.bytes(token).decode("utf-8", "surrogateescape")  # byte b that is no character: U+DC00 + b
        shown = "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)
        return shown or f"<unused {token}>"

    def bytes(self, token: int) -> bytes:
        """The bytes one token stands for; none if no token has this id."""
        if token in self._added:
            return self._added[token].content.encode()  # as written: "ü" may be an added token, and is then no byte
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        try:
            return bytes([ALPHABET[character] for character in piece])
        except KeyError:
            return piece.encode()

    def _named(self, role: str, usual: str) -> int:
        """The id for `role` from tokenizer_config.json, else from config.json, else the `usual` token."""
        beside = self.path.parent
        if (beside / "tokenizer_config.json").exists():
            name = _read_json(beside / "tokenizer_config.json").get(role)
            if name:
                return self.special(name["content"] if isinstance(name, dict) else name)
        if (beside / "config.json").exists():
            token = _read_json(beside / "config.json").get(f"{role}_id")
            if token is not None:
                return token[0] if isinstance(token, list) else token
        return self.special(usual)


class Decoder:
    """Turns tokens into text as they come: only whole characters, nothing lost, nothing taken back.

    All `push` and the `flush` together give exactly `Tokenizer.decode` of the same tokens.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = True):
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters this token completes, often none for a part of a Chinese character or an emoji.

        U+FFFD comes as soon as the bytes held back can no longer become a character.
        """
        if not self._special and self._tokenizer.is_special(token):
            return ""
        return self._utf8.decode(self._tokenizer.bytes(token))

    def flush(self) -> str:
        """End of the text: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _is_control(text: str) -> bool:
    return text.startswith(("<｜", "<|")) and text.endswith(("｜>", "|>"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). A checkpoint needs this file") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy the file from the checkpoint again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer, told to leave special strings in text alone."""
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error}). Copy the file from the checkpoint again") from error
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise CheckpointError(
            f"{path}: not a byte-level BPE tokenizer. Use the tokenizer.json published with the checkpoint"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets keep the leading space of a word
    # some published files leave control tokens unmarked; marked, all of them are skipped when text is encoded
    controls = [token for token in tokenizer.get_added_tokens_decoder().values() if _is_control(token.content)]
    for token in controls:
        token.special = True
    tokenizer.add_special_tokens(controls)
    tokenizer.encode_special_tokens = True  # the library's name for: do not look for special tokens in text
    return tokenizer
