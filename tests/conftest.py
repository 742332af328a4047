"""What several tests share: checkpoints of every case, each made once, and a bench without a model."""

from functools import cache

import pytest
import torch
from fake_bench import FakeBench

from workbench.checkpoint import open_model


@pytest.fixture
def fake_bench():
    return FakeBench()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> Checkpoint, one of `checkpoints.CASES`."""
    from checkpoints import make  # here, because importing transformers takes longer than most tests

    folder = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: make(name, folder))


@pytest.fixture(scope="session")
def model(checkpoint):
    """model(name) -> the float32 model of that checkpoint. Shared: leave it as it is."""
    return cache(lambda name: open_model(checkpoint(name).path, dtype=torch.float32))
