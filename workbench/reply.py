"""One reply while it grows: its tokens, what became readable with each, why it ended, and what it cost."""

from dataclasses import dataclass, field
from time import perf_counter

import torch

from workbench.sampling import Choice, Dice, Sampling, StopStrings, sample
from workbench.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. `text` is what became readable with it: nothing while a character is incomplete.

    `seconds` is the time spent on this token, `position` its index in the context, `cache_bytes` what the cache held.
    The last step has `finish`: "eos" (its token is the end mark), "stop" (a stop string), "length" (max_tokens) or
    "context" (the window is full).
    """

    token: int
    text: str
    choice: Choice
    seconds: float
    position: int
    cache_bytes: int
    finish: str | None = None


@dataclass
class Stats:
    """What a generation cost, up to date at every step.

    Where a stop was asked for, `finish` is "stopped" and `tail` is the text that was still held back: an incomplete
    character, or what could have become a stop string.
    """

    prompt_tokens: int
    seed: int
    reused_tokens: int = 0  # of the prompt, found in the cache
    prefilled_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0
    finish: str | None = None
    tail: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; the first token belongs to the prefill. 0 until there is a second one."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else 0.0


@dataclass
class Reply:
    """What one generation must remember between tokens, alone or in a batch: so both give the same text."""

    tokenizer: Tokenizer
    tokens: list[int]  # prompt, then what was generated
    sampling: Sampling
    context: int
    strip: bool = False  # V2-Chat answers begin with a space that is not shown
    stats: Stats = field(init=False)

    def __post_init__(self):
        self.dice = Dice(self.sampling.seed)
        self.stats = Stats(len(self.tokens), self.dice.seed)
        self.decoder = self.tokenizer.stream(special=False)
        self.stops = StopStrings(self.sampling.stop)

    @property
    def longest(self) -> int:
        """Tokens it may come to, prompt included."""
        return min(self.context, self.stats.prompt_tokens + self.sampling.max_tokens)

    def next(self, logits: torch.Tensor, started: float, cache_bytes: int) -> Step:
        """Samples from logits [vocab] and says what became readable."""
        stats = self.stats
        choice = sample(logits, self.sampling, self.tokens, self.dice.roll())
        text, finish = "", None
        if choice.token == self.tokenizer.eos:
            finish = "eos"
        else:
            text, hit = self.stops.push(self.decoder.push(choice.token))
            if hit:
                finish = "stop"
        position = len(self.tokens)
        self.tokens.append(choice.token)
        if finish is None:
            if stats.tokens + 1 >= self.sampling.max_tokens:
                finish = "length"
            elif position + 1 >= self.context:
                finish = "context"
        if finish not in (None, "stop"):
            text += self.rest()
        if self.strip and text:
            text, self.strip = text.removeprefix(" "), False
        seconds = perf_counter() - started
        stats.tokens += 1
        if stats.tokens == 1:
            stats.prefill_seconds += seconds
        else:
            stats.decode_seconds += seconds
        stats.finish = finish
        return Step(choice.token, text, choice, seconds, position, cache_bytes, finish)

    def rest(self) -> str:
        """Text held back as a possible stop string or an incomplete character."""
        held, _ = self.stops.push(self.decoder.flush())
        return held + self.stops.flush()
