"""Traces with the experts that a test chose, and routers that choose by chance."""

import numpy as np
import pandas as pd

from workbench.trace import Trace, new_header

NAN = np.float32("nan")


def routed(*parts, experts=8, gates=None, groups=None, labels=None, tokens=None, phase="prefill", layers=None) -> Trace:
    """parts: experts [N, L, K], one array a sequence; -1 is a slot not used.

    groups: (n_group, topk_group); labels: one a sequence; tokens: ids in the vocabulary, of all sequences.
    """
    parts = [np.asarray(part) for part in parts]
    sequence = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    position = np.concatenate([np.arange(len(part)) for part in parts])
    ids = np.concatenate(parts).astype(np.int16)
    tokens = np.arange(len(ids)) if tokens is None else np.asarray(tokens)
    frame = pd.DataFrame(
        {
            "sequence": sequence, "position": position, "id": tokens, "text": [f"w{n}" for n in tokens],
            "phase": phase, "logprob": NAN, "probability": NAN, "entropy": NAN, "ms": NAN, "cache_bytes": -1,
        }
    )  # fmt: skip
    config = {"n_routed_experts": experts, "topk_method": "greedy"}
    if groups:
        config |= {"topk_method": "group_limited_greedy", "n_group": groups[0], "topk_group": groups[1]}
    used = ids >= 0
    gates = np.where(used, 1.0, 0.0) if gates is None else gates
    sequences = [{"label": label} for label in labels] if labels else [{} for _ in parts]
    header = new_header("chance", "0" * 8, config, sequences=sequences)
    layers = layers or tuple(range(1, ids.shape[1] + 1))
    return Trace(header, frame, layers, ids, gates.astype(np.float32), np.where(used, 0.5, NAN).astype(np.float32))


def choose(logits: np.ndarray, k: int, groups: int = 1, limit: int = 1) -> np.ndarray:
    """Ids [..., k] as the router does from logits [..., E]: of the best `limit` of the groups, the k best."""
    experts = logits.shape[-1]
    of = np.arange(experts) // (experts // groups)
    best = np.stack([logits[..., of == g].max(-1) for g in range(groups)], -1)
    kept = np.zeros(best.shape, bool)
    np.put_along_axis(kept, np.argsort(-best, -1)[..., :limit], True, -1)
    return np.argsort(-np.where(kept[..., of], logits, -np.inf), -1)[..., :k]
