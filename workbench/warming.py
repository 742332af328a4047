"""Warming: what a first answer would wait for, done beforehand. Kernels are compiled where they are first used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from time import perf_counter

import torch

from workbench.engine import Engine
from workbench.probe import OFF

STEPS = 3  # a first one, one that a GPU captures, one that it replays


def warm(engine: Engine, progress: Callable[[str], None] = lambda stage: None) -> float:
    """Reads a chunk of a prompt, and some of a token each, without a word: seconds it took.

    `progress` is told the stage, and each kernel when it has been compiled. What was compiled before is kept by Triton,
    and by compiled.py in the user's cache, for the next process.
    """
    started, model = perf_counter(), engine.model
    chunk = max(1, min(engine.chunk, engine.context - STEPS))
    cache, tokens = engine.new_cache(), torch.zeros(1, chunk, dtype=torch.int64)
    with _heard(progress), torch.inference_mode():
        progress(f"reading a prompt of {chunk:,} tokens")
        model(tokens, cache, logits="last")
        step = engine.stepping()
        for number in range(STEPS if engine.context > chunk + STEPS else 0):
            progress(f"step {number + 1} of {STEPS}")
            step([[0]], cache, OFF)
    return perf_counter() - started


@contextmanager
def _heard(progress: Callable[[str], None]) -> Iterator[None]:
    """Triton says what it compiles, for as long as the block lasts, where it can say so."""
    knobs = None
    if find_spec("triton") is not None:
        from triton import knobs  # noqa: PLC0415 - only where it is installed
    if not hasattr(getattr(knobs, "compilation", None), "listener"):
        yield
        return
    before = knobs.compilation.listener

    def compiled(*, src: object, cache_hit: bool = False, **known: object) -> None:
        if not cache_hit:
            progress(f"compiled {getattr(src, 'name', 'a kernel')}")

    knobs.compilation.listener = compiled
    try:
        yield
    finally:
        knobs.compilation.listener = before
