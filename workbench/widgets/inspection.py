"""One token, opened: what is known about it. What nobody recorded is None, and how to get it is said in its place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import numpy as np

from workbench.edits import describe, from_dict
from workbench.errors import RequestError
from workbench.trace import Trace

CONTEXT = 40  # tokens of the text around the one that is open
HOW = {
    "alternatives": "a trace keeps none; click the token in the chat, or open it from a live model",
    "scores": "record with scores=True, or open the token from a live model",
    "parts": "a trace keeps no activations; open the token from a live model",
    "lens": "a trace keeps no activations; open the token from a live model",
    "layers": "nothing: it was generated last, so no pass has read it yet",
}


class Alternative(NamedTuple):
    """A token that could have stood here: its probability under the model, and after sampling (0: cut off)."""

    id: int
    text: str
    before: float | None
    after: float | None


class Word(NamedTuple):
    """A token an expert pushes towards (or, below 0, away from), and by how much, in logits."""

    text: str
    logit: float


@dataclass(frozen=True)
class RoutedLayer:
    """How one layer routed the token. Probabilities are the router's, over all experts.

    experts      the chosen, strongest first; gates: weights of their outputs, scaling included
    margins      of each chosen: its probability less that of the best expert left out; below 0 where it was forced
    scores       [experts of the model] probability of every expert
    groups_kept  the groups the choice was limited to; None: unknown, or there is but one group
    routed_norm, shared_norm, cosine   lengths of what routed and shared experts add, and the cosine between the two
    lens         for each chosen expert, what it pushes towards
    """

    layer: int
    experts: tuple[int, ...]
    gates: tuple[float, ...]
    margins: tuple[float, ...]
    scores: np.ndarray | None = None
    groups_kept: tuple[int, ...] | None = None
    routed_norm: float | None = None
    shared_norm: float | None = None
    cosine: float | None = None
    lens: Mapping[int, tuple[Word, ...]] | None = None

    @property
    def margin(self) -> float | None:
        """At the cut: of the weakest chosen expert."""
        known = [margin for margin in self.margins if not math.isnan(margin)]
        return min(known, default=None)


@dataclass(frozen=True)
class Inspection:
    """All that is known about one token. The experts in `layers` are those that read it, to predict the next one.

    token          its number in the trace; position: in its sequence; before, after: the text around it
    probability    after sampling, logprob (natural) and entropy (nats) of the model alone; ms: the step that chose it
    alternatives   what could have stood in its place
    edits          those in force, in words
    how            for every part that is missing, how to get it
    """

    token: int
    position: int
    id: int
    text: str
    phase: str
    n_experts: int
    n_group: int = 1
    topk_group: int = 1
    layers: tuple[RoutedLayer, ...] = ()
    before: str = ""
    after: str = ""
    logprob: float | None = None
    probability: float | None = None
    entropy: float | None = None
    ms: float | None = None
    alternatives: tuple[Alternative, ...] | None = None
    edits: tuple[str, ...] = ()
    model: str = ""
    how: Mapping[str, str] = field(default_factory=lambda: HOW)

    def layer(self, layer: int) -> RoutedLayer:
        """RequestError for a layer that was not recorded."""
        for each in self.layers:
            if each.layer == layer:
                return each
        known = ", ".join(str(each.layer) for each in self.layers) or "none"
        raise RequestError(f"layer {layer} was not recorded for this token; there are {known}.")


def groups_kept(scores: np.ndarray, n_group: int, topk_group: int) -> tuple[int, ...]:
    """The `topk_group` groups whose best expert is best, ascending; `scores` [experts] (paper, 2.2.2)."""
    best = np.asarray(scores).reshape(n_group, -1).max(-1)
    return tuple(sorted(np.argsort(-best, kind="stable")[:topk_group].tolist()))


def inspect_trace(trace: Trace, token: int) -> Inspection:
    """What a trace knows of its token number `token`. RequestError if there is none."""
    if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < len(trace):
        raise RequestError(f"there is no token {token}; the trace has {len(trace)}, from 0.")
    token, row, config = int(token), trace.tokens.iloc[token], trace.header["config"]
    grouped = config.get("topk_method") == "group_limited_greedy"
    groups = (config["n_group"], config["topk_group"]) if grouped else (1, 1)
    near = trace.tokens.iloc[max(0, token - CONTEXT) : token + CONTEXT + 1]
    near = near[near["sequence"] == row["sequence"]]["text"]
    return Inspection(
        token=token, position=int(row["position"]), id=int(row["id"]), text=row["text"], phase=row["phase"],
        n_experts=config["n_routed_experts"], n_group=groups[0], topk_group=groups[1],
        layers=_layers(trace, token, groups), before="".join(near[near.index < token]),
        after="".join(near[near.index > token]), logprob=_known(row["logprob"]), probability=_known(row["probability"]),
        entropy=_known(row["entropy"]), ms=_known(row["ms"]), model=trace.header.get("model", ""),
        edits=tuple(describe(from_dict(edit)) for edit in _edits(trace, int(row["sequence"]))),
    )  # fmt: skip


def _layers(trace: Trace, token: int, groups: tuple[int, int]) -> tuple[RoutedLayer, ...]:
    layers = []
    for place, layer in enumerate(trace.layers):
        used = trace.experts[token, place] >= 0
        if not used.any():
            continue
        scores = None if trace.scores is None else np.asarray(trace.scores[token, place], np.float32)
        if scores is not None and not np.isfinite(scores).all():
            scores = None
        kept = groups_kept(scores, *groups) if scores is not None and groups[0] > 1 else None
        lists = (values[token, place][used].tolist() for values in (trace.experts, trace.gates, trace.margins))
        layers.append(RoutedLayer(layer, *map(tuple, lists), scores, kept))
    return tuple(layers)


def _edits(trace: Trace, sequence: int) -> list[dict]:
    """Traces that were joined keep what differs between them with each sequence."""
    edits = trace.header.get("edits")
    return trace.header["sequences"][sequence].get("edits") or [] if edits is None else edits


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def as_text(seen: Inspection | None) -> str:
    """For a terminal, and for a notebook that is only read."""
    if seen is None:
        return "Token inspector: no token is open"
    lines = [f"Token {seen.text!r}: {', '.join(_facts(seen))}"]
    for layer in seen.layers:
        chosen = zip(layer.experts, layer.gates, layer.margins)
        experts = ", ".join(f"{expert} (gate {gate:.3g}, margin {margin:.2g})" for expert, gate, margin in chosen)
        lines.append(f"layer {layer.layer}: experts {experts}")
    return "\n".join(lines if seen.layers else [*lines, f"not recorded: {seen.how['layers']}"])


def as_html(seen: Inspection | None) -> str:
    """The same as a table, every character escaped."""
    if seen is None:
        return "<p>Token inspector: no token is open.</p>"
    head = "".join(f"<th>{name}</th>" for name in ("layer", "experts", "gates", "margin at the cut"))
    rows = [
        f"<tr><td>{layer.layer}</td><td>{', '.join(map(str, layer.experts))}</td>"
        f"<td>{', '.join(f'{gate:.3g}' for gate in layer.gates)}</td>"
        f"<td>{'' if layer.margin is None else f'{layer.margin:.2g}'}</td></tr>"
        for layer in seen.layers
    ]
    body = f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else f"<p>{escape(seen.how['layers'])}</p>"
    facts = escape(", ".join(_facts(seen)))
    return f"<section><p>Token <code>{escape(seen.text)}</code>: {facts}</p>{body}</section>"


def _facts(seen: Inspection) -> list[str]:
    facts = [f"id {seen.id}", f"position {seen.position}", "prompt" if seen.phase == "prefill" else "generated"]
    if seen.probability is not None:
        facts.append(f"probability {seen.probability:.1%}")
    if seen.entropy is not None:
        facts.append(f"entropy {seen.entropy:.2f} nats")
    return facts + ([f"{seen.ms:.1f} ms"] if seen.ms is not None else [])
