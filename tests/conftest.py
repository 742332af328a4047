"""What several tests share: checkpoints of every case, each made once, and a bench without a model."""

import os
from functools import cache

import pytest
import torch
from fake_bench import FakeBench
from texts import TEXTS

from workbench.model import Model
from workbench.opening import open_model
from workbench.tokenizer import Tokenizer
from workbench.train.vocabulary import train_tokenizer, write

if not torch.cuda.is_available():  # Triton looks when a kernel is defined, so before the first is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fake_bench():
    return FakeBench()


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """The directory of a tokenizer of 600 tokens, trained on `texts`, with V2.5's special tokens. Only to be read."""
    path = tmp_path_factory.mktemp("vocabulary")
    write(train_tokenizer(TEXTS * 2, 600), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


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


@pytest.fixture
def by_operation(monkeypatch):
    """No pass is fused: what is looked at, or edited to no effect, has the bits of what is not."""
    monkeypatch.setattr(Model, "fuse", False)
