"""Do experts specialise? What the label of a text (its language, domain, task) says about the experts that read it.

Always beside a null, because any few texts differ in their experts, whatever their labels: the same labels, shuffled.

N tokens, S sequences, U units that are shuffled, C labels, L recorded layers, K slots, E experts, R rounds.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.lens.labelled import Units, labelled, under_two_labels, units_of
from workbench.lens.null import adjusted
from workbench.trace import Trace

HELD = 1 << 22  # numbers of shuffled counts held at once: 32 MB


def affinity(
    trace: Trace, by: str = "count", labels: Sequence[str | None] | None = None, phase: str | None = None
) -> pd.DataFrame:
    """How much each expert is used for each label: a row a (label, layer), a column an expert.

    The two expert relevance scores of ESFT (Wang et al. 2024, arXiv 2407.01906, section 3.2), each a mean over the
    tokens of a sequence and then over sequences. by="count": token selection ratio, the share of the slots; a row sums
    to 1. by="gate": average gate score, gates as recorded, routed_scaling_factor included. `labels` and `phase` as in
    `specialisation`. RequestError where nothing has a label.
    """
    if by not in ("count", "gate"):
        raise RequestError(f"by must be 'count' or 'gate'; got {by!r}.")
    read = labelled(trace, labels, phase)
    used = read.experts >= 0
    weights = read.gates if by == "gate" else used / np.maximum(used.sum(2, keepdims=True), 1)
    use = read.sums(read.sequence, weights) / np.bincount(read.sequence)[:, None, None]
    rows = np.concatenate([use[read.label == c].mean(0) for c in range(len(read.names))])
    index = pd.MultiIndex.from_product([read.names, trace.layers], names=["label", "layer"])
    return pd.DataFrame(rows, index=index, columns=pd.RangeIndex(trace.n_experts, name="expert"))


@dataclass(frozen=True)
class Specialisation:
    """What `specialisation` found. Bits are per choice: one slot of one token.

    layers     a row a layer:
                 observed             mutual information of label and expert
                 null                 its mean over shuffled labels: what a finite sample gives by itself
                 null_low, null_high  95 % of the shuffles
                 effect, effect_sd    observed - null, in bits and in standard deviations of the null
                 low, high            95 % bootstrap interval of the effect
                 p                    share of shuffles that reach the observed value, itself counted among them
                 q                    p corrected for the number of rows (Benjamini and Hochberg)
    overall    the same of the mean over layers, without q
    experts    a row a layer and expert:
                 in LABEL             for each label, share of its tokens that the expert read
                 most, least          the labels where that is highest and lowest; difference: of these two
                 h                    Cohen's effect size of it, 2 asin sqrt(a) - 2 asin sqrt(b): 0.2 is small, 0.5
                                      medium, 0.8 large (Cohen 1988)
                 h_low, h_high        95 % bootstrap interval of h between these two labels. That they are the extremes
                                      of several makes h a little too large, and the interval does not know it
                 p, q                 as above, for h. p is never below 1 / (rounds + 1), so where few of many experts
                                      differ, q below 0.05 takes more rounds
    labels     sequences of each label
    most_bits  what an expert that knew the label would say: the entropy of the label
    least_p    the smallest p that so many sequences and rounds could give
    shuffles   [rounds] bits for shuffled labels, mean over layers: the null itself, to be drawn
    """

    layers: pd.DataFrame
    overall: pd.Series
    experts: pd.DataFrame
    labels: dict[str, int]
    unit: str
    control: str | None
    rounds: int
    most_bits: float
    least_p: float
    shuffles: np.ndarray = field(repr=False)

    @property
    def found(self) -> bool:
        """Whether there is an effect: p is below 0.05 and the bootstrap interval above the null's mean."""
        return bool(self.overall["p"] < 0.05 and self.overall["low"] > 0)

    @property
    def verdict(self) -> str:
        """What was found, in words and numbers."""
        it = self.overall
        known = ", its token being known" if self.control else ""
        text = (
            f"{'An effect' if self.found else 'No effect found'}: the label says {it['observed']:.4f} bits of at most "
            f"{self.most_bits:.2f} about the choice of an expert{known}; shuffled labels say {it['null']:.4f} "
            f"({it['null_low']:.4f} to {it['null_high']:.4f}). Difference {it['effect']:.4f} bits, "
            f"{it['effect_sd']:.1f} standard deviations of the null, p = {it['p']:.3f}, bootstrap interval "
            f"{it['low']:.4f} to {it['high']:.4f}; {sum(self.labels.values())} sequences of {len(self.labels)} labels, "
            f"{self.rounds} shuffles."
        )
        if self.found:
            layers, experts = ((table["q"] < 0.05).sum() for table in (self.layers, self.experts))
            text += f" With q < 0.05: {layers} of {len(self.layers)} layers, {experts} of {len(self.experts)} experts."
        elif self.least_p >= 0.05:
            text += f" None could be: with so few sequences or shuffles p is never below {self.least_p:.2f}."
        if self.unit == "token":
            text += " The tokens of a text were shuffled as if they were independent, so p is far too small."
        return text


