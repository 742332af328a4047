"""The engine: one conversation streamed token by token, or many prompts in a batch; the same sampling either way."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from workbench.cache import BLOCK, LatentCache, Pool
from workbench.chat import Prompt, Span, detect, render
from workbench.door import present
from workbench.edits import Edit
from workbench.errors import BudgetError, RequestError
from workbench.formats import cache_format
from workbench.graph import DecodeGraph
from workbench.model import Model
from workbench.probe import Probe
from workbench.reply import Reply, Step
from workbench.ring import RoutingLog
from workbench.sampling import Sampling
from workbench.stream import Completion, Stream, completion
from workbench.tokenizer import Tokenizer
from workbench.watching import Watch, Watched

CHUNK = 512  # tokens of a prompt per forward pass: bounds the memory of a prefill, and how long a stop waits

Request = str | list[dict] | list[int]


class _Held(NamedTuple):
    """What is left of the last stream: which tokens are cached, where each went, and the edits they were read under."""

    tokens: list[int]
    cache: LatentCache
    log: RoutingLog
    edits: tuple[Edit, ...]
    boundary: int | None  # where the prompt ended, if an edit asked for that
    fired: frozenset[int]


class Engine:
    """Generates with one model. Between streams it keeps the cache of the last one, and reuses what the next shares."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        cache_format: str,
        name: str = "",
        *,
        context: int | None = None,
        chunk: int = CHUNK,
        cache_bytes: int | None = None,
    ):
        """`chunk` tokens of a prompt pass together; all caches made here hold at most `cache_bytes` together."""
        self.model, self.tokenizer, self.cache_format, self.name = model, tokenizer, cache_format, name
        self.context = min(context or model.config.max_position_embeddings, model.config.max_position_embeddings)
        self.chunk, self.cache_bytes = chunk, cache_bytes
        # pools of caches, routing rings and recorders that were made here and that somebody still holds
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self._last: Callable[[], LatentCache | None] = lambda: None
        self._held: _Held | None = None
        self._holding = threading.Lock()  # what is held is taken by a stream, or converted, by one thread at a time

    @property
    def cache(self) -> LatentCache | None:
        """Of the last stream, while it runs too. To look at: `convert_cache` changes its format."""
        return self._last()

    def convert_cache(self, format: str) -> list[tuple[float, float]]:
        """Keeps what is cached, and what comes, in another format from now on. Of each layer what that cost: see
        LatentCache.convert; nothing where nothing is cached. A stream that is running goes on in the old one.
        """
        name = cache_format(format).name
        with self._holding:
            held, errors = self._held, []
            if held is not None and name != held.cache.format:
                if held.cache.pool.format.recent or cache_format(format).recent:
                    self._held = None  # windows belong to their sequence: the next stream reads its prompt anew
                elif self._has_room(held.cache.pool.blocks * held.cache.pool.block_bytes(cache_format(name))):
                    errors = held.cache.convert(name)
                else:
                    self._held = None
            self.cache_format = name
        return errors

    def new_cache(self, batch: int = 1, format: str | None = None) -> LatentCache:
        """An empty cache. It refuses to grow beyond what the budget leaves for all of them: BudgetError."""
        cache = LatentCache(self.model.config, batch, format or self.cache_format, self.model.device)
        cache.pool.admit = self._admit
        self.alive.add(cache.pool)
        return cache

    def _has_room(self, more: int) -> bool:
        held = sum(pool.nbytes for pool in list(self.alive) if isinstance(pool, Pool))
        return self.cache_bytes is None or held + more <= self.cache_bytes

    def _admit(self, more: int) -> None:
        if not self._has_room(more):
            raise BudgetError(
                f"the caches of all conversations and answers would pass the {self.cache_bytes:,} bytes that the "
                f"budget leaves them, {self.context:,} tokens. End some, or open the model with a longer context=, "
                'a larger budget or cache="q6".'
            )

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
        edits: Sequence[Edit] = (),
        watch: Sequence[str] = (),
        scores: bool = False,
        stop: threading.Event | None = None,
        open_last: bool = False,
    ) -> Stream:
        """One generation, step by step. `stop` is looked at between tokens and between chunks of the prompt.

        A stopped stream ends without a further step and with stats.finish "stopped"; the cache keeps what was read.
        `edits` act on prompt and answer; see Watch for `watch` and `scores`. Where each token went is always recorded.
        An edit or a site that no token met is a RequestError when the stream has come to its end.
        """
        made = self.prompt(prompt, open_last)
        said = prompt[-1].get("tokens") or self.tokenizer.encode(prompt[-1]["content"]) if open_last else []
        reply = self._reply(made, prompt, sampling or Sampling(), continues=bool(said))
        for token in said:
            reply.decoder.push(token)  # completes a character that the reply was cut in
        watched = self._watched(Watch(self.model, self.name, edits, watch, scores, self.cache_format), reply)
        return Stream(self._steps(watched, stop or threading.Event()), made, watched)

    def _reply(self, made: Prompt, prompt: Request, sampling: Sampling, continues: bool = False) -> Reply:
        chat = not isinstance(prompt, str) and isinstance(prompt[0], dict)
        strip = chat and not continues and detect(self.tokenizer).leading_space
        return Reply(self.tokenizer, list(made.tokens), sampling, self.context, strip)

    def _watched(self, watch: Watch, reply: Reply) -> Watched:
        watched = watch.of(reply, self.tokenizer.piece)
        self.alive.update((watch.ring, *watched.recorders))
        return watched

    def _steps(self, watched: Watched, stop: threading.Event) -> Iterator[Step]:
        reply, watch = watched.reply, watched.watch
        with self._holding:
            held, self._held = self._held, None  # taken, not lent: a second stream at the same time starts its own
        held, kept = self._reusable(held, watched)
        self._last = weakref.ref(held.cache)
        cache, watched.log = held.cache, held.log.fork(kept)  # the log itself belongs to the trace of the last stream
        try:
            cache.truncate(kept)
            reply.stats.reused_tokens = kept
            logits = self._prefill(watched, kept, cache, stop)
            probe, step_of = watch.probe([watched]), self.stepping()
            started = perf_counter()
            while logits is not None and not stop.is_set():
                step = reply.next(logits[0], started, cache.nbytes)
                yield step
                if step.finish:
                    watch.check()
                    return
                started = perf_counter()
                logits = step_of([[step.token]], cache, probe)
            reply.stats.finish, reply.stats.tail = "stopped", reply.rest()
        finally:
            tokens = reply.tokens[: cache.lengths[0]]
            fired = frozenset(watch.editing.fired) if watch.editing else frozenset()
            self._held = held._replace(tokens=tokens, log=watched.log, fired=fired)

    def _reusable(self, held: _Held | None, watched: Watched) -> tuple[_Held, int]:
        """A cache to go on with, and how many tokens of it: those of the same text, read under the same edits."""
        watch, reply = watched.watch, watched.reply
        boundary = reply.stats.prompt_tokens if any(edit.phase for edit in watch.edits) else None
        if held is None or held.cache.format != self.cache_format:
            return _Held([], self.new_cache(), watched.log, watch.edits, boundary, frozenset()), 0
        same = not watch.recording and held.edits == watch.edits and held.boundary == boundary
        kept = min(_shared(held.tokens, reply.tokens), len(reply.tokens) - 1) if same else 0
        if not kept:
            return held._replace(log=watched.log, edits=watch.edits, boundary=boundary), 0
        if watch.editing:
            watch.editing.fired.update(held.fired)  # they acted on what is cached
        return held, kept

    def batch(
        self,
        prompts: Sequence[Request],
        sampling: Sampling | Sequence[Sampling] | None = None,
        slots: int = 8,
        **options,
    ) -> list[Completion]:
        """Answers to many prompts of any length, `slots` at a time; a slot is refilled when its answer ends.

        With the same seed every answer is the one that `stream` gives, edits included. One bad prompt is refused before
        anything runs. Takes edits, watch and scores, as `stream` does.
        """
        done = dict(self.answers(prompts, sampling, slots, **options))
        return [done[number] for number in range(len(prompts))]

    def answers(
        self,
        prompts: Sequence[Request],
        sampling: Sampling | Sequence[Sampling] | None = None,
        slots: int = 8,
        *,
        edits: Sequence[Edit] = (),
        watch: Sequence[str] = (),
        scores: bool = False,
    ) -> Iterator[tuple[int, Completion]]:
        """What `batch` returns, each with the number of its prompt as soon as it has ended: none is kept here."""
        if slots < 1:
            raise RequestError(f"slots must be at least 1; got {slots}.")
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} samplings: give one, or one for each.")
        waiting = []
        for number, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                waiting.append((number, self._reply(self.prompt(prompt), prompt, one)))
            except RequestError as error:
                raise RequestError(f"prompt {number}: {error}") from error
        waiting.reverse()
        watching = Watch(self.model, self.name, edits, watch, scores, self.cache_format)
        if self.cache_bytes is not None:
            self._held = None  # its room is needed
        cache, step_of = self.new_cache(batch=min(slots, len(waiting))), self.stepping()
        running: dict[int, tuple[int, Watched, list[Step]]] = {}  # slot -> number of the prompt, and its answer so far
        while waiting or running:
            for slot in range(cache.batch):
                while slot not in running and waiting:
                    replies = [waiting[-1][1], *(each.reply for _, each, _ in running.values())]
                    if running and not self._fits(replies, cache.pool):
                        break  # until one of those that run has ended
                    number, reply = waiting.pop()
                    watched = self._watched(watching, reply)
                    steps = [self._begin(watched, cache.only(slot))]
                    if steps[0].finish:
                        yield number, completion(steps, watched)
                    else:
                        running[slot] = number, watched, steps
            if not running:
                continue
            started = perf_counter()
            batch = [watched for _, watched, _ in running.values()]
            inputs = [[watched.reply.tokens[-1]] for watched in batch]
            logits = step_of(inputs, cache.only(*running), watching.probe(batch))
            for row, (slot, (number, watched, steps)) in zip(logits, list(running.items()), strict=True):
                steps.append(watched.reply.next(row, started, cache.nbytes))
                if steps[-1].finish:
                    cache.truncate(0, slot)
                    del running[slot]
                    yield number, completion(steps, watched)
        watching.check()

    def _fits(self, replies: list[Reply], pool: Pool) -> bool:
        """Whether all of them can become as long as they may."""
        most = [-(-reply.longest // BLOCK) * pool.block_bytes() + pool.window_bytes for reply in replies]
        return self.cache_bytes is None or sum(most) <= self.cache_bytes

    def _begin(self, watched: Watched, cache: LatentCache) -> Step:
        """Reads one prompt into a slot and takes its first token; the slot is empty again if that was also its last."""
        logits = self._prefill(watched, 0, cache, stop=threading.Event())
        step = watched.reply.next(logits[0], perf_counter(), cache.nbytes)
        if step.finish:
            cache.truncate(0)
        return step

    def generate(self, prompt: Request, sampling: Sampling | None = None, **options) -> Completion:
        """`stream` to its end; takes the same options."""
        stream = self.stream(prompt, sampling, **options)
        return completion(list(stream), stream.watched)

    def _prefill(self, watched: Watched, start: int, cache: LatentCache, stop: threading.Event) -> torch.Tensor | None:
        """Reads the prompt from `start`, in chunks: logits after its last token, or None if a stop came between."""
        logits, reply = None, watched.reply
        for at in range(start, len(reply.tokens), self.chunk):
            if stop.is_set():
                return None
            started = perf_counter()
            chunk = reply.tokens[at : at + self.chunk]
            logits = self._forward([chunk], cache, watched.watch.probe([watched]), *watched.watch.wanted)
            reply.stats.prefilled_tokens += len(chunk)
            reply.stats.prefill_seconds += perf_counter() - started
        return logits

    def stepping(self) -> Callable[[list[list[int]], LatentCache, Probe], torch.Tensor]:
        """How one generation takes its steps: `_forward`, or replays of it on a GPU. Of one cache, in one thread."""
        if not present(self.model.norm):
            return self._forward
        graph = DecodeGraph(self.model)  # not kept: it holds addresses of the cache

        @torch.inference_mode()
        def step(tokens: list[list[int]], cache: LatentCache, probe: Probe) -> torch.Tensor:
            return graph.step(torch.tensor(tokens), cache, probe)[:, -1]

        return step

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], cache: LatentCache, probe: Probe, logits: str = "last") -> torch.Tensor:
        """fp32 logits [B, vocab] after the last token of each row; "all" where a probe wants those of every token."""
        return self.model(torch.tensor(tokens), cache, probe, logits=logits)[:, -1]


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
