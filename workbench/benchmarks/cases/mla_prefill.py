"""mla_prefill: attention of prompts, whole or the end of a longer one, with a key and a value for each head."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from workbench import ops
from workbench.benchmarks.cases.compare import close

TENSOR_CORES = ("mla_prefill_kernel",)


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random. Values are views of what kv_up gives, where a head's key content lies beside its value."""
    dtype, spans, longest, heads, width, wide = example
    count, length = (sum(each) for each in zip(*spans))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    def starts(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)

    value = random(length, heads, width + wide)[..., width:]
    query = random(count, heads, width) * 2
    return query, random(length, heads, width), value, *map(starts, zip(*spans)), longest, width**-0.5


reference = ops.mla_prefill.__wrapped__


def truth(query, key, value, query_starts, key_starts, longest: int, scale: float) -> torch.Tensor:
    made = []
    spans = zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True)
    for (first, last), (start, end) in spans:
        scores = torch.einsum("thw,shw->hts", query[first:last].double(), key[start:end].double()) * scale
        future = torch.ones_like(scores, dtype=torch.bool).triu(end - start - (last - first) + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        made.append(torch.einsum("hts,shv->thv", weights, value[start:end].double()))
    return torch.cat(made)


check = close


def peer(query, key, value, query_starts, key_starts, longest: int, scale: float):
    """torch's own, of one sequence; it has none for several of different lengths."""
    if len(query_starts) != 2:
        return None
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1])) if query.shape[-1] > value.shape[-1] else value
    query, key, wide = (x.transpose(0, 1)[None] for x in (query, key, wide))
    if query.shape[2] == key.shape[2]:
        return lambda: F.scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scale)
    past = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    past = past.tril(key.shape[2] - query.shape[2])
    return lambda: F.scaled_dot_product_attention(query, key, wide, attn_mask=past, scale=scale)