def specialisation(
    trace: Trace,
    labels: Sequence[str | None] | None = None,
    *,
    rounds: int = 500,
    seed: int = 0,
    unit: str = "sequence",
    control: str | None = None,
    phase: str | None = None,
) -> Specialisation:
    """Whether the label of a sequence says something about the experts that read its tokens.

    labels   one a sequence, None leaves that sequence out; by default those in the header
    unit     what is shuffled. "sequence" is right: a label belongs to a whole text. "token" is wrong, and here to show
             it: tokens of one text share its words and its context, so any two texts differ by more than so many
             unrelated tokens would, and shuffling tokens takes that for an effect of the label
    control  "token": does the label still say something once the token is known? Languages and domains use other
             words, and experts follow words. Only tokens of the vocabulary that occur under two labels or more count,
             and `observed` is the divergence (bits) of the experts of a label from what its tokens alone predict, which
             is each token's experts pooled over all labels: indirect standardisation. It errs to the safe side: what is
             nearly one label's own token counts as explained, and what the label does to one token and undoes to
             another cancels
    phase    "prefill" or "decode" alone

    The bootstrap draws sequences anew within each label. Drawing adds chance information of its own, so the interval is
    moved to have its mean at the observed effect. With few sequences the effect comes out too small: shuffles mix in
    some of a real difference. Not controlled: position, length and layout of the texts, where these go with the label.
    Sequences count as independent: many prompts of one template are nearly one text, and speak for that template only.

    RequestError without two labels of two sequences each, and where no token is left to compare.
    """
    for name, value, known in (("unit", unit, ("sequence", "token")), ("control", control, (None, "token"))):
        if value not in known:
            raise RequestError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
    if control and unit == "token":
        raise RequestError("control='token' compares texts: use it with unit='sequence'.")
    if rounds < 20:
        raise RequestError(f"rounds must be 20 or more, to know how far shuffles vary; got {rounds}.")
    read = labelled(trace, labels, phase)
    if control:
        read = under_two_labels(read)
    sizes = np.bincount(read.label, minlength=len(read.names))
    if len(sizes) < 2 or sizes.min() < 2:
        have = ", ".join(f"{name} ({size})" for name, size in zip(read.names, sizes)) or "none"
        raise RequestError(f"a comparison takes two labels or more, each of two sequences or more; there are: {have}.")
    units = units_of(read, unit, control)
    random = np.random.default_rng(seed)
    hot = np.eye(len(sizes))[units.label].T  # [C, U]

    def shuffle() -> np.ndarray:
        return hot[:, random.permutation(hot.shape[1])]

    def draw() -> np.ndarray:
        return np.stack([own * random.multinomial(int(own.sum()), own / own.sum()) for own in hot])

    bits, rates = (each[0] for each in _measured(hot[None], units))
    h = _spread(rates)
    reached, null = np.zeros(h.shape), []
    for some_bits, some_rates in _rounds(shuffle, rounds, units):
        null.append(some_bits)
        reached += (_spread(some_rates) >= h - 1e-9).sum(0)
    null = np.concatenate(null)
    extremes, boot, boot_h = (rates.argmax(0), rates.argmin(0)), [], []
    for some_bits, some_rates in _rounds(draw, rounds, units):
        boot.append(some_bits)
        boot_h.append(_between(some_rates, *extremes))
    boot, boot_h = np.concatenate(boot), np.concatenate(boot_h)
    layers = pd.DataFrame(_beside(bits, null, boot), index=pd.Index(trace.layers, name="layer"))
    share = hot @ units.observed.sum((1, 2)) / units.observed.sum()
    return Specialisation(
        layers=layers.assign(q=adjusted(layers["p"])),
        overall=pd.DataFrame(_beside(*(x.mean(-1, keepdims=True) for x in (bits, null, boot)))).loc[0],
        experts=_table(read.names, trace.layers, rates, h, boot_h, (1 + reached) / (1 + rounds)),
        labels=dict(zip(read.names, sizes.tolist())),
        unit=unit,
        control=control,
        rounds=rounds,
        most_bits=float(-(share * np.log2(share)).sum()),
        least_p=max(_rarest(hot.sum(1).astype(int).tolist()), 1 / (1 + rounds)),
        shuffles=null.mean(1),
    )


