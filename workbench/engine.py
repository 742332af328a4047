"""The engine: one conversation streamed token by token, or many prompts in a batch; the same sampling either way."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from workbench.cache import LatentCache
from workbench.chat import Prompt, Span, detect, render
from workbench.errors import RequestError
from workbench.model import Model
from workbench.sampling import Choice, Dice, Sampling, StopStrings, sample
from workbench.tokenizer import Tokenizer

CHUNK = 512  # tokens of a prompt per forward pass: bounds the memory of a prefill, and how long a stop waits

Request = str | list[dict] | list[int]


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
class Completion:
    """A whole answer. `tokens` leave out the end mark, which is in `steps`."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    steps: list[Step]
    stats: Stats


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


class Stream:
    """Steps of one generation, to be iterated once. The prompt is read at the first step."""

    def __init__(self, steps: Iterator[Step], stats: Stats, prompt: Prompt):
        self._steps, self.stats, self.prompt = steps, stats, prompt

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Ends the generation; the cache keeps what was read."""
        self._steps.close()


class Engine:
    """Generates with one model. Between streams it keeps the cache of the last one, and reuses what the next shares."""

    def __init__(self, model: Model, tokenizer: Tokenizer, cache_format: str):
        self.model, self.tokenizer, self.cache_format = model, tokenizer, cache_format
        self.context = model.config.max_position_embeddings
        self._held: tuple[list[int], LatentCache] | None = None

    def new_cache(self, batch: int = 1, format: str | None = None) -> LatentCache:
        return LatentCache(self.model.config, batch, format or self.cache_format, self.model.device)

    def prompt(self, prompt: Request, open_last: bool = False) -> Prompt:
        """Tokens and role spans of what was asked. RequestError for nothing, or more than the context holds."""
        if isinstance(prompt, str):
            tokens = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
            made = Prompt(tokens, [Span("text", 0, len(tokens), None)])
        elif prompt and all(isinstance(token, int) for token in prompt):
            made = Prompt(list(prompt), [Span("text", 0, len(prompt), None)])
        else:
            made = render(prompt, self.tokenizer, open_last=open_last)
            if prompt[-1]["role"] == "assistant" and not open_last:
                raise RequestError("the last message is the assistant's: add the user's, or go on with open_last=True.")
        if prompt in ("", []) or not made.tokens:
            raise RequestError("the prompt is empty: write something first.")
        wrong = [token for token in made.tokens if not 0 <= token < self.model.config.vocab_size]
        if wrong:
            raise RequestError(f"token {wrong[0]} is outside the vocabulary of {self.model.config.vocab_size}.")
        if len(made.tokens) >= self.context:
            raise RequestError(
                f"the prompt has {len(made.tokens)} tokens and the context holds {self.context}, one of them for the "
                "answer: shorten the prompt or start a new conversation."
            )
        return made

    def stream(
        self,
        prompt: Request,
        sampling: Sampling | None = None,
        *,
        stop: threading.Event | None = None,
        open_last: bool = False,
    ) -> Stream:
        """One generation, step by step. `stop` is looked at between tokens and between chunks of the prompt.

        A stopped stream ends without a further step and with stats.finish "stopped"; the cache keeps what was read.
        """
        made = self.prompt(prompt, open_last)
        said = prompt[-1].get("tokens") or self.tokenizer.encode(prompt[-1]["content"]) if open_last else []
        reply = self._reply(made, prompt, sampling or Sampling(), continues=bool(said))
        for token in said:
            reply.decoder.push(token)  # completes a character that the reply was cut in
        return Stream(self._steps(reply, stop or threading.Event()), reply.stats, made)

    def _reply(self, made: Prompt, prompt: Request, sampling: Sampling, continues: bool = False) -> Reply:
        chat = not isinstance(prompt, str) and isinstance(prompt[0], dict)
        strip = chat and not continues and detect(self.tokenizer).leading_space
        return Reply(self.tokenizer, list(made.tokens), sampling, self.context, strip)

    def _steps(self, reply: Reply, stop: threading.Event) -> Iterator[Step]:
        held, self._held = self._held, None  # taken, not lent: a second stream at the same time starts its own
        known, cache = held or ([], self.new_cache())
        prompt = len(reply.tokens)
        kept = min(_shared(known, reply.tokens), prompt - 1)
        try:
            cache.truncate(kept)
            reply.stats.reused_tokens = kept
            logits = self._prefill(reply, kept, cache, stop)
            started = perf_counter()
            while logits is not None and not stop.is_set():
                step = reply.next(logits[0], started, cache.nbytes)
                yield step
                if step.finish:
                    return
                started = perf_counter()
                logits = self._forward([[step.token]], cache)
            reply.stats.finish, reply.stats.tail = "stopped", reply.rest()
        finally:
            self._held = (reply.tokens[: cache.lengths[0]], cache)

    def batch(
        self, prompts: Sequence[Request], sampling: Sampling | Sequence[Sampling] | None = None, slots: int = 8
    ) -> list[Completion]:
        """Answers to many prompts of any length, `slots` at a time; a slot is refilled when its answer ends.

        With the same seed every answer is the one that `stream` gives. One bad prompt is refused before anything runs.
        """
        if slots < 1:
            raise RequestError(f"slots must be at least 1; got {slots}.")
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} samplings: give one, or one for each.")
        replies = []
        for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                replies.append(self._reply(self.prompt(prompt), prompt, one))
            except RequestError as error:
                raise RequestError(f"prompt {number}: {error}") from error
        steps: list[list[Step]] = [[] for _ in replies]
        cache = self.new_cache(batch=min(slots, len(replies)))
        waiting = list(range(len(replies)))[::-1]
        running: dict[int, int] = {}  # slot -> reply
        while waiting or running:
            for slot in range(cache.batch):
                while slot not in running and waiting:
                    number = waiting.pop()
                    if self._begin(replies[number], steps[number], cache.only(slot)):
                        running[slot] = number
            if not running:
                continue
            started = perf_counter()
            inputs = [[replies[number].tokens[-1]] for number in running.values()]
            logits = self._forward(inputs, cache.only(*running))
            for row, (slot, number) in zip(logits, list(running.items()), strict=True):
                steps[number].append(replies[number].next(row, started, cache.nbytes))
                if steps[number][-1].finish:
                    cache.truncate(0, slot)
                    del running[slot]
        return [_completion(taken, reply.stats) for reply, taken in zip(replies, steps, strict=True)]

    def _begin(self, reply: Reply, steps: list[Step], cache: LatentCache) -> bool:
        """Reads one prompt into a slot and takes its first token; False if that was also its last."""
        logits = self._prefill(reply, 0, cache, stop=threading.Event())
        steps.append(reply.next(logits[0], perf_counter(), cache.nbytes))
        if steps[-1].finish:
            cache.truncate(0)
        return not steps[-1].finish

    def generate(self, prompt: Request, sampling: Sampling | None = None, **options) -> Completion:
        """`stream` to its end; takes the same options."""
        stream = self.stream(prompt, sampling, **options)
        return _completion(list(stream), stream.stats)

    def _prefill(self, reply: Reply, start: int, cache: LatentCache, stop: threading.Event) -> torch.Tensor | None:
        """Reads the prompt from `start`, in chunks: logits after its last token, or None if a stop came between."""
        logits = None
        for at in range(start, len(reply.tokens), CHUNK):
            if stop.is_set():
                return None
            started = perf_counter()
            chunk = reply.tokens[at : at + CHUNK]
            logits = self._forward([chunk], cache)
            reply.stats.prefilled_tokens += len(chunk)
            reply.stats.prefill_seconds += perf_counter() - started
        return logits

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], cache: LatentCache) -> torch.Tensor:
        """fp32 logits [B, vocab] after the last token of each row."""
        return self.model(torch.tensor(tokens), cache, logits="last")[:, -1]


def _completion(steps: list[Step], stats: Stats) -> Completion:
    tokens = [step.token for step in steps if step.finish != "eos"]
    text = "".join(step.text for step in steps) + stats.tail
    return Completion(stats.prompt_tokens, tokens, text, steps, stats)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
