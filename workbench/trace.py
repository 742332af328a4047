"""Trace: what a model did, token by token, and what it was. One parquet file, versioned; no model and no torch needed.

T tokens, L recorded layers, K slots of a layer, E routed experts.
"""

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import __version__
from workbench.errors import RequestError
from workbench.tracefile import EVENTS, FORMAT, TOKENS, VERSION, Parts, read, write

PHASES = ("prefill", "decode")
SHOWN = 12  # tokens in the table of a notebook
NEEDED = {"format": str, "version": int, "fingerprint": str, "config": dict, "sequences": list}  # in every header
HEADER = [*NEEDED, "model", "sampling", "edits", "versions", "created"]


def new_header(
    model: str,
    fingerprint: str,
    config: Mapping,
    *,
    sampling: Mapping | None = None,
    edits: Iterable[Mapping] = (),
    sequences: Iterable[Mapping] = ({},),
) -> dict:
    """The header of a trace that is being recorded now. JSON values only.

    fingerprint  hash of the weights
    config       the content of the checkpoint's config.json
    sequences    what is known of each sequence, in order; there must be one for every sequence of the trace
    """
    versions = {"workbench": __version__, "python": platform.python_version(), "numpy": np.__version__}
    if sys.modules.get("torch") is not None:
        versions["torch"] = str(sys.modules["torch"].__version__)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "fingerprint": fingerprint,
        "config": dict(config),
        "sampling": None if sampling is None else dict(sampling),
        "edits": [dict(edit) for edit in edits],
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sequences": [dict(sequence) for sequence in sequences],
    }


