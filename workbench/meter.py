"""The meter: what memory should hold, what we allocated, what process and device report. Three numbers, kept apart.

theoretical      arithmetic on configuration and cache format, at as many tokens as are cached (see footprint)
allocated        the storages of the tensors we hold, each counted once (see storages)
process, device  what the operating system and the driver say; None where they say nothing
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import pandas as pd
import psutil
import torch

from workbench.cache import BLOCK, LatentCache, Pool
from workbench.footprint import TABLE, WEIGHTS, Footprint
from workbench.plan import FAR, SLOTS
from workbench.recorder import Recorder
from workbench.ring import RoutingRing
from workbench.storages import Held, measure, together, weigh

if TYPE_CHECKING:
    from workbench.workbench import Workbench

ROWS, WINDOWS, RING, RECORDED = "cache rows", "cache windows", "routing ring", "recorder"
ALLOCATED = (*WEIGHTS, TABLE, ROWS, WINDOWS, RING, RECORDED)
PROCESS = ("rss", "pss", "uss")
DEVICE = ("allocated", "reserved", "used", "total")


@dataclass(frozen=True)
class Reading:
    """Bytes at one moment, `seconds` after the meter was made. `caches`: all that are held, forks with their origin."""

    seconds: float
    caches: tuple[Held, ...]
    theoretical: Mapping[str, int]
    allocated: Mapping[str, int]
    process: Mapping[str, int | None]
    device: Mapping[str, int | None]
    on_device: bool = field(default=False, kw_only=True)  # whether our tensors are on a GPU

    @property
    def tokens(self) -> int:
        """Cached in all sequences; one that forks share counts once."""
        return sum(held.tokens for held in self.caches)

    @property
    def blocks(self) -> int:
        """Blocks of 64 tokens that are held of each layer."""
        return sum(held.blocks for held in self.caches)

    @property
    def ours(self) -> int:
        """All that we allocated."""
        return sum(self.allocated.values())

    def to_frame(self) -> pd.DataFrame:
        """A row a part of each number, in bytes; <NA> where nobody says."""
        numbers = {"theoretical": self.theoretical, "allocated": self.allocated}
        numbers |= {"process": self.process, "device": self.device}
        rows = [(number, part, size) for number, parts in numbers.items() for part, size in parts.items()]
        table = pd.DataFrame(rows, columns=["number", "part", "bytes"]).astype({"bytes": "Int64"})
        return table.set_index(["number", "part"])

    def explain(self) -> str:
        """Why the numbers differ, a line a reason."""
        return "\n".join((*self._reasons(), *self._around()))

    def _reasons(self) -> Iterator[str]:
        theory = sum(self.theoretical.values())
        yield f"By arithmetic {theory:,} B, allocated by us {self.ours:,} B: {self.ours - theory:+,} B, of which"
        padding = self.allocated[ROWS] - self.theoretical[ROWS]
        yield (
            f"  {padding:+,} B are room: {self.tokens:,} tokens are cached, and their rows come in blocks of {BLOCK}, "
            f"{self.blocks:,} of each layer, so the last block of a sequence has room for the next tokens."
        )
        looking = {part: self.allocated[part] for part in (RING, RECORDED) if self.allocated[part]}
        for part, size in looking.items():
            yield f"  {size:+,} B are the {part}: what looking needs, and no model."
        rest = self.ours - theory - padding - sum(looking.values())
        if rest:
            yield f"  {rest:+,} B are weights that are not as the configuration says."

    def _around(self) -> Iterator[str]:
        rss, pss, uss = (self.process[name] for name in PROCESS)
        yield f"The process has {rss:,} B resident (RSS)."
        if self.on_device:
            yield "  Our tensors are on the device, so they are not in it."
        elif rss >= self.ours:
            yield f"  {rss - self.ours:+,} B beside our tensors: Python, the code of PyTorch, activations, and what the"
            yield "  allocator keeps after use for the next time."
        else:
            yield f"  {rss - self.ours:+,} B: pages that nobody has touched are promised, not resident."
        known = [f"{name} {size:,} B" for name, size in (("PSS", pss), ("USS", uss)) if size is not None]
        if known:
            yield f"  {', '.join(known)}: with pages that other processes share counted in part, and left out."
        else:
            yield "  PSS and USS are not known: not asked for, or this system does not tell."
        allocated, reserved, used, total = (self.device[name] for name in DEVICE)
        if allocated is None:
            yield "No GPU is in use, so there are no numbers of a device."
            return
        yield f"PyTorch allocated {allocated:,} B there, {allocated - self.ours:+,} B: activations, workspaces."
        yield f"It reserved {reserved:,} B, {reserved - allocated:+,} B kept after use for the next time."
        yield f"Of the device {used:,} of {total:,} B are in use: with the driver's own, and other processes."


class Meter:
    """Reads the memory of a workbench and of `also`: caches and recorders that its engine did not make."""

    def __init__(self, bench: "Workbench", *also: LatentCache | Recorder):
        self.bench, self.also = bench, also
        self.config, self.device = bench.config, bench.model.device
        self._process = psutil.Process()
        self._began = perf_counter()
        self._weights = weigh(bench.model)  # they stay as they are
        plain = Footprint(self.config, 0, dtype=bench.model.dtype)
        self._theory = plain.weights | {TABLE: plain.table}
        if (plan := bench.model.plan) is not None:  # packed, or some experts elsewhere
            self._theory |= {kind: plan.near.get(kind, 0) for kind in WEIGHTS}
            self._theory["routed experts"] = plan.near[SLOTS] + plan.host.get(FAR, 0)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return perf_counter() - self._began

    def now(self, full: bool = True) -> Reading:
        """A Reading, in any thread. Without `full` PSS and USS are left out: the system walks every page for them."""
        pools, rings, recorders = self._sources()
        caches = tuple(map(measure, pools))
        wide = sum(held.window_rows * len(held.layers) for held in caches)
        return Reading(
            self.seconds,
            caches,
            self._theory
            | {
                ROWS: sum(held.written for held in caches),
                WINDOWS: wide * self.config.latent_width * torch.bfloat16.itemsize,
            },
            self._weights
            | {
                ROWS: sum(held.packed for held in caches),
                WINDOWS: sum(held.windows for held in caches),
                RING: sum(ring.nbytes for ring in rings),
                RECORDED: sum(recorder.nbytes for recorder in recorders),
            },
            self._resident(full),
            self._driver(),
            on_device=self.device.type == "cuda",
        )

    def _sources(self) -> tuple[list[Pool], list[RoutingRing], list[Recorder]]:
        every = (*together(self.bench.engine.alive), *self.also)
        once = dict.fromkeys(each.pool if isinstance(each, LatentCache) else each for each in every)
        return tuple([each for each in once if isinstance(each, kind)] for kind in (Pool, RoutingRing, Recorder))

    def _resident(self, full: bool) -> dict[str, int | None]:
        try:
            known = self._process.memory_full_info() if full else self._process.memory_info()
        except psutil.AccessDenied:  # some containers hide the pages
            known = self._process.memory_info()
        return {name: getattr(known, name, None) for name in PROCESS}

    def _driver(self) -> dict[str, int | None]:
        if self.device.type != "cuda":
            return dict.fromkeys(DEVICE)
        free, total = torch.cuda.mem_get_info(self.device)
        ours = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return dict(zip(DEVICE, (*ours, total - free, total), strict=True))

    def __repr__(self) -> str:
        return f"<Meter of {self.bench.name}>"
