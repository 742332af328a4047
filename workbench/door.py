"""The door between an operation and its kernel: which body answers a call, and why."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

_heard: ContextVar[Counter | None] = ContextVar("heard", default=None)


@cache
def kernel(name: str) -> ModuleType | None:
    """The file of that name in kernels/, if there is one here and Triton can be imported."""
    if find_spec("triton") is None or find_spec("workbench_kernels") is None:
        return None
    return import_module(f"workbench_kernels.{name}") if find_spec(f"workbench_kernels.{name}") else None


def present(x: torch.Tensor) -> bool:
    """Whether a kernel could run where x is."""
    return x.is_cuda


def refusal(name: str, *args) -> str | None:
    """Why the reference, not the kernel, answers this call of an operation; None where the kernel does."""
    if not present(args[0]):
        return f"tensors are on {args[0].device.type}"
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return "a gradient is asked for"
    file = kernel(name)
    return f"there is no kernel for {name} here" if file is None else file.refuses(*args)


def op(name: str) -> Callable[[Callable], Callable]:
    """A reference body that the kernel of that name may answer for. `refusal` says, for any call, which and why."""

    def decorate(body: Callable) -> Callable:
        @wraps(body)
        def call(*args):
            heard = _heard.get()
            if heard is None and not present(args[0]):  # at the least cost: on a CPU a small model asks all the time
                return body(*args)
            why = refusal(name, *args)
            if heard is not None:
                heard[name, why] += 1
            return body(*args) if why else kernel(name).launch(*args)

        return call

    return decorate


@contextmanager
def listening() -> Iterator[Counter]:
    """Counts the calls of operations in this thread, for as long as the block lasts, by (name, why no kernel ran)."""
    counts: Counter = Counter()
    token = _heard.set(counts)
    try:
        yield counts
    finally:
        _heard.reset(token)