class Trace:
    """Sequences of tokens, one after the other, with the experts that read each. A value: its arrays are read-only.

    header   JSON values, see `new_header`. In a trace joined from several, what differs between them (sampling, edits,
             created ...) is None here and stands in the entry of each sequence
    tokens   DataFrame, a row a token: sequence, position in it, id, text, phase ("prefill": of the prompt | "decode":
             generated), logprob (natural, of the model alone), probability (after sampling), entropy (nats), ms (of its
             step), cache_bytes (held after it). Not known: NaN, cache_bytes -1
    layers   the mixture-of-experts layers that were recorded, ascending
    experts  int16 [T, L, K], those that read the token, strongest first; -1: slot not used. A token that was generated
             last was never read: all its slots are -1
    gates    float32 [T, L, K], weight of each expert's output; 0 where unused
    margins  float32 [T, L, K], router probability of the slot's expert minus that of the best expert that was not
             chosen: negative where it was forced, NaN where unused
    scores   float32 [T, L, E], all router probabilities (NaN: unread), or None
    events   DataFrame: token, kind ("hit", "miss" ...), layer, expert, bytes, ms; in order of tokens, may be empty

    RequestError where the parts do not fit each other.
    """

    def __init__(
        self,
        header: Mapping,
        tokens: pd.DataFrame,
        layers: Sequence[int],
        experts: np.ndarray,
        gates: np.ndarray,
        margins: np.ndarray,
        scores: np.ndarray | None = None,
        events: pd.DataFrame | None = None,
    ) -> None:
        self.header = _header(header)
        self.tokens = _frame(tokens, TOKENS, "tokens")
        self.layers = tuple(_exact(list(layers), np.int64, "layers").tolist())
        self.experts = _exact(experts, np.int16, "experts")
        self.gates = _exact(gates, np.float32, "gates")
        self.margins = _exact(margins, np.float32, "margins")
        self.scores = None if scores is None else _exact(scores, np.float32, "scores")
        self.events = _frame(pd.DataFrame(columns=list(EVENTS)) if events is None else events, EVENTS, "events")
        self._check_tokens()
        self._check_routing()
        self.events = self.events.sort_values("token", kind="stable", ignore_index=True)
        for array in (self.experts, self.gates, self.margins, self.scores):
            if array is not None:
                array.flags.writeable = False

    def _check_tokens(self) -> None:
        phases = set(self.tokens["phase"]) - set(PHASES)
        _demand(not phases, f"phase is 'prefill' or 'decode', not {', '.join(map(repr, sorted(phases)))}")
        sequence, position = self.tokens["sequence"].to_numpy(), self.tokens["position"].to_numpy()
        count = len(self.header["sequences"])
        inside = ((sequence >= 0) & (sequence < count)).all() and (np.diff(sequence) >= 0).all()
        _demand(inside, f"sequences must follow one another, numbered from 0, and the header describes {count} of them")
        rising = (np.diff(position) > 0) | (np.diff(sequence) > 0)
        _demand(rising.all() and (position >= 0).all(), "positions must rise within a sequence, from 0 or more")
        at = self.events["token"]
        _demand(at.between(0, len(self) - 1).all(), f"events must be of tokens 0 to {len(self) - 1}")

    def _check_routing(self) -> None:
        layers, experts = self.layers, self.experts
        _demand(all(a < b for a, b in zip((-1, *layers), layers)), f"layers must be ascending, not {layers}")
        fits = experts.ndim == 3 and experts.shape[:2] == (len(self), len(layers))
        _demand(fits, f"experts must be [{len(self)} tokens, {len(layers)} layers, K], not {list(experts.shape)}")
        for name, array in (("gates", self.gates), ("margins", self.margins)):
            _demand(
                array.shape == experts.shape, f"{name} {list(array.shape)} must be as experts {list(experts.shape)}"
            )
        if self.scores is not None:
            wanted = (*experts.shape[:2], self.n_experts)
            _demand(self.scores.shape == wanted, f"scores must be {list(wanted)}, not {list(self.scores.shape)}")
        if not layers:
            return
        in_range = (experts >= -1).all() and (experts < self.n_experts).all()
        _demand(in_range, f"experts must be -1 (not used) or from 0 to {self.n_experts - 1}, as the config has them")
        ordered = np.sort(experts, -1)
        _demand(
            not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(), "an expert is there twice"
        )
        unused = experts < 0
        _demand(not self.gates[unused].any(), "gates must be 0 where a slot is not used")
        _demand(np.isnan(self.margins[unused]).all(), "margins must be NaN where a slot is not used")
        self.gates[unused], self.margins[unused] = 0.0, np.nan  # one zero and one NaN, of all there are

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def k(self) -> int:
        """Slots of a layer: the most experts that can read a token there."""
        return self.experts.shape[2]

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer; 0 for a model without."""
        return self.header["config"].get("n_routed_experts") or 0

    @cached_property
    def routing(self) -> pd.DataFrame:
        """A row a used slot: token, layer, slot, expert, gate, margin."""
        used = self.experts >= 0
        token, layer, slot = np.nonzero(used)
        return pd.DataFrame(
            {
                "token": token.astype(np.int64),
                "layer": np.array(self.layers, np.int32)[layer],
                "slot": slot.astype(np.int8),
                "expert": self.experts[used],
                "gate": self.gates[used],
                "margin": self.margins[used],
            }
        )

    def sequence(self, number: int) -> "Trace":
        """That sequence alone, as number 0."""
        count = len(self.header["sequences"])
        if not 0 <= number < count:
            raise RequestError(f"no sequence {number}: this trace has {count}, numbered from 0.")
        start, stop = np.searchsorted(self.tokens["sequence"], (number, number + 1)).tolist()
        own = self.header["sequences"][number]
        moved = {key: own[key] for key in own if key in HEADER and self.header.get(key) is None}
        header = self.header | moved | {"sequences": [{key: own[key] for key in own if key not in moved}]}
        events = self.events[self.events["token"].between(start, stop - 1)]
        arrays = [None if a is None else a[start:stop] for a in (self.experts, self.gates, self.margins, self.scores)]
        tokens = self.tokens.iloc[start:stop].assign(sequence=0)
        return Trace(header, tokens, self.layers, *arrays, events.assign(token=events["token"] - start))

    @classmethod
    def join(cls, traces: "Iterable[Trace]") -> "Trace":
        """The sequences of all, renumbered. RequestError unless model, layers and slots are the same.

        Router scores that only some of them have are NaN for the others.
        """
        traces = list(traces)
        if not traces:
            raise RequestError("there is no trace to join.")
        first = traces[0]
        for other in traces[1:]:
            for name, a, b in (
                ("weights (fingerprint)", first.header["fingerprint"], other.header["fingerprint"]),
                ("config", first.header["config"], other.header["config"]),
                ("layers", first.layers, other.layers),
                ("number of slots", first.k, other.k),
            ):
                if a != b:
                    detail = "" if name == "config" else f" ({a} and {b})"
                    raise RequestError(f"traces of different {name} cannot be joined{detail}; wb.diff compares them.")
        tokens, events, before, sequences = [], [], 0, 0
        for trace in traces:
            tokens.append(trace.tokens.assign(sequence=trace.tokens["sequence"] + sequences))
            events.append(trace.events.assign(token=trace.events["token"] + before))
            before, sequences = before + len(trace), sequences + len(trace.header["sequences"])
        arrays = [np.concatenate([getattr(t, name) for t in traces]) for name in ("experts", "gates", "margins")]
        if any(trace.scores is not None for trace in traces):
            arrays.append(np.concatenate([trace._scores_or_nan() for trace in traces]))
        else:
            arrays.append(None)
        header = _joined([trace.header for trace in traces])
        return cls(header, pd.concat(tokens), first.layers, *arrays, pd.concat(events))

    def _scores_or_nan(self) -> np.ndarray:
        shape = (*self.experts.shape[:2], self.n_experts)
        return np.full(shape, np.nan, np.float32) if self.scores is None else self.scores

    def save(self, path: str | Path) -> None:
        """Writes one parquet file, which pandas and DuckDB read too. What is there stays whole until all is written."""
        names = ("header", "tokens", "layers", "experts", "gates", "margins", "scores", "events")
        write(Path(path), Parts(*(getattr(self, name) for name in names)))

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """The trace that was saved there, exactly. RequestError for all but a whole trace of a version known here."""
        parts = read(Path(path))
        try:
            return cls(*parts)
        except RequestError as error:
            raise RequestError(f"{path}: this trace is not whole: {error} Take the original.") from None

    def __eq__(self, other: object) -> bool:
        """Exact; NaN equals NaN."""
        if not isinstance(other, Trace):
            return NotImplemented
        return (
            self.header == other.header
            and self.layers == other.layers
            and self.tokens.equals(other.tokens)
            and self.events.equals(other.events)
            and all(_same(getattr(self, n), getattr(other, n)) for n in ("experts", "gates", "margins", "scores"))
        )

    def __repr__(self) -> str:
        return f"Trace({', '.join(_facts(self))})"

    def _repr_html_(self) -> str:
        shown = self.tokens.head(SHOWN)[["sequence", "position", "text", "phase", "logprob", "entropy"]]
        more = f"<p>and {len(self) - SHOWN:,} more tokens</p>" if len(self) > SHOWN else ""
        return f"<p>Trace: {escape(', '.join(_facts(self)))}</p>{shown.to_html(index=False, na_rep='', border=0)}{more}"


def _facts(trace: Trace) -> list[str]:
    written = int((trace.tokens["phase"] == "decode").sum())
    facts = [
        trace.header["model"] or "several models",
        _count(len(trace.header["sequences"]), "sequence"),
        f"{_count(len(trace) - written, 'prompt token')} and {written:,} generated",
        f"{_count(len(trace.layers), 'layer')} of {trace.k} from {trace.n_experts} experts",
    ]
    facts += ["router scores"] * (trace.scores is not None)
    facts += [_count(len(trace.events), "event")] * (len(trace.events) > 0)
    return facts + [_count(len(edits), "edit") for edits in [trace.header.get("edits")] if edits]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _demand(condition: bool, words: str) -> None:
    if not condition:
        raise RequestError(f"{words}.")


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _header(given: Mapping) -> dict:
    """A copy that is what JSON gives back."""
    try:
        header = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"the header must be JSON values ({error}).") from None
    _demand(isinstance(header, dict), "the header must be a dict, as new_header makes it")
    missing = [key for key, kind in NEEDED.items() if not isinstance(header.get(key), kind)]
    _demand(not missing, f"the header lacks {', '.join(missing)}, or has another type there; new_header makes one")
    _demand(header["format"] == FORMAT, f"the header is of a {header['format']!r}, not of a {FORMAT!r}")
    _demand(header["version"] == VERSION, f"the header is of version {header['version']}; this is version {VERSION}")
    _demand(
        all(isinstance(each, dict) for each in header["sequences"]), "each of the sequences in the header is a dict"
    )
    experts = header["config"].get("n_routed_experts")
    _demand(experts is None or type(experts) is int, f"n_routed_experts is a number, not {experts!r}")
    return dict.fromkeys(HEADER) | header


def _joined(headers: list[dict]) -> dict:
    """What all have, and in the entry of each sequence what they do not."""
    keys = dict.fromkeys(key for header in headers for key in header if key != "sequences")
    common = {key: headers[0].get(key) for key in keys if all(h.get(key) == headers[0].get(key) for h in headers)}
    entries = []
    for header in headers:
        own = {key: header.get(key) for key in keys if key not in common}
        entries += [own | entry for entry in header["sequences"]]
    return dict.fromkeys(keys) | common | {"sequences": entries}


def _frame(given: pd.DataFrame, columns: Mapping[str, type], what: str) -> pd.DataFrame:
    """A copy with these columns in this order and type, numbered from 0."""
    missing, unknown = [c for c in columns if c not in given], [str(c) for c in given if c not in columns]
    _demand(not missing, f"{what} lack the column {', '.join(missing)}")
    _demand(not unknown, f"{what} have no column {', '.join(unknown)}")
    frame = {}
    for name, kind in columns.items():
        if kind is str:
            values = given[name].tolist()
            _demand(all(isinstance(value, str) for value in values), f"{name} of {what} must be text")
            frame[name] = pd.Series(values, dtype=object)  # object: pandas' own str type refuses lone surrogates
        else:
            frame[name] = pd.Series(_exact(given[name], kind, f"{name} of {what}"))
    return pd.DataFrame(frame)


def _exact(given: object, dtype: type, what: str) -> np.ndarray:
    """A copy of that type; whole numbers stay what they are."""
    array = np.asarray(given)
    if array.size == 0:
        return np.zeros(array.shape, dtype)
    _demand(array.dtype.kind in "iufO", f"{what} must be numbers, not {array.dtype}")
    try:
        with np.errstate(invalid="ignore"):  # NaN as a whole number: found below
            converted = np.array(array, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{what} must be numbers ({error}).") from None
    whole = np.issubdtype(dtype, np.floating) or (converted == array).all()
    _demand(whole, f"{what} must be whole numbers that {np.dtype(dtype)} can hold")
    return converted
