"""The link between main memory and the device that computes: copies, and what a copy takes beside computing there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

RECENT = 0.2  # weight of the newest measurement in a running mean


class Mean:
    """A running mean of seconds an expert; None before the first."""

    def __init__(self):
        self.seconds: float | None = None

    def add(self, seconds: float, experts: int) -> None:
        one = seconds / experts
        self.seconds = one if self.seconds is None else (1 - RECENT) * self.seconds + RECENT * one


class Link:
    """Copies of blocks to `device`: on a stream of their own on a GPU, in place on a CPU that stands in for one.

    `computed`: whether an expert that is in main memory may be multiplied there instead, where both are slow enough to
    share the work: "auto" on a GPU measures, True always does, False never.
    """

    def __init__(self, device: torch.device, computed: bool | str = "auto"):
        self.device, self.computed = device, computed if device.type == "cuda" or computed != "auto" else False
        self.copying, self.computing = Mean(), Mean()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def split(self, experts: int) -> int:
        """How many of so many experts in main memory to multiply there, so that both sides end together."""
        if self.computed is not True and self.computed != "auto":
            return 0
        if self.computed is True:
            return experts
        copy, compute = self.copying.seconds, self.computing.seconds
        if copy is None:
            return 0
        if compute is None:
            return 1 if experts > 1 else 0  # one, to measure
        return min(range(experts + 1), key=lambda there: max((experts - there) * copy, there * compute))

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        """Copies (source, target) blocks. What is computed next on the device waits for them; the result, when
        called, waits until the sources may be overwritten.
        """
        started = perf_counter()
        if self.stream is None:
            for source, target in pairs:
                target.copy_(source)
            self.copying.add(perf_counter() - started, len(pairs))
            return lambda: None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)  # the targets may still be read by what was computed last
        with torch.cuda.stream(self.stream):
            begin.record()
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            end.record()
        current.wait_event(end)

        def finished() -> None:
            end.synchronize()
            self.copying.add(begin.elapsed_time(end) / 1e3, len(pairs))

        return finished

    @contextmanager
    def computing_there(self, experts: int) -> Iterator[None]:
        """Measures what multiplying so many experts in main memory takes; nothing for 0."""
        started = perf_counter()
        yield
        if experts:
            self.computing.add(perf_counter() - started, experts)
