"""Memory that is handed out unwritten holds what no test would take for a result."""

from contextlib import contextmanager

import torch


@contextmanager
def poisoned():
    """`torch.empty` and its kin give NaN, or the largest of whole numbers, for as long as the block lasts."""
    names = ("empty", "empty_like")
    real = {name: getattr(torch, name) for name in names}
    methods = {name: getattr(torch.Tensor, name) for name in ("new_empty",)}

    def filling(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).max)

        return made

    for name, make in real.items():
        setattr(torch, name, filling(make))
    for name, make in methods.items():
        setattr(torch.Tensor, name, filling(make))
    try:
        yield
    finally:
        for name, make in real.items():
            setattr(torch, name, make)
        for name, make in methods.items():
            setattr(torch.Tensor, name, make)
