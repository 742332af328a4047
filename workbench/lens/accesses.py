"""Accesses: which expert blocks a model asked for, in order. From a trace, or from the log of a store.

A block is one expert of one layer. A visit is one MoE layer in one forward pass: its experts are needed together, each
once. A pass is a visit to every MoE layer.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from workbench.errors import RequestError
from workbench.lens.load import tokens_of
from workbench.trace import Trace

CHUNK = 512  # tokens of a prompt that the engine reads in one pass


class Accesses:
    """n accesses in V visits to m different blocks, of the `blocks` there are. A value: its arrays are read-only.

    visit   int64 [n], number of the visit; never falls
    layer   int64 [n], one for all accesses of a visit
    expert  int64 [n], no two alike in a visit
    moving  int64 [n], number of the pass; never falls, one for all accesses of a visit
    blocks  of the whole model: MoE layers x experts

    Of a store's log: `visit, key = transfers.accesses` and `rows = transfers.rows` give visit, rows[visit, 1],
    key % experts and rows[visit, 0]. RequestError where the parts do not fit each other, or where there are none.
    """

    def __init__(self, visit: Sequence, layer: Sequence, expert: Sequence, moving: Sequence, *, blocks: int):
        parts = {"visit": visit, "layer": layer, "expert": expert, "moving": moving}
        self.visit, self.layer, self.expert, self.moving = (_whole(name, part) for name, part in parts.items())
        lengths = {name: len(getattr(self, name)) for name in parts}
        if len(set(lengths.values())) > 1:
            raise RequestError(f"an access is one entry of each: visit, layer, expert and moving, not {lengths}.")
        if not len(self):
            raise RequestError("there are no accesses: nothing asked for an expert. Give a run that read some tokens.")
        self.blocks = int(blocks)
        self._check()

    def _check(self) -> None:
        for name in ("visit", "moving"):
            if (np.diff(getattr(self, name)) < 0).any():
                raise RequestError(f"{name} must never fall: accesses stand in the order in which they were made.")
        if min(self.layer.min(), self.expert.min()) < 0:
            raise RequestError("layers and experts are numbered from 0.")
        together = np.diff(self.visit) == 0
        for name in ("layer", "moving"):
            if (np.diff(getattr(self, name))[together] != 0).any():
                raise RequestError(
                    f"a visit is one layer in one pass: {name} must be the same for all of its accesses."
                )
        visit, key = self.visit, self.key
        order = np.lexsort((key, visit))
        if ((np.diff(visit[order]) == 0) & (np.diff(key[order]) == 0)).any():
            raise RequestError("an expert is there twice in a visit: it is needed once, however many tokens it reads.")
        if self.blocks < len(self.pairs):
            raise RequestError(f"{len(self.pairs)} different blocks were asked for, but there are {self.blocks}.")

    @classmethod
    def from_trace(cls, trace: Trace, chunk: int = CHUNK, phase: str | None = None) -> "Accesses":
        """What a model that reads the sequences of a trace one after another asks for, in the layers recorded.

        An answer's token is a pass of its own. The prompt's are read up to `chunk` in a pass, which asks in each layer
        for every expert that any of them chose. phase "decode" or "prefill" leaves out the other. Within a visit:
        ascending experts.
        """
        if chunk < 1:
            raise RequestError(f"a pass reads at least one token; got a chunk of {chunk}.")
        read = np.flatnonzero((trace.experts >= 0).any((1, 2)))
        sequence = trace.tokens["sequence"].to_numpy()[read]
        alone = (trace.tokens["phase"] == "decode").to_numpy()[read]
        first = np.ones(len(read), bool)  # of a run: a prompt, or a token of an answer
        first[1:] = (np.diff(sequence) != 0) | alone[1:] | alone[:-1]
        place = np.arange(len(read))
        passes = np.cumsum((place - np.maximum.accumulate(np.where(first, place, 0))) % chunk == 0)
        kept = tokens_of(trace, phase)[read]
        if not kept.any():
            raise RequestError(f"no token{f' of phase {phase}' if phase else ''} of this trace was read by experts.")
        passes, experts, layers = passes[kept], trace.experts[read[kept]], np.array(trace.layers)
        passes = np.cumsum(np.diff(passes, prepend=passes[0]) > 0)  # again from 0, without gaps
        token, layer, _ = used = np.nonzero(experts >= 0)
        asked = np.unique((passes[token] * len(layers) + layer) * trace.n_experts + experts[used])
        visit, expert = np.divmod(asked, trace.n_experts)
        moving, layer = np.divmod(visit, len(layers))
        return cls(visit, layers[layer], expert, moving, blocks=len(layers) * trace.n_experts)

    def __len__(self) -> int:
        return len(self.visit)

    @cached_property
    def _named(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(np.stack([self.layer, self.expert], 1), axis=0, return_inverse=True)

    @property
    def pairs(self) -> np.ndarray:
        """int64 [m, 2]: layer and expert of the blocks that were asked for, ascending."""
        return self._named[0]

    @property
    def key(self) -> np.ndarray:
        """int64 [n]: which of the pairs."""
        return self._named[1].reshape(-1)

    @cached_property
    def visits(self) -> list[tuple[int, int]]:
        """Where each visit starts and stops, V of them."""
        bounds = [0, *(np.flatnonzero(np.diff(self.visit)) + 1).tolist(), len(self)]
        return list(zip(bounds, bounds[1:]))

    @cached_property
    def passes(self) -> np.ndarray:
        """int64 [n]: the pass, counted from 0 without gaps."""
        return np.concatenate([[0], np.cumsum(np.diff(self.moving) != 0)])

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] twice: when each access counts as made, 0 to n - 1, and when the last one of its block did, or -1.

        Within a visit what was used most recently comes first, what never was comes last, in the order given: a cache
        computes what it holds while the rest is on its way, and so a cache of any size uses its own blocks first.
        """
        key, last = self.key.tolist(), [-1] * len(self.pairs)
        clock, before = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        now = 0
        for start, stop in self.visits:
            for at in sorted(range(start, stop), key=lambda at: -last[key[at]]):
                clock[at], before[at] = now, last[key[at]]
                last[key[at]] = now
                now += 1
        return clock, before


def _whole(name: str, given: Sequence) -> np.ndarray:
    array = np.array(given)
    whole = array.size == 0 or (array.dtype.kind in "iuf" and np.isfinite(array).all() and (array % 1 == 0).all())
    if array.ndim != 1 or not whole:
        raise RequestError(f"{name} must be a row of whole numbers.")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array
