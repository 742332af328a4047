"""Two traces side by side: where their tokens part, how far their routing differs, and what was set differently.

N positions that both traces have, L layers that both have, K slots.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from workbench.edits import describe, from_dict
from workbench.errors import RequestError
from workbench.trace import Trace

SHOWN = 5  # sequences named, and tokens shown to each side of the first difference
KEYS = ["sequence", "position"]


def diff(a: Trace, b: Trace) -> "Difference":
    """Aligns them sequence by sequence and position by position. RequestError where they have no layer in common."""
    return Difference(a, b)


class Difference:
    """What differs between two traces, in the layers that both have.

    tokens   DataFrame, a row a position that either has: sequence, position, text a, text b, same (token id), overlap
             (of routing, mean over layers; NaN where a side has not read it), logprob a, logprob b, logprob difference
             (b - a)
    header   DataFrame, a row a setting that differs, columns a and b; edits in words
    first    position of the first token that differs, in the first sequence that has one; None where all are the same
    parted   position of the first token that differs, for every sequence that has one
    """

    def __init__(self, a: Trace, b: Trace) -> None:
        self.layers = tuple(sorted(set(a.layers) & set(b.layers)))
        if not self.layers and a.layers != b.layers:
            raise RequestError(
                f"these traces have no layer in common: a has {list(a.layers)}, b has {list(b.layers)}. "
                "Record the same layers in both."
            )
        left, right = (t.tokens[[*KEYS, "id", "text", "logprob"]].assign(row=range(len(t))) for t in (a, b))
        merged = left.merge(right, on=KEYS, how="outer", suffixes=(" a", " b")).sort_values(KEYS, ignore_index=True)
        both = merged["row a"].notna() & merged["row b"].notna()
        self._routing = _compare(a, b, self.layers, *(merged.loc[both, f"row {s}"].to_numpy(int) for s in "ab"))
        self._both = merged.loc[both, KEYS]
        merged["same"] = merged["id a"] == merged["id b"]
        merged["overlap"] = pd.Series(_mean(self._routing.overlap), merged.index[both])
        merged["logprob difference"] = merged["logprob b"] - merged["logprob a"]
        columns = ["text a", "text b", "same", "overlap", "logprob a", "logprob b", "logprob difference"]
        self.tokens = merged[[*KEYS, *columns]]
        parted = merged[~merged["same"]].groupby("sequence")["position"].min()
        self.parted: dict[int, int] = {int(sequence): int(position) for sequence, position in parted.items()}
        self.first: int | None = next(iter(self.parted.values()), None)
        self.header = _settings(a, b)

    @cached_property
    def routing(self) -> pd.DataFrame:
        """A row a layer of every position that both have read.

        sequence, position, layer; overlap: experts in both over experts in either; only a, only b: experts; gate shift:
        half the L1 distance of the two distributions of gates, 0 for the same, 1 for nothing in common.
        """
        found = self._routing
        rows, layers = np.nonzero(~np.isnan(found.overlap))
        table = self._both.iloc[rows].reset_index(drop=True)
        table["layer"] = np.array(self.layers, np.int32)[layers]
        table["overlap"] = found.overlap[rows, layers]
        for side, ids in (("a", found.only_a), ("b", found.only_b)):
            lists = [tuple(expert for expert in each if expert >= 0) for each in ids[rows, layers].tolist()]
            table[f"only {side}"] = pd.Series(lists, dtype=object)
        table["gate shift"] = found.shift[rows, layers]
        return table

    @property
    def identical(self) -> bool:
        """The same settings, tokens, experts, gates and log-probabilities. Times are not compared."""
        same = self.tokens["logprob a"].equals(self.tokens["logprob b"])
        return self.header.empty and self.first is None and self._routing.exact and same

    def summary(self) -> str:
        """A few lines in words."""
        if self.identical:
            return f"These traces are identical: {len(self.tokens):,} tokens, their routing and what was set."
        parts = (self._about_tokens, self._about_routing, self._about_logprobs, self._about_settings)
        return "\n".join(line for part in parts for line in part())

    def _about_tokens(self) -> Iterator[str]:
        if not self.parted:
            yield f"Both have the same {len(self.tokens):,} tokens."
        for sequence, position in list(self.parted.items())[:SHOWN]:
            at = self.tokens.set_index(KEYS).loc[(sequence, position), ["text a", "text b"]]
            words = (repr(text) if isinstance(text, str) else "nothing" for text in at)
            yield "Sequence {} parts at position {}: {} in a, {} in b.".format(sequence, position, *words)
        if len(self.parted) > SHOWN:
            yield f"So do {len(self.parted) - SHOWN} other sequences, see `parted`."

    def _about_routing(self) -> Iterator[str]:
        if not self.layers:
            return
        if self._routing.exact:
            yield f"Where both have read, the routing is the same in {len(self.layers)} layers, gates included."
            return
        limit = self._both["sequence"].map(self.parted).fillna(np.inf)
        before = (self._both["position"] < limit).to_numpy()
        for when, rows in ((" before they part" if self.parted else "", before), (" after they part", ~before)):
            overlap, shift = self._routing.overlap[rows], self._routing.shift[rows]
            read = ~np.isnan(overlap)
            if read.any():
                means = f"Routing overlap {overlap[read].mean():.3f}, gate shift {shift[read].mean():.3f}"
                yield f"{means}: the mean of {read.any(1).sum():,} tokens{when}."

    def _about_logprobs(self) -> Iterator[str]:
        change = self.tokens.loc[self.tokens["same"], "logprob difference"].dropna()
        if len(change):
            yield f"Log-probability of the {len(change):,} same tokens: in b {change.mean():+.3f} nats on average."

    def _about_settings(self) -> Iterator[str]:
        if self.header.empty:
            yield "Nothing was set differently."
        for name, row in self.header.iterrows():
            yield f"{name}: {_short(row['a'])} in a, {_short(row['b'])} in b."

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.summary().splitlines())
        if self.first is None:
            return f"<ul>{lines}</ul>"
        at = int(np.flatnonzero(~self.tokens["same"])[0])
        near = self.tokens.iloc[max(0, at - SHOWN) : at + SHOWN + 1]
        return f"<ul>{lines}</ul>{near.to_html(index=False, na_rep='', border=0, float_format='{:.3f}'.format)}"


class Compared(NamedTuple):
    """Routing of the positions that both have."""

    overlap: np.ndarray  # [N, L]; NaN where a side has not read the token
    shift: np.ndarray  # [N, L], likewise
    only_a: np.ndarray  # [N, L, K] experts; -1 elsewhere
    only_b: np.ndarray
    exact: bool  # the same experts with the same gates


def _compare(a: Trace, b: Trace, layers: tuple[int, ...], rows_a: np.ndarray, rows_b: np.ndarray) -> Compared:
    experts_a, gates_a = _part(a, layers, rows_a)
    experts_b, gates_b = _part(b, layers, rows_b)
    pairs = (experts_a[..., :, None] == experts_b[..., None, :]) & (experts_a >= 0)[..., None]  # [N, L, K of a, K of b]
    in_b, in_a = pairs.any(-1), pairs.any(-2)
    used_a, used_b = (experts_a >= 0).sum(-1), (experts_b >= 0).sum(-1)
    read = (used_a > 0) & (used_b > 0)
    common = in_b.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = np.where(read, common / (used_a + used_b - common), np.nan)
        share_a, share_b = gates_a / gates_a.sum(-1, keepdims=True), gates_b / gates_b.sum(-1, keepdims=True)
    there = np.where(pairs, share_b[..., None, :], 0).sum(-1)  # b's share of each expert of a
    shift = (np.abs(share_a - there).sum(-1) + np.where(in_a, 0, share_b).sum(-1)) / 2
    only_a, only_b = np.where(in_b, -1, experts_a), np.where(in_a, -1, experts_b)
    exact = np.array_equal(experts_a, experts_b) and np.array_equal(gates_a, gates_b)
    return Compared(overlap, np.where(read, shift, np.nan), only_a, only_b, exact)


def _part(trace: Trace, layers: tuple[int, ...], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates [N, L, K]."""
    at = np.searchsorted(trace.layers, layers)
    return trace.experts[rows][:, at], trace.gates[rows][:, at].astype(np.float64)


