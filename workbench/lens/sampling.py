"""How the next token was chosen: its rivals, what temperature does to them, and how sure the model was all along."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import pandas as pd
from torch import Tensor

from workbench.lens.tokens import pieces
from workbench.sampling import Alternative, Choice, Sampling, sample
from workbench.tokenizer import Tokenizer


class Chosen(Protocol):
    """What a Choice of the engine and a record of the chat panel have in common."""

    token: int
    logprob: float | None
    probability: float | None
    entropy: float | None
    alternatives: tuple[Alternative, ...]


def rivals(choice: Chosen, tokenizer: Tokenizer) -> pd.DataFrame:
    """One row an alternative: its probability under the model, after sampling, and whether it was taken."""
    tokens = [each.token for each in choice.alternatives]
    return pd.DataFrame(
        {
            "token": pieces(tokenizer, tokens),
            "model": [each.before for each in choice.alternatives],
            "after sampling": [each.after for each in choice.alternatives],
            "taken": ["yes" if token == choice.token else "" for token in tokens],
        }
    )


def next_token(logits: Tensor, sampling: Sampling, seen: Sequence[int] = (), count: int = 10) -> Choice:
    """One choice from `logits` [vocab] with its `count` likeliest alternatives; the draw is the middle one, 0.5."""
    return sample(logits, replace(sampling, alternatives=count), seen, 0.5)


def temperatures(
    logits: Tensor, tokenizer: Tokenizer, values: Iterable[float], sampling: Sampling | None = None, count: int = 8
) -> pd.DataFrame:
    """Probability after sampling of the `count` likeliest tokens (rows) at each temperature (columns).

    The other settings are those of `sampling`, by default without any filter.
    """
    sampling = sampling or Sampling(top_p=1.0)
    columns = {}
    for value in values:
        choice = next_token(logits, replace(sampling, temperature=value), count=count)
        likeliest = choice.alternatives[:count]
        columns[f"T = {value:g}"] = [each.after for each in likeliest]
    return pd.DataFrame(columns, index=pd.Index(pieces(tokenizer, [each.token for each in likeliest]), name="token"))


def along(choices: Iterable[Chosen], tokenizer: Tokenizer) -> pd.DataFrame:
    """One row a generated token: its probability under the model, its surprise -ln p, and the entropy, both in nats."""
    choices = list(choices)
    frame = pd.DataFrame(
        {
            "token": pieces(tokenizer, [choice.token for choice in choices]),
            "surprise": [None if choice.logprob is None else -choice.logprob for choice in choices],
            "entropy": [choice.entropy for choice in choices],
        }
    ).astype({"surprise": float, "entropy": float})
    frame.insert(1, "probability", (-frame["surprise"]).map(math.exp))
    return frame


class Surprise(NamedTuple):
    """How unlikely some text was to a model, in nats: all of it, and per token; perplexity is exp(nats per token)."""

    tokens: int
    nats: float

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token)


def surprise(logits: Tensor, tokens: Sequence[int], start: int) -> Surprise:
    """Of tokens[start:], each given all before it. `logits` [T, vocab] are the model's for all T tokens; start >= 1."""
    assert logits.shape[0] == len(tokens) and 1 <= start < len(tokens), (logits.shape, len(tokens), start)
    logprobs = logits[start - 1 : -1].double().log_softmax(-1)
    chosen = logprobs.gather(1, logprobs.new_tensor(tokens[start:]).long()[:, None])
    return Surprise(len(tokens) - start, -float(chosen.sum()))
