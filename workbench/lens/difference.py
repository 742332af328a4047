"""Two traces side by side: where their tokens part, how far their routing differs, and what was set differently.

N aligned tokens, L layers that both have, K slots.
"""

from collections.abc import Iterator
from functools import cached_property
from html import escape

import numpy as np
import pandas as pd

from workbench.edits import describe, from_dict
from workbench.errors import RequestError
from workbench.trace import Trace

IGNORED = ("format", "version", "created", "sequences")


def diff(a: Trace, b: Trace) -> "Difference":
    """Aligned sequence by sequence and position by position. RequestError where they have no layer in common."""
    return Difference(a, b)


class Difference:
    """What differs between two traces. In layers that only one of them has, nothing is compared.

    tokens   DataFrame, a row a position that either has: sequence, position, text a, text b, same (token id), overlap
             (of routing, mean over layers; NaN where either was not read), logprob a, logprob b, logprob difference (b - a)
    routing  DataFrame, a row a layer of every position that both have read: sequence, position, layer, overlap (experts in
             both over experts in either), only a, only b (experts), gate shift (half the L1 distance of the two
             distributions of gates: 0 the same, 1 nothing in common)
    header   DataFrame with columns a and b: settings that differ, by name
    first    position of the first token that differs, in the first sequence that has one; None: all are the same
    parted   for every sequence with such a token, its position
    """

    def __init__(self, a: Trace, b: Trace) -> None:
        self.a, self.b = a, b
        self.layers = tuple(sorted(set(a.layers) & set(b.layers)))
        if not self.layers and a.layers != b.layers:
            raise RequestError(
                f"these traces have no layer in common: a has {list(a.layers)}, b has {list(b.layers)}. "
                "Record the same layers in both."
            )
        keys = ["sequence", "position"]
        rows = [t.tokens[keys].assign(**{side: np.arange(len(t))}) for side, t in (("a", a), ("b", b))]
        aligned = rows[0].merge(rows[1], on=keys, how="outer").sort_values(keys, ignore_index=True)
        in_a, in_b = aligned["a"].notna().to_numpy(), aligned["b"].notna().to_numpy()
        both = in_a & in_b
        at_a, at_b = (aligned[side].fillna(0).to_numpy(np.int64) for side in "ab")
        self._aligned, self._rows = aligned[both], (at_a[both], at_b[both])
        self.tokens = aligned[keys].copy()
        for column in ("text", "logprob"):
            for side, trace, at, known in (("a", a, at_a, in_a), ("b", b, at_b, in_b)):
                values = trace.tokens[column].reindex(np.where(known, at, -1)).to_numpy()
                self.tokens[f"{column} {side}"] = pd.Series(values, dtype=object if column == "text" else np.float32)
        ids = (trace.tokens["id"].reindex(at).to_numpy() for trace, at in ((a, at_a), (b, at_b)))
        self.tokens.insert(4, "same", both & np.equal(*ids))
        overlap = np.full(len(aligned), np.nan)
        overlap[both] = _mean(self._compared.overlap)
        self.tokens.insert(5, "overlap", overlap)
        self.tokens["logprob difference"] = self.tokens["logprob b"] - self.tokens["logprob a"]
        different = self.tokens[~self.tokens["same"]].groupby("sequence")["position"].min()
        self.parted: dict[int, int] = {int(sequence): int(position) for sequence, position in different.items()}
        self.first: int | None = next(iter(self.parted.values()), None)
        self.header = _settings(a, b)
