"""Messages to prompt tokens and role spans, in the two formats DeepSeek published for V2.

v2-chat: V2-Chat, V2-Lite-Chat, Coder-V2-Instruct
    BOS SYS\\n\\nUser: u1\\n\\nAssistant: a1 EOS User: u2\\n\\nAssistant:
v2.5: V2.5, Coder-V2-Instruct-0724
    BOS SYS <｜User｜> u1 <｜Assistant｜> a1 EOS <｜User｜> u2 <｜Assistant｜>

There are no spaces around special tokens. Prompts are built from tokens, not from a template, so nothing that a message
says can become a special token.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from workbench.errors import RequestError
from workbench.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content, and for an assistant optionally tokens: the exact ids it was generated as

FOLLOWS = {
    "system": (None,),
    "user": (None, "system", "user", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}  # role: what it may come after


class Style(StrEnum):
    """A published prompt format."""

    V2_CHAT = "v2-chat"
    V2_5 = "v2.5"

    @property
    def leading_space(self) -> bool:
        """Whether a reply normally begins with a space that is not part of what was said.

        `Assistant:` ends without one (with it the model answers in the wrong language), so the model writes it.
        """
        return self is Style.V2_CHAT


class Span(NamedTuple):
    """The tokens [start, end) that come from one message, or from the format itself.

    role: the message's, or "template". message: its index in the list, None for the template. The EOS after a reply is
    the template's.
    """

    role: str
    start: int
    end: int
    message: int | None


class Prompt(NamedTuple):
    """Tokens, and the spans that tile them in order."""

    tokens: list[int]
    spans: list[Span]


class Part(NamedTuple):
    """A piece of a prompt: text still to be encoded, or tokens as they are; `message` None for the template."""

    content: str | list[int]
    message: int | None = None


def detect(tokenizer: Tokenizer) -> Style:
    """The format a checkpoint was trained on, read off its special tokens."""
    return Style.V2_5 if tokenizer.has("<｜User｜>") and tokenizer.has("<｜Assistant｜>") else Style.V2_CHAT


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, style: str | None = None, open_last: bool = False
) -> Prompt:
    """The prompt for `messages`, in the tokenizer's own style unless one is named.

    After a user or tool message it ends where the model is to reply. After an assistant message it is a finished
    conversation, EOS included; with `open_last` that message stays open, to be continued. A system message without text
    is left out. RequestError for a conversation that the format cannot express.
    """
    style = _style(style, tokenizer)
    _check(messages, style, open_last)
    parts = (_v2_chat if style is Style.V2_CHAT else _v2_5)(messages, tokenizer, open_last)
    return _assemble(parts, tokenizer, [message["role"] for message in messages])


def _v2_chat(messages: Sequence[Message], tokenizer: Tokenizer, open_last: bool) -> Iterator[Part]:
    yield Part([tokenizer.bos])
    for index, message in enumerate(messages):
        match message["role"]:
            case "system" if message["content"]:
                yield Part(message["content"], index)
                yield Part("\n\n")
            case "user":
                yield Part("User: ")
                yield Part(message["content"], index)
                yield Part("\n\n")
            case "assistant":
                yield Part("Assistant:")
                if message.get("tokens"):
                    yield Part(list(message["tokens"]), index)
                elif message["content"] or not open_last:
                    yield Part(" ")
                    yield Part(message["content"], index)
                if not (open_last and index == len(messages) - 1):
                    yield Part([tokenizer.eos])
    if messages[-1]["role"] != "assistant":
        yield Part("Assistant:")


def _v2_5(messages: Sequence[Message], tokenizer: Tokenizer, open_last: bool) -> Iterator[Part]:
    def special(name: str) -> Part:
        return Part([tokenizer.special(name)])

    roles = [None, *(message["role"] for message in messages), None]
    yield Part([tokenizer.bos])
    for index, message in enumerate(messages):
        before, after = roles[index], roles[index + 2]
        match message["role"]:
            case "system":
                yield Part(message["content"], index)
            case "user":
                yield special("<｜User｜>")
                yield Part(message["content"], index)
            case "assistant":
                if before != "tool":  # after a tool's output the model goes on in the same turn
                    yield special("<｜Assistant｜>")
                yield Part(list(message.get("tokens") or ()) or message["content"], index)
                if not (open_last and after is None):
                    yield Part([tokenizer.eos])
            case "tool":
                yield Part("\n") if before == "tool" else special("<｜tool▁outputs▁begin｜>")
                yield special("<｜tool▁output▁begin｜>")
                yield Part(message["content"], index)
                yield special("<｜tool▁output▁end｜>")
                if after != "tool":
                    yield special("<｜tool▁outputs▁end｜>")
    if messages[-1]["role"] == "user":
        yield special("<｜Assistant｜>")


def _assemble(parts: Iterator[Part], tokenizer: Tokenizer, roles: list[str]) -> Prompt:
    """Texts that touch are encoded as one string, as in training; a token across an edge is the message's."""
    tokens: list[int] = []
    owners: list[int | None] = []  # for each token, the message it comes from
    pending: list[Part] = []

    def encode() -> None:
        if not pending:
            return
        characters = [part.message for part in pending for _ in part.content]
        encoded, ranges = tokenizer.align("".join(part.content for part in pending))
        pending.clear()
        tokens.extend(encoded)
        for start, end in ranges:
            owners.append(next((owner for owner in characters[start:end] if owner is not None), None))

    for part in parts:
        if isinstance(part.content, str):
            pending.append(part)
        else:
            encode()
            tokens.extend(part.content)
            owners.extend([part.message] * len(part.content))
    encode()

    spans: list[Span] = []
    for position, owner in enumerate(owners):
        if spans and spans[-1].message == owner:
            spans[-1] = spans[-1]._replace(end=position + 1)
        else:
            spans.append(Span("template" if owner is None else roles[owner], position, position + 1, owner))
    return Prompt(tokens, spans)


def _style(style: str | None, tokenizer: Tokenizer) -> Style:
    if style is None:
        return detect(tokenizer)
    try:
        return Style(style)
    except ValueError as error:
        raise RequestError(f"unknown prompt style {style!r}; there are {', '.join(Style)}") from error


def _check(messages: Sequence[Message], style: Style, open_last: bool) -> None:
    """RequestError, naming the message, unless `messages` is a conversation this style can express."""
    if not messages:
        raise RequestError("the prompt is empty: give at least one user message")
    previous = None
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f'{where} must be a dict with "role" and "content"; got {message!r}')
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in FOLLOWS:
            raise RequestError(f"{where} has the unknown role {role!r}; roles are {', '.join(FOLLOWS)}")
        if not isinstance(content, str):
            raise RequestError(f"{where} ({role}): content must be a string; got {type(content).__name__}")
        if role == "user" and not content:
            raise RequestError(f"{where} (user) is empty: there is nothing to answer")
        if role == "tool" and style is Style.V2_CHAT:
            raise RequestError(f"{where}: the {style} format has no tool messages; use a V2.5 checkpoint for tools")
        if message.get("tokens") and role != "assistant":
            raise RequestError(f"{where} ({role}) has tokens; only an assistant message was generated as tokens")
        if previous not in FOLLOWS[role]:
            found, *allowed = (f"after {other}" if other else "at the start" for other in (previous, *FOLLOWS[role]))
            raise RequestError(f"{where}: {role} stands {found}; it may stand {' or '.join(allowed)}")
        previous = role
    if previous == "system":
        raise RequestError("the conversation has only a system message: add a user message")
    if open_last and previous != "assistant":
        raise RequestError(f"there is no reply to continue: the last message is {previous}, not assistant")