def _mean(overlap: np.ndarray) -> np.ndarray:
    """[N]: over the layers that have a value."""
    known = ~np.isnan(overlap)
    with np.errstate(invalid="ignore"):
        return np.where(known, overlap, 0).sum(1) / known.sum(1)


def _settings(a: Trace, b: Trace) -> pd.DataFrame:
    in_a, in_b = dict(_flat(a)), dict(_flat(b))
    names = [name for name in dict.fromkeys([*in_a, *in_b]) if in_a.get(name) != in_b.get(name)]
    values = {side: [_worded(name, found.get(name)) for name in names] for side, found in (("a", in_a), ("b", in_b))}
    return pd.DataFrame(values, index=pd.Index(names, name="setting"), dtype=object)


def _flat(trace: Trace) -> Iterator[tuple[str, object]]:
    """Every setting by a name such as config.n_group; when the trace was made is not one."""
    for key, value in trace.header.items():
        if key in ("config", "sampling", "versions") and isinstance(value, dict):
            yield from ((f"{key}.{name}", each) for name, each in value.items())
        elif key not in ("sequences", "created"):
            yield key, value
    yield "layers", list(trace.layers)
    for number, entry in enumerate(trace.header["sequences"]):
        yield from ((f"sequences[{number}].{name}", each) for name, each in entry.items() if name != "created")


def _worded(name: str, value: object) -> object:
    if name.rpartition(".")[2] != "edits" or not isinstance(value, list):
        return value
    return "; ".join(map(_edit, value)) or "none"


def _edit(data: dict) -> str:
    try:
        return describe(from_dict(data))
    except RequestError:  # of another version: shown as it is
        return _short(data)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
