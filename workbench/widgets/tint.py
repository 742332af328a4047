"""What tints the tokens of a reply in the chat beyond their records: what was cached, and who read them."""

from base64 import b64encode

import numpy as np

from workbench.config import Config
from workbench.turns import Turn
from workbench.widgets.geometry import Geometry, last_margin
from workbench.widgets.tokens import COLOURS

TINTS = ("probability", "entropy", "ms", "cache_bytes", "margin", "expert")  # those of COLOURS the chat has


def tint_facts(config: Config) -> dict:
    """What a view must know to colour tokens: {colours, layers, experts, groups}, as a TokenStrip is told."""
    geometry = Geometry.of(config)
    return {
        "colours": [{"name": name} | COLOURS[name]._asdict() for name in TINTS],
        "layers": geometry.layers,
        "experts": geometry.n_experts,
        "groups": geometry.n_group,
    }


def cache_bytes(turn: Turn, start: int) -> list[int | None]:
    """For each token of a reply from number `start` on what the cache held after it; None where nobody looked."""
    known = []
    if turn.steps and (turn.trace or turn.stream):
        first = _first(turn) + start
        rows = turn.trace.tokens[first:] if turn.trace else turn.stream.watched.tokens(turn.stream.steps, first)
        known = [held if held >= 0 else None for held in rows["cache_bytes"].tolist()]
    count = len(turn.steps) - start
    return known[:count] + [None] * (count - len(known))


def readings(turn: Turn, start: int, n_experts: int) -> dict | None:
    """How the tokens of a reply were read, from number `start` on as far as it is known; None where there is no news.

    {turn, from, to, experts, margins, rows}. The last three are in base 64, little endian, of n tokens and L layers:
    experts  [n, L] the strongest in each layer, in 8 bits or, for more than 255 experts, in 16; all bits set: none
    margins  [n] float32, the narrowest of all layers: see Trace
    rows     [n] uint8, the row of the layer where it was so narrow
    """
    if not turn.steps or not (turn.trace or turn.stream):
        return None
    first = _first(turn) + start
    if turn.trace:
        experts, margins = turn.trace.experts[first:], turn.trace.margins[first:]
    else:
        experts, _, margins = turn.stream.watched.routing(first)
    if not experts.shape[1] or not experts.shape[2]:
        return None
    read = (experts >= 0).any((1, 2))[: len(turn.steps) - start]
    count = len(read) if read.all() else int(read.argmin())
    if not count:
        return None
    experts, margins = experts[:count], margins[:count]
    by_layer = last_margin(experts, margins)
    by_layer = np.where(np.isnan(by_layer), np.inf, by_layer)
    return {
        "turn": turn.key,
        "from": start,
        "to": start + count,
        "experts": _packed(experts[:, :, 0], "<u2" if n_experts > 255 else "<u1"),  # -1 becomes all bits set
        "margins": _packed(by_layer.min(1), "<f4"),
        "rows": _packed(by_layer.argmin(1), "<u1"),
    }


def _first(turn: Turn) -> int:
    """Where a reply begins in its context. By its last token: those before it may stem from another prompt."""
    return turn.steps[-1].position + 1 - len(turn.steps)


def _packed(array: np.ndarray, dtype: str) -> str:
    return b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()
