"""Traces of chance, for what only needs their form."""

import numpy as np
import pandas as pd

from workbench.trace import Trace, new_header

POCKET = {"n_routed_experts": 32, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}


def random_trace(
    lengths=(5, 3), layers=(1, 2, 4), k=3, experts=8, *, seed=0, unread=0.2, scores=False, events=0, **header
) -> Trace:
    """A sequence of each length; of the tokens, a share `unread` and the last of each sequence were never read."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0)
    shape = (tokens, len(layers), k)
    ids = np.argsort(rng.random((tokens, len(layers), experts)), -1)[..., :k]
    gates, margins = rng.random(shape, np.float32), rng.normal(size=shape).astype(np.float32)
    never = rng.random(tokens) < unread
    never[np.cumsum(lengths, dtype=int)[np.array(lengths, dtype=int) > 0] - 1] = True
    ids[never], gates[never], margins[never] = -1, 0, np.nan
    probs = rng.dirichlet(np.ones(experts), shape[:2]).astype(np.float32) if scores else None
    if scores:
        probs[never] = np.nan
    words = np.array(["a", " the", "\n", "", "你", "🦊", "<0xE4>", "it's", "\x00"], dtype=object)
    table = {
        "sequence": sequence, "position": position, "id": rng.integers(0, 100_000, tokens),
        "text": pd.Series(rng.choice(words, tokens), dtype=object),
        "phase": np.where(position < np.array(lengths)[sequence] / 2, "prefill", "decode") if tokens else [],
        "logprob": -rng.random(tokens), "probability": rng.random(tokens), "entropy": rng.random(tokens),
        "ms": rng.random(tokens), "cache_bytes": np.arange(tokens) * 480 - 1,
    }  # fmt: skip
    frame = pd.DataFrame(table)
    frame.loc[frame["phase"] == "prefill", ["logprob", "ms"]] = np.nan
    seen = pd.DataFrame(
        {
            "token": rng.integers(0, max(tokens, 1), events), "kind": rng.choice(["hit", "miss"], events),
            "layer": rng.choice(layers, events) if events else [], "expert": rng.integers(0, experts, events),
            "bytes": rng.integers(0, 1 << 40, events), "ms": rng.random(events),
        }
    )  # fmt: skip
    config = header.pop("config", {"n_routed_experts": experts})
    given = {"sequences": [{"label": f"text {n}", "seed": n} for n in range(len(lengths))]} | header
    return Trace(new_header("chance", "0" * 8, config, **given), frame, layers, ids, gates, margins, probs, seen)
