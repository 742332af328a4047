"""What the line below a conversation must know of its cache."""

from collections.abc import Sequence

import torch

from workbench.config import Config
from workbench.formats import Plain, Row, cache_format
from workbench.turns import Turn
from workbench.workbench import Workbench


def cache_factor(config: Config, format: str = "bf16") -> float:
    """How many times as much multi-head attention with the same heads would cache: at the same precision, or in bf16
    beside a packed format.
    """
    stored = cache_format(format)
    element = stored.dtype if isinstance(stored, Plain) else torch.bfloat16
    row = Row(config.kv_lora_rank, config.qk_rope_head_dim)
    return config.mha_width * element.itemsize / stored.nbytes(row)


def cache_facts(bench: Workbench) -> dict:
    """{cache_format, cache_factor, cache_held}. The last is [tokens of a context, bytes], see `held_after`."""
    format = bench.engine.cache_format
    return {"cache_format": format, "cache_factor": cache_factor(bench.config, format), "cache_held": None}


def held_after(bench: Workbench, turns: Sequence[Turn]) -> list[int] | None:
    """What the cache holds since it was converted, [tokens of the context, bytes]: the figures of the last reply are of
    before. It counts as long as the context has as many tokens.
    """
    said = [turn for turn in turns if turn.stats.get("tokens")]
    if not said:
        return None
    cache = bench.engine.cache
    used = said[-1].stats["prompt_tokens"] + said[-1].stats["tokens"]
    return [used, cache.nbytes if cache is not None else 0]
