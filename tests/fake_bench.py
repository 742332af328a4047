"""A bench without a model: it says what it is told to, as slowly as a test wants, and fails on request."""

import math
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from workbench.config import Config
from workbench.sampling import Alternative, Choice
from workbench.trace import Trace, new_header


class FakeTokenizer:
    """One token a byte, then three special ones; so a Chinese character is three tokens."""

    bos, eos, user, vocab_size = 256, 257, 258, 259
    names = {256: "<bos>", 257: "<eos>", 258: "<user>"}

    def encode(self, text):
        return list(text.encode("utf-8", "surrogateescape"))

    def align(self, text):
        return self.encode(text), [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]

    def decode(self, tokens, special=True):
        decoder = self.stream(special)
        return "".join(decoder.push(token) for token in tokens) + decoder.flush()

    def stream(self, special=True):
        return FakeDecoder(self, special)

    def piece(self, token):
        if token in self.names:
            return self.names[token]
        return chr(token) if token < 128 else f"<0x{token:02X}>"

    def is_special(self, token):
        return token in self.names

    def has(self, text):
        return text in self.names.values()

    def special(self, text):
        return {name: token for token, name in self.names.items()}[text]


class FakeDecoder:
    def __init__(self, tokenizer, special):
        self.tokenizer, self.special, self.held = tokenizer, special, b""

    def push(self, token):
        if token in self.tokenizer.names:
            return self.tokenizer.names[token] if self.special else ""
        self.held += bytes([token])
        try:
            text, self.held = self.held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def flush(self):
        return "\ufffd" if self.held else ""


@dataclass
class FakeStats:
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_seconds: float = 0.25
    decode_seconds: float = 0.0
    tokens: int = 0
    finish: str | None = None
    seed: int = 7
    tail: str = ""

    @property
    def tokens_per_second(self):
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0


class FakeEngine:
    """`says`: the replies in turn, the last one for ever. `gate`: when set, each token waits for a release of it.

    `fails_at`: the step (0: before the first token) at which `error` is raised. `holds`: the last character waits for
    the next token, as one that may begin a stop string does. `asked`: the calls so far.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.says = ["Hello there."]
        self.gate = None
        self.fails_at, self.error = None, None
        self.holds = False
        self.asked = []
        self.cache_format = "bf16"

    def stream(self, prompt, sampling=None, *, edits=(), stop=None, open_last=False):
        self.asked.append(SimpleNamespace(messages=prompt, sampling=sampling, edits=edits, open_last=open_last))
        text = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        tokens = [*self.tokenizer.encode(text), self.tokenizer.eos]
        kept = prompt[-1].get("tokens", []) if open_last else []
        return FakeStream(self, tokens, sampling, stop or threading.Event(), prompt, kept)


class FakeStream:
    def __init__(self, engine, tokens, sampling, stop, prompt, kept):
        self.kept, self.seen = kept, list(kept)
        self.engine, self.tokens, self.sampling, self.stop = engine, tokens, sampling, stop
        self.start = sum(len(m.get("tokens") or m["content"]) for m in prompt)
        self.stats = FakeStats(prompt_tokens=self.start, prefilled_tokens=self.start)

    def close(self):
        self.closed = True

    @property
    def watched(self):
        return FakeWatched(self)

    @property
    def steps(self):
        return self.seen[len(self.kept) :]

    def trace(self):
        header = new_header("fake", "0", {}, sequences=[{"prompt_tokens": len(self.kept)}])
        return Trace(header, self.watched.tokens(self.steps), (), *self.watched.routing())

    def __iter__(self):
        decoder = self.engine.tokenizer.stream(special=False)
        held = ""
        for token in self.kept:
            decoder.push(token)
        for index, token in enumerate(self.tokens):
            while self.engine.gate and not self.engine.gate.acquire(timeout=0.01):
                if self.stop.is_set():
                    break
            if self.stop.is_set():
                self.stats.finish, self.stats.tail = "stopped", held
                return
            if index == self.engine.fails_at:
                raise self.engine.error
            self.seen.append(token)
            self.stats.tokens += 1
            self.stats.decode_seconds += 0.01
            ended = token == self.engine.tokenizer.eos
            finish = "eos" if ended else "length" if self.stats.tokens == self.sampling.max_tokens else None
            self.stats.finish = finish
            text = held + decoder.push(token) + (decoder.flush() if finish else "")
            text, held = (text[:-1], text[-1:]) if self.engine.holds and not finish else (text, "")
            alternatives = (Alternative(token, 0.5, 0.8), Alternative(ord("X"), 0.25, 0.2), Alternative(257, 0.1, 0.0))
            yield SimpleNamespace(
                token=token,
                text=text,
                choice=Choice(token, math.log(0.5), 0.8, 1.2, alternatives),
                seconds=0.01,
                position=self.start + index,
                cache_bytes=4096,
                finish=finish,
            )
            if finish:
                return


class FakeWatched:
    """Of the tokens only the text is known, and nothing is routed."""

    def __init__(self, stream):
        self.seen, self.piece = stream.seen, stream.engine.tokenizer.piece

    def tokens(self, steps, start=0):
        seen = self.seen[start:]
        table = pd.DataFrame({"id": seen, "text": [self.piece(token) for token in seen]})
        table = table.assign(sequence=0, position=range(start, start + len(seen)), phase="decode", cache_bytes=-1)
        return table.assign(logprob=float("nan"), probability=float("nan"), entropy=float("nan"), ms=float("nan"))

    def routing(self, start=0):
        return [np.zeros((len(self.seen) - start, 0, 0))] * 3


class FakeBench:
    """As much of a Workbench as a conversation and its panel use."""

    def __init__(self):
        self.name = "fake"
        self.config = replace(
            Config.preset("pocket"), n_routed_experts=None, num_experts_per_tok=0
        )  # nothing is routed
        self.context = 2048
        self.tokenizer = FakeTokenizer()
        self.engine = FakeEngine(self.tokenizer)
