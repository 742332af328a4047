"""From logits to one token: every transform in a fixed order, one uniform draw, and what the alternatives were."""

import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from torch import Tensor

from workbench.errors import RequestError, WorkbenchError

HEADS = (0.3, 0.03, 1e-3, 1e-6)  # weights relative to the largest: how far down the ranking is first tried


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. RequestError for a value out of range.

    Order: repetition penalty on the logits of tokens already seen (Keskar et al. 2019, as Hugging Face applies it),
    division by `temperature`, then `top_k`, `top_p` and `min_p` on what is left, then one draw in descending order of
    probability. `temperature=0` is greedy: the most likely token after the penalty. 0 turns `top_k` and `min_p` off,
    1 turns `top_p` and `repetition_penalty` off.
    """

    temperature: float = 0.3
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    alternatives: int = 5

    def __post_init__(self):
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, kind, low, high, allowed in (
            ("temperature", Real, 0, 100, "a number from 0 (greedy) to 100"),
            ("top_p", Real, 1e-9, 1, "a number above 0, up to 1 (off)"),
            ("top_k", Integral, 0, math.inf, "a whole number, 0 (off) or more"),
            ("min_p", Real, 0, 1, "a number from 0 (off) to 1"),
            ("repetition_penalty", Real, 1e-9, 100, "a number above 0, up to 100; 1 is off"),
            ("max_tokens", Integral, 1, math.inf, "a whole number, 1 or more"),
            ("alternatives", Integral, 0, math.inf, "a whole number, 0 or more"),
            ("seed", Integral | None, 0, math.inf, "a whole number, 0 or more, or None for a fresh one"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or value is not None and not low <= value <= high:
                raise RequestError(f"{name} must be {allowed}; got {value!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f'stop must be a tuple of strings, none empty, such as ("\\n\\n",); got {self.stop!r}')


class Alternative(NamedTuple):
    """A token that could have come: its probability under the model alone, and after everything in Sampling."""

    token: int
    before: float
    after: float


class Choice(NamedTuple):
    """One chosen token.

    logprob      natural logarithm of its probability under the model alone (no penalty, no temperature)
    probability  of drawing it, after penalty, temperature and filters; 1 if greedy
    entropy      of the model's own distribution, in nats
    alternatives the likeliest under the model alone, in descending order, then the chosen one if it is not among them
    """

    token: int
    logprob: float
    probability: float
    entropy: float
    alternatives: tuple[Alternative, ...]


class Dice:
    """Uniform numbers for one generation, independent of every global random state."""

    def __init__(self, seed: int | None = None):
        self.seed = secrets.randbits(32) if seed is None else seed
        self._random = random.Random(self.seed)

    def roll(self) -> float:
        """The next number, in [0, 1)."""
        return self._random.random()


def sample(logits: Tensor, sampling: Sampling, seen: Sequence[int], draw: float) -> Choice:
    """Choose one token from `logits` [vocab]; the same arguments give the same choice, alone or in a batch.

    `seen` are the tokens of prompt and reply so far, `draw` is in [0, 1). WorkbenchError if a logit is not finite.
    """
    scores = logits.detach().cpu().numpy().astype(np.float64)
    assert scores.ndim == 1, f"one row of logits, not {scores.shape}"
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(finite.argmin())
        raise WorkbenchError(
            f"{scores.size - finite.sum()} of {scores.size} logits are not finite (token {first}: {scores[first]}): "
            "weights or arithmetic overflowed. Use bf16 or fp32, and check the checkpoint"
        )
    logprobs = scores - scores.max()
    before = np.exp(logprobs)
    total = float(before.sum())
    # not `@`: above 10,000 tokens NumPy's BLAS wakes threads of its own, which then spin against those of the model
    entropy = math.log(total) - float((logprobs * before).sum()) / total

    kept = _keep(_temper(scores, before, sampling, seen), sampling, draw)
    token = kept.pick(draw)

    count = sampling.alternatives
    shown = _ranked(before, count)[:count].tolist() if count else []
    if count and token not in shown:
        shown.append(token)
    return Choice(
        token,
        float(logprobs[token]) - math.log(total),
        kept.probability(token),
        entropy,
        tuple(Alternative(other, float(before[other]) / total, kept.probability(other)) for other in shown),
    )


class Kept(NamedTuple):
    """The tokens a draw may fall on: `ids` in descending order of weight, ties in order of id.

    `weights` is for the whole vocabulary. `mass` is the weight of all kept tokens; where nothing is filtered, `ids` may
    end early, after the last one this draw can reach, and `everything` is true.
    """

    ids: np.ndarray
    weights: np.ndarray
    mass: float
    everything: bool = False

    def pick(self, draw: float) -> int:
        reached = np.searchsorted(np.cumsum(self.weights[self.ids]), draw * self.mass, side="right")
        return int(self.ids[min(reached, len(self.ids) - 1)])

    def probability(self, token: int) -> float:
        last = self.ids[-1]
        inside = self.everything or (-self.weights[token], token) <= (-self.weights[last], last)
        return float(self.weights[token]) / self.mass if inside else 0.0


def _temper(scores: np.ndarray, before: np.ndarray, sampling: Sampling, seen: Sequence[int]) -> np.ndarray:
    """Weights after penalty and temperature, the largest 1; for the greedy choice, temperature 1 serves."""
    if sampling.repetition_penalty != 1 and len(seen):
        ids = np.asarray(seen)
        old = scores[ids]
        scores = scores.copy()
        scores[ids] = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
    elif sampling.temperature in (0, 1):
        return before
    return np.exp((scores - scores.max()) / (sampling.temperature or 1))


def _keep(weights: np.ndarray, sampling: Sampling, draw: float) -> Kept:
    """Top-k (ties with the k-th stay, as in Hugging Face), then top-p of what is left, then min-p."""
    if sampling.temperature == 0:
        best = int(weights.argmax())
        return Kept(np.array([best]), weights, float(weights[best]))

    total = float(weights.sum())
    filtered = True
    if 0 < sampling.top_k < weights.size:
        ids = _ranked(weights, sampling.top_k)
        ids = ids[weights[ids] >= weights[ids[sampling.top_k - 1]]]
        total = float(weights[ids].sum())
    elif sampling.top_p < 1:
        ids = _ranked(weights, mass=sampling.top_p * total)
    elif sampling.min_p > 0:
        ids = _sorted(weights, np.flatnonzero(weights >= sampling.min_p))
    else:
        ids = _ranked(weights, mass=draw * total)
        filtered = False
    if sampling.top_p < 1:
        reached = np.cumsum(weights[ids])
        ids = ids[: 1 + np.searchsorted(reached, sampling.top_p * total)]  # up to the one that reaches top_p
    if sampling.min_p > 0:
        ids = ids[weights[ids] >= sampling.min_p]
    return Kept(ids, weights, float(weights[ids].sum()) if filtered else total, everything=not filtered)


def _ranked(weights: np.ndarray, count: int = 0, mass: float = 0.0) -> np.ndarray:
    """The first ids in descending order, at least `count` of them (or all) and more than `mass` in weight (or all).

    Sorting a whole vocabulary costs more than the rest of sampling: a threshold finds the few that matter.
    """
    for head in HEADS:
        ids = np.flatnonzero(weights >= head)
        if len(ids) >= count and weights[ids].sum() > mass:
            return _sorted(weights, ids)
    if mass == 0 and count < weights.size:
        return _sorted(weights, np.flatnonzero(weights >= np.partition(weights, -count)[-count]))
    return _sorted(weights, np.arange(weights.size))


def _sorted(weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return ids[np.argsort(-weights[ids], kind="stable")]


class StopStrings:
    """Watches a stream of text for stop strings; what may be the beginning of one is held back until it is decided.

    The string that is complete first ends the text, however the text was cut into pieces; it is not part of it.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was hit (then the rest is dropped)."""
        text = self._held + text
        hits = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)[1]], True
        beginnings = (stop[:size] for stop in self._stops for size in range(1, len(stop)))
        shown = len(text) - max((len(start) for start in beginnings if text.endswith(start)), default=0)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """End of the text: what was held back is text after all."""
        held, self._held = self._held, ""
        return held
