"""Speed: how fast a token can come, from bytes and measured rates. A range that is derived, not guessed.

high   everything overlaps, at the best rate that was measured and the hit rate of the most skewed model published
low    nothing overlaps, at the worst rate, with experts drawn at random, by kernels that read more slowly than memory
       can be read, and every layer's fixed cost on top
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workbench.bandwidth import Measured

# hit rate by share of experts that are near, Qwen3-30B with LRU slots: the highest published curve known to us
SHARES, HITS = (0.0, 0.0625, 0.19, 0.38, 0.63, 1.0), (0.0, 0.366, 0.741, 0.894, 0.962, 1.0)
KERNEL = 0.5  # of what memory gives: the compiled kernel multiplies by packed experts at 33 GB/s where that is 46 to 70
LAYER = 0.5e-3  # seconds a layer takes for what is not bytes: eager PyTorch, pocket's 2.6 ms a token in 6 layers


class Span(NamedTuple):
    """Bytes a second: the worst reading and the best."""

    low: float
    high: float


@dataclass(frozen=True)
class Rates:
    """`near`: where experts are computed; `link`: from main memory to the device; `disk`. None: not there."""

    near: Span
    disk: Span | None
    link: Span | None = None

    @classmethod
    def of(cls, measured: Measured, device: str) -> "Rates":
        disk = [reading for rate in measured.disk for reading in rate.readings]
        link = measured.link.readings if measured.link and device == "cuda" else ()
        near = measured.reading(device)
        return cls(_span(near.readings), _span(disk), _span(link))


class Speed(NamedTuple):
    """`hit`: share of experts that are near; `seconds` a token by what takes them; `binds`: the longest of these."""

    tokens_per_second: float
    hit: float
    seconds: dict[str, float]
    binds: str


@dataclass(frozen=True)
class Bytes:
    """What a token moves: weights that every token passes, its experts, and how many layers there are."""

    residents: int
    experts: int
    layers: int

    @property
    def read(self) -> int:
        """From where it is computed."""
        return self.residents + self.experts

    def speed(self, rates: Rates, hit: float, behind: float = 0.0, overlap: bool = True) -> Speed:
        """At a hit rate near, and `behind` of the misses in main memory behind the device. With `overlap` memory, link
        and disk work at the same time and at their best; else one after the other, at their worst.
        """
        end = 1 if overlap else 0
        seconds = {"memory": self.read / rates.near[end] / (1 if overlap else KERNEL)}
        missed = (1 - hit) * self.experts
        if rates.link:
            seconds["link"] = missed / rates.link[end]
        if missed and behind < 1:
            seconds["disk"] = (1 - behind) * missed / rates.disk[end] if rates.disk else float("inf")
        if not overlap:
            seconds["steps"] = LAYER * self.layers
        total = max(seconds.values()) if overlap else sum(seconds.values())
        return Speed(1 / total, hit, seconds, max(seconds, key=seconds.get))


def published(share: float) -> float:
    """Hit rate of the best published cache with room for that share of all experts."""
    return float(np.interp(share, SHARES, HITS))


def _span(readings) -> Span | None:
    return Span(min(readings), max(readings)) if len(readings) else None
