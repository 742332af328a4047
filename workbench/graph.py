"""DecodeGraph: a decoding step on a GPU captured once and replayed, with the recorder and live edits still at work.

At batch 1 a step of V2-Lite is some 350 kernels of a few microseconds; launched one by one from Python they take longer
to ask for than to run. A replay asks once. What changes from step to step is in tensors: tokens, where sequences lie,
what edits add to routers' logits, where the recorder writes. B sequences.
"""

from collections.abc import Callable

import torch
from torch import nn

from workbench import lean, ops
from workbench.cache import LatentCache
from workbench.door import listening
from workbench.experts import Resident
from workbench.pages import pages_of
from workbench.probe import Probe

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Replay]


def captured(step: Callable[[], torch.Tensor]) -> Replay:
    """`step()` as a CUDA graph. It has run before, so that nothing is compiled or allocated for the first time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


class DecodeGraph:
    """Steps of one token for each sequence of a cache: `step` in place of `Model.forward`, of one thread at a time.

    The first step of a kind is carried out, the second captured, and all that follow replayed until what a capture
    holds has changed: another batch, storage that moved because it grew, another probe's buffers.
    """

    def __init__(self, model: nn.Module, capture: Capture | None = None):
        self.model, self._capture = model, capture or captured
        self.captures = self.replays = 0
        self._state = torch.empty(0)  # int32 on the device: tokens of the step, then a page
        self._blocks = 0  # of each table in it
        self._kind: tuple = ()  # of the last step
        self._replay: Replay | None = None
        self._asking: dict[str, str] = {}  # operations that ask the host, and why no kernel answers

    def refusal(self, cache: LatentCache, probe: Probe) -> str | None:
        """Why steps are not replayed; None where they are. `probe` has begun a pass."""
        if not isinstance(self.model.store, Resident):
            return "experts come from elsewhere"
        if not probe.static:
            return "an edit asks where in the sequence a token is, or a probe is not made for replays"
        return self.model.explain(cache, probe)

    def step(self, tokens: torch.Tensor, cache: LatentCache, probe: Probe) -> torch.Tensor:
        """tokens [B, 1] int64 on the host to fp32 logits [B, 1, vocab], which the next step overwrites.

        As `Model.forward(tokens, cache, probe, logits="last")`, which answers where steps cannot be replayed.
        """
        model = self.model
        begun = probe.begin(model.config, torch.tensor(cache.lengths)[:, None], model.dtype)
        if self.refusal(cache, begun) is not None:
            return model(tokens, cache, probe, logits="last")
        model.check(tokens, cache)
        cache.reserve(1)
        begun.direct()
        state = self._written(tokens, cache)
        kind = (cache.batch, id(cache.pool), cache.pool.moves, begun.held(), len(state))
        if kind != self._kind:
            self._kind, self._replay = kind, None
            self._state = state.to(model.device)
            with listening() as heard:
                logits = self._body(cache, begun)  # compiles and allocates what is new, outside of a capture
            self._asking = {name: why for name, why in heard if why and name == "experts"} if model.store.packed else {}
        elif self._asking:
            self._state.copy_(state)
            logits = self._body(cache, begun)
        else:
            self._state.copy_(state, non_blocking=True)
            if self._replay is None:
                self._replay = self._capture(lambda: self._body(cache, begun))
                self.captures += 1
            logits = self._replay()
            self.replays += 1
        begun.end()
        cache.advance(1)
        return logits

    def _written(self, tokens: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """What a step reads of the host. Tables have room to grow, so that not every new block is a new kind."""
        blocks = max(len(one.table) for one in cache.sequences)
        if blocks > self._blocks:
            self._blocks = 2 * blocks
        fill = torch.zeros(-cache.batch % 4, dtype=torch.int32)
        return torch.cat([tokens[:, 0].int(), fill, cache.page(self._blocks)])

    def _body(self, cache: LatentCache, probe: Probe) -> torch.Tensor:
        model, padded = self.model, cache.batch + -cache.batch % 4
        tokens, pages = self._state[: cache.batch, None].long(), pages_of(self._state[padded:], cache.batch)
        rotations = model.rope.at(pages.before[:, None].long())
        x = ops.embed(tokens, model.embedding, model.dtype)
        return lean.computed(model, x, rotations, cache, pages, probe)
