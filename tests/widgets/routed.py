"""Traces whose choices follow from their scores, as a router of pocket's or V2-Lite's form would make them."""

import zlib

import numpy as np
import pandas as pd

from workbench.trace import Trace, new_header

GROUPED = {
    "n_routed_experts": 32, "num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 8,
    "topk_group": 3, "routed_scaling_factor": 4.0,
}  # fmt: skip
GREEDY = {
    "n_routed_experts": 64, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0,
}  # fmt: skip


def routed_trace(texts, prompt=2, config=GROUPED, layers=(1, 2, 5), seed=0, scores=True, **header):
    """A token a text, the first `prompt` of them given; the last was never read."""
    rng = np.random.default_rng(seed)
    count, experts, k = len(texts), config["n_routed_experts"], config["num_experts_per_tok"]
    logits = rng.normal(size=(count, len(layers), experts))
    probs = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    best = probs.reshape(count, len(layers), config["n_group"], -1).max(-1)
    kept = best >= np.sort(best, -1)[..., -config["topk_group"], None]
    allowed = probs * np.repeat(kept, experts // config["n_group"], -1)
    ids = np.argsort(-allowed, -1)[..., : k + 1]
    found = np.take_along_axis(allowed, ids, -1)
    ids, gates = ids[..., :k].astype(np.int16), found[..., :k] * config["routed_scaling_factor"]
    margins = found[..., :k] - found[..., k:]
    ids[-1], gates[-1], margins[-1], probs[-1] = -1, 0, np.nan, np.nan
    generated = np.arange(count) >= prompt
    measured = np.where(generated, 1.0, np.nan)
    tokens = pd.DataFrame(
        {
            "sequence": 0, "position": range(count), "text": texts,
            "id": [zlib.crc32(text.encode()) >> 1 for text in texts], "phase": np.where(generated, "decode", "prefill"),
            "logprob": -0.5 * measured, "probability": 0.75 * measured, "entropy": 1.25 * measured,
            "ms": 12.5 * measured, "cache_bytes": 480 * np.arange(count),
        }
    )  # fmt: skip
    made = new_header("pocket", "0" * 8, config, sequences=[{"prompt_tokens": prompt}], **header)
    return Trace(made, tokens, layers, ids, gates.astype(np.float32), margins, probs if scores else None)


class Wire(list):
    """What a view sends, as it arrives: (message, buffers)."""

    def of(self, kind):
        return [message for message, _ in self if message["kind"] == kind]
