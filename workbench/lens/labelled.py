"""The tokens of texts that carry a label, and how often each expert read them.

N tokens, S sequences, U units, C labels, L recorded layers, K slots, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from workbench.errors import RequestError
from workbench.trace import PHASES, Trace


class Labelled(NamedTuple):
    """The tokens that were read, of sequences that have a label; sequences and labels are numbered from 0."""

    names: list[str]  # [C]
    label: np.ndarray  # [S]
    sequence: np.ndarray  # [N]
    ids: np.ndarray  # [N]
    experts: np.ndarray  # [N, L, K]
    gates: np.ndarray  # [N, L, K]
    n_experts: int

    def only(self, tokens: np.ndarray) -> "Labelled":
        """Without the other tokens, `tokens` [N] bool, and without sequences and labels of which none is left."""
        kept, sequence = np.unique(self.sequence[tokens], return_inverse=True)
        which, label = np.unique(self.label[kept], return_inverse=True)
        return self._replace(
            names=[self.names[n] for n in which],
            label=label,
            sequence=sequence,
            ids=self.ids[tokens],
            experts=self.experts[tokens],
            gates=self.gates[tokens],
        )

    def sums(self, unit: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sums [U, L, E] of weights [N, L, K] by unit [N] and expert. Weights of unused slots must be 0."""
        units, count = int(unit.max()) + 1, self.n_experts
        cell = unit[:, None, None] * count + np.maximum(self.experts, 0)
        layers = range(self.experts.shape[1])
        flat = [np.bincount(cell[:, n].ravel(), weights[:, n].ravel(), units * count) for n in layers]
        return np.stack([each.reshape(units, count) for each in flat], 1)


def labelled(trace: Trace, labels: Sequence[str | None] | None, phase: str | None) -> Labelled:
    """Labels from the header, or given one a sequence, None for those to leave out. RequestError if nothing is left."""
    if phase not in (None, *PHASES):
        raise RequestError(f"phase must be 'prefill', 'decode' or None; got {phase!r}.")
    sequences = trace.header["sequences"]
    if labels is None:
        labels = [sequence.get("label") for sequence in sequences]
        if None in labels:
            raise RequestError(
                f"sequence {labels.index(None)} has no label in the trace: give labels=, one a sequence, "
                "None for those to leave out."
            )
    if len(labels) != len(sequences):
        raise RequestError(f"{len(labels)} labels for {len(sequences)} sequences: give one each.")
    names = sorted({label for label in labels if label is not None}, key=str)
    label = np.array([-1 if each is None else names.index(each) for each in labels], int)
    sequence = trace.tokens["sequence"].to_numpy()
    read = (trace.experts >= 0).any((1, 2)) & (label[sequence] >= 0)
    if phase:
        read &= (trace.tokens["phase"] == phase).to_numpy()
    if not read.any():
        raise RequestError(f"no token of a sequence with a label was read{f' in {phase}' if phase else ''}.")
    ids = trace.tokens["id"].to_numpy()
    return Labelled(names, label, sequence, ids, trace.experts, trace.gates, trace.n_experts).only(read)


def under_two_labels(read: Labelled) -> Labelled:
    """Only tokens of the vocabulary that occur under two labels or more. RequestError if there are none."""
    seen, token = np.unique(read.ids, return_inverse=True)
    under = np.zeros((len(seen), len(read.names)), bool)
    under[token, read.label[read.sequence]] = True
    shared = under.sum(1)[token] >= 2
    if not shared.any():
        raise RequestError("no token of the vocabulary occurs under two labels: nothing is left to compare.")
    return read.only(shared)


class Units(NamedTuple):
    """What may change its label: a text, or a token. expected: what the tokens alone predict; None: alike for all."""

    label: np.ndarray  # [U]
    tokens: np.ndarray  # [U]
    observed: np.ndarray  # [U, L, E] choices
    expected: np.ndarray | None  # [U, L, E]


def units_of(read: Labelled, unit: str, control: str | None) -> Units:
    """unit: "sequence" or "token". control="token": expected are the experts of each token, pooled over all texts."""
    number, label = read.sequence, read.label
    if unit == "token":
        number, label = np.arange(len(read.sequence)), read.label[read.sequence]
    used = (read.experts >= 0).astype(float)
    observed, expected = read.sums(number, used), None
    if control == "token":
        seen, token = np.unique(read.ids, return_inverse=True)
        has = np.zeros((len(label), len(seen)))  # how often each unit has each token
        np.add.at(has, (number, token), 1)
        pooled = read.sums(token, used) / has.sum(0)[:, None, None]
        expected = np.tensordot(has, pooled, 1)
    return Units(label, np.bincount(number).astype(float), observed, expected)