def shuffled(labels: Sequence[str], seed: int = 0) -> list[str]:
    """The same labels in another order, for which `specialisation` has nothing to find."""
    return [labels[n] for n in np.random.default_rng(seed).permutation(len(labels))]


def _rounds(make: Callable[[], np.ndarray], rounds: int, units: Units) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`_measured` of `rounds` weightings [C, U] of the units, as many at once as may be held."""
    labels, many = make().shape
    size = max(1, HELD // (labels * max(many, math.prod(units.observed.shape[1:]))))
    for start in range(0, rounds, size):
        yield _measured(np.stack([make() for _ in range(min(size, rounds - start))]), units)


def _measured(hot: np.ndarray, units: Units) -> tuple[np.ndarray, np.ndarray]:
    """Bits [R, L] and each expert's share of the tokens of a label [R, C, L, E], for weightings hot [R, C, U]."""

    def of_labels(counts: np.ndarray) -> np.ndarray:
        flat = hot.reshape(-1, hot.shape[2]) @ counts.reshape(len(counts), -1)
        return flat.reshape(*hot.shape[:2], *counts.shape[1:])

    observed = of_labels(units.observed)  # [R, C, L, E]
    expected = observed.sum(1, keepdims=True) if units.expected is None else of_labels(units.expected)
    choices = observed.sum(-1, keepdims=True)
    ratio = _over(_over(observed, choices), _over(expected, expected.sum(-1, keepdims=True)))
    bits = (observed * np.log2(ratio, out=np.zeros_like(ratio), where=ratio > 0)).sum((1, 3))
    bits /= choices.sum((1, 3))
    if units.expected is None:
        return bits, observed / (hot @ units.tokens)[:, :, None, None]
    return bits, np.minimum(_over(observed, expected) * units.observed.sum(0) / units.tokens.sum(), 1.0)


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 1 where b is 0: nothing was expected, and nothing is there."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.ones(a.shape), where=b > 0)


def _spread(rates: np.ndarray) -> np.ndarray:
    """Cohen's h of the highest and the lowest of the rates [..., C, L, E]: [..., L, E]."""
    angles = 2 * np.arcsin(np.sqrt(rates))
    return angles.max(-3) - angles.min(-3)


def _between(rates: np.ndarray, most: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Cohen's h of rates [R, C, L, E] between labels most and least [L, E]: [R, L, E]."""
    a, b = (np.take_along_axis(rates, label[None, None], 1)[:, 0] for label in (most, least))
    return 2 * (np.arcsin(np.sqrt(a)) - np.arcsin(np.sqrt(b)))


def _beside(bits: np.ndarray, null: np.ndarray, boot: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of Specialisation.layers, from bits [L], null [R, L] and boot [R, L]."""
    mean, sd = null.mean(0), null.std(0, ddof=1)
    null_low, null_high = np.quantile(null, [0.025, 0.975], 0)
    low, high = np.quantile(boot - boot.mean(0), [0.025, 0.975], 0) + bits - mean
    return {
        "observed": bits,
        "null": mean,
        "null_low": null_low,
        "null_high": null_high,
        "effect": bits - mean,
        "effect_sd": np.divide(bits - mean, sd, out=np.zeros_like(sd), where=sd > 1e-12),
        "low": low,
        "high": high,
        "p": (1 + (null >= bits - 1e-12).sum(0)) / (1 + len(null)),
    }


def _table(
    names: list[str],
    layers: tuple[int, ...],
    rates: np.ndarray,
    h: np.ndarray,
    boot: np.ndarray,
    p: np.ndarray,
) -> pd.DataFrame:
    count = rates.shape[2]
    flat = rates.reshape(len(names), -1)
    table = pd.DataFrame({"layer": np.repeat(layers, count), "expert": np.tile(np.arange(count), len(layers))})
    table[[f"in {name}" for name in names]] = flat.T
    table["most"], table["least"] = np.array(names)[flat.argmax(0)], np.array(names)[flat.argmin(0)]
    low, high = (part.ravel() for part in np.quantile(boot, [0.025, 0.975], 0))
    table = table.assign(difference=flat.max(0) - flat.min(0), h=h.ravel(), h_low=low, h_high=high)
    return table.assign(p=p.ravel(), q=adjusted(p).ravel())


def _rarest(sizes: list[int]) -> float:
    """Chance that a shuffle divides the units as they were, into groups of these sizes, whatever these are called."""
    same = [*sizes, *Counter(sizes).values()]
    return math.exp(sum(math.lgamma(n + 1) for n in same) - math.lgamma(sum(sizes) + 1))
