"""Offloaded: a store that keeps some experts where they are computed, some behind that, and all of them on disk.

near   slots on the device that computes: VRAM, or main memory where the CPU computes
far    slots in (pinned) main memory behind a GPU, or behind a CPU that stands in for one; else none
shelf  the blocks on disk, read by threads at given positions

Every expert of every layer may be in any slot: one pool for all, so that busy layers get more of it.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import torch
from torch import nn

from workbench import ops
from workbench.blocks import Bank, Layout
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.fetching import Fetching
from workbench.link import Link
from workbench.slots import POLICIES, Slots, Worth
from workbench.transfers import DISK, FAR, MOVING, NEAR, Transfers
from workbench.weights import Inventory

READERS = 4  # reads at the same time: a solid-state disk wants several
AHEAD = 4  # of 6 experts a token: of more, too many are read in vain


class Shelf(Protocol):
    """Blocks on disk."""

    layout: Layout

    def read(self, layer: int, expert: int, into: torch.Tensor) -> None:
        """Fills `into`, uint8 [nbytes] in main memory. CheckpointError for what is missing, short or damaged."""


class Offloaded:
    """At most `slots` experts near and `far` behind them, of all those on the shelf. Safe to use from many threads.

    policy    "lru", "lfu" or "blended" (see slots.POLICIES), or a half-life in passes
    ahead     so many experts of the next layer are fetched before they are asked for, as its router foretells from
              what this layer reads; 0 for none
    computed  whether experts in main memory behind a GPU are multiplied there, see Link
    """

    def __init__(
        self,
        config: Config,
        shelf: Shelf,
        slots: int,
        far: int = 0,
        device: torch.device | str = "cpu",
        *,
        policy: str | float = "blended",
        ahead: int | None = None,
        computed: bool | str = "auto",
        readers: int = READERS,
    ):
        half_life = POLICIES.get(policy) if isinstance(policy, str) else policy
        if not isinstance(half_life, (int, float)) or not half_life >= 0:
            raise RequestError(f"no policy called {policy!r}; there are {', '.join(POLICIES)}, or a number of passes.")
        self.config, self.shelf, self.layout = config, shelf, shelf.layout
        self.ahead = AHEAD if ahead is None else ahead
        if self.ahead < 0:
            raise RequestError(f"ahead is how many experts are fetched early, 0 for none; got {ahead}.")
        self.device, self.experts = torch.device(device), config.n_routed_experts
        self.layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
        self.place = {layer: number for number, layer in enumerate(self.layers)}
        keys, least = len(self.layers) * self.experts, config.num_experts_per_tok
        for room, of in ((slots, "near"), (far or least, "behind the device")):
            if room < least:
                raise BudgetError(
                    f"room for {room} experts {of}: a token needs {least} of a layer, "
                    f"{least * self.layout.nbytes / 1e6:,.1f} MB. Give more memory."
                )
        if self.device.type == "cuda" and not far:
            raise BudgetError("a GPU needs room for experts in main memory: they come to it from there.")
        self.worth = Worth(keys, float(half_life))
        self.near = Slots(self.layout, min(slots, keys), self.worth, device)
        pinned = self.device.type == "cuda"
        self.far = Slots(self.layout, min(far, keys), self.worth, "cpu", pinned) if far else None
        self.link = Link(self.device, computed)
        self.transfers, self.passes, self.reads = Transfers(), -1, 0  # passes: the number of the last, from 0
        self.readers = ThreadPoolExecutor(readers, thread_name_prefix="expert-reader")
        self.early: dict[int, Future] = {}  # experts that are or were read ahead, and that nobody asked for yet
        self._foretell: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._one, self._turn = threading.Lock(), threading.local()

    def take(self, config: Config, layer: int, weights: Inventory) -> None:
        if weights.layout(config, layer) != self.layout:
            raise CheckpointError(f"layer {layer}: its experts are packed unlike those of other layers: pack it again.")

    def opened(self, blocks: Iterable[nn.Module]) -> None:
        """Notes for every layer the router of the next one, and how the norms before the two differ."""
        blocks = {block.layer: block for block in blocks if block.layer in self.place}
        for one, following in zip(self.layers, self.layers[1:]):
            ratio = blocks[following].mlp_norm.float() / blocks[one].mlp_norm.float()
            self._foretell[one] = following, ratio.nan_to_num(0.0, 0.0, 0.0), blocks[following].mlp.router

    def pin(self, experts: Sequence[tuple[int, int]]) -> None:
        """(layer, expert) pairs that go only when nothing else can: the most used ones of a trace, say.

        RequestError for one that is nowhere.
        """
        for layer, expert in experts:
            if layer not in self.place or not 0 <= expert < self.experts:
                raise RequestError(
                    f"no expert ({layer}, {expert}): layers {self.layers[0]} to {self.layers[-1]} have experts "
                    f"0 to {self.experts - 1}."
                )
        self.worth.pin([self.place[layer] * self.experts + expert for layer, expert in experts])

    @property
    def landing(self) -> Slots:
        """Where blocks from the shelf arrive."""
        return self.far or self.near

    def tensors(self) -> Iterator[torch.Tensor]:
        """Of the slots, near and far."""
        yield self.near.slab
        if self.far:
            yield self.far.slab

    def where(self) -> np.ndarray:
        """NEAR, FAR, DISK or MOVING for every expert: uint8 [MoE layers, experts]. Any thread may ask."""
        found = np.full(len(self.worth.value), DISK, dtype=np.uint8)
        for slots, code in ((self.far, FAR), (self.near, NEAR)):
            if slots is not None:
                of = slots.slot_of.copy()
                there = of >= 0
                held = slots.find(np.arange(len(of)))
                found[there & (held >= 0)] = code
                found[there & (held < 0) & (found == DISK)] = MOVING
        return found.reshape(len(self.layers), self.experts)

    def waves(self, layer: int, ids: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[Bank, torch.Tensor]]:
        """What is near comes first, while the rest is fetched; see Store."""
        with self._one:
            self._count(self.place[layer])
            visit = Fetching(self, layer, ids)
            try:
                visit.begin()
                if len(ids) == 1 and self.ahead:
                    self._look_ahead(layer, x)
                while (wave := visit.wave()) is not None:
                    source, keys = wave
                    with self.link.computing_there(len(keys) if source is self.far else 0):
                        yield source.bank, visit.choices(source, keys)
            finally:
                visit.end()
            self.transfers.add(visit.seen(self.reads), visit.keys, visit.hits)
            self.reads = 0

    def _count(self, place: int) -> None:
        """A pass begins where its thread does not go on to a later layer: threads take turns layer by layer."""
        self.passes += place <= getattr(self._turn, "place", place)
        self._turn.place = place

    def fetch(self, key: int) -> Future:
        """Starts to read an expert from the shelf into a slot that is claimed for it."""
        slot = self.landing.claim(key)
        layer, expert = self.layers[key // self.experts], int(key % self.experts)
        with ExitStack() as undo:
            undo.callback(self.landing.dropped, key)
            reading = self.readers.submit(self.shelf.read, layer, expert, self.landing.slab[slot])
            undo.pop_all()
        self.reads += 1
        return reading

    def landed(self, key: int, reading: Future) -> BaseException | None:
        """The end of `fetch`: the expert is held; or its slot is free, and this is why."""
        error = reading.exception()
        if error is None:
            self.landing.loaded(key)
        else:
            self.landing.dropped(key)
        return error

    @torch.no_grad()
    def _look_ahead(self, layer: int, x: torch.Tensor) -> None:
        if layer not in self._foretell:
            return
        following, ratio, router = self._foretell[layer]
        logits = ops.router_logits(x.float() * ratio, router)
        keys = ops.route(logits, self.config).ids[0].cpu().numpy() + self.place[following] * self.experts
        room = self.landing.spare - self.config.num_experts_per_tok
        for key in keys[: min(self.ahead, max(0, room))].tolist():
            if self.near.slot_of[key] < 0 and self.landing.slot_of[key] < 0:
                self.early[key] = self.fetch(key)
