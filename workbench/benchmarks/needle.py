"""A needle in a haystack, in the form that pocket was taught: something told early in a conversation, asked for at its
end.

The user says a number (or a name, colour, city, pet), other exchanges follow or come before, and at the end he asks for
it. The haystack is made of the curriculum's own exchanges, in English, without any others in which something is told.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch

from workbench.cache import LatentCache
from workbench.chat import detect, render
from workbench.formats import Format
from workbench.model import Model
from workbench.tokenizer import Tokenizer
from workbench.train.curriculum import LESSON, lessons
from workbench.train.facts import remembered
from workbench.train.lesson import pick

TOPICS = ("number", "name", "city", "colour", "pet")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: told in the first exchange; 1: in the one before the question
_TELLING = ("tell/", "ask/", "unknown/", "recall/", "follow/")
_CHUNK = 512  # tokens of one pass, as the engine reads a prompt

Exchange = tuple[str, str]


class Needle(NamedTuple):
    """A conversation that ends in the question, and the answer that was taught for it. `value`: its tokens in the
    answer.

    `other` is the same conversation where another value of the topic was told: what the answer is worth without its
    needle.
    """

    topic: str
    depth: float
    length: int  # tokens asked for; the conversation has as many or a few fewer
    prompt: list[int]
    other: list[int]
    answer: list[int]
    value: slice


class Found(NamedTuple):
    """nats: log-probability of the value's tokens, each given those before it. said: whether the whole answer is what
    greedy decoding would say."""

    nats: float
    said: bool


def needles(
    tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[float] = DEPTHS, count: int = 5, seed: int = 0
) -> list[Needle]:
    """`count` of every depth and length, the topics in turns; the same seed gives the same ones."""
    rng = Random(seed)
    hay = _exchanges(seed)
    made = []
    for length in lengths:
        for depth in depths:
            for number in range(count):
                made.append(_needle(rng, hay, tokenizer, TOPICS[number % len(TOPICS)], depth, length))
    return made


@torch.inference_mode()
def ask(model: Model, format: str | Format, prompt: Sequence[int], needle: Needle) -> Found:
    """What the model makes of the needle's answer after `prompt`, all of it read through a cache of that format."""
    cache = LatentCache(model.config, format=format, device=model.device)
    whole = [*prompt, *needle.answer[:-1]]
    before = len(prompt) - 1  # the last token of the prompt predicts the first of the answer
    for start in range(0, before, _CHUNK):
        model(torch.tensor([whole[start : min(start + _CHUNK, before)]]), cache, logits="last")
    predicted = model(torch.tensor([whole[before:]]), cache)[0].log_softmax(-1).cpu()
    answer = torch.tensor(needle.answer)
    nats = predicted[torch.arange(len(answer)), answer]
    return Found(float(nats[needle.value].sum()), bool((predicted.argmax(-1) == answer).all()))


def _exchanges(seed: int) -> Iterator[Exchange]:
    """What stands around needles: English, and nothing is told, asked back or referred to."""
    for conversation in lessons(seed):
        for turn in conversation.turns:
            if turn.language == "en" and not turn.subject.startswith(_TELLING) and not turn.subject.startswith("in/"):
                yield turn.user, turn.assistant


def _needle(
    rng: Random, hay: Iterator[Exchange], tokenizer: Tokenizer, topic: str, depth: float, length: int
) -> Needle:
    told, asked = LESSON["en"][f"tell/{topic}"], LESSON["en"][f"ask/{topic}"]
    value = remembered(rng, topic, "en")
    while (another := remembered(rng, topic, "en")) == value:
        pass
    pattern, said, question = pick(rng, told.asks)[1](rng), pick(rng, told.answers), pick(rng, asked.asks)[1](rng)
    template = pick(rng, asked.answers)

    def tokens(around: list[Exchange], value: str) -> list[int]:
        slots = {"v": value, "V": value[:1].upper() + value[1:]}
        tell = _sentence(pattern.format_map(slots), "."), said.format_map(slots)
        at = round(depth * len(around))
        exchanges = [*around[:at], tell, *around[at:]]
        return render([*_messages(exchanges), {"role": "user", "content": _sentence(question, "?")}], tokenizer).tokens

    space = " " if detect(tokenizer).leading_space else ""
    answer = space + template.format_map({"v": value})
    ids = [*tokenizer.encode(answer), tokenizer.eos]
    _, ranges = tokenizer.align(answer)
    start = len(space) + template.index("{v}")
    of_value = [n for n, (first, last) in enumerate(ranges) if first < start + len(value) and last > start]
    free = length - len(tokens([], value)) - len(ids)
    around: list[Exchange] = []
    for exchange in hay:
        free -= len(render(_messages([exchange]), tokenizer).tokens) - 1  # it begins a text only once
        if free < 0:
            break
        around.append(exchange)
    return Needle(
        topic, depth, length, tokens(around, value), tokens(around, another), ids, slice(of_value[0], of_value[-1] + 1)
    )


def _messages(exchanges: Sequence[Exchange]) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for each in exchanges for role, text in zip(roles, each, strict=True)]


def _sentence(text: str, mark: str) -> str:
    return text[:1].upper() + text[1:] + mark
