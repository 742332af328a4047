"""load: what a name opens, what is refused before a byte is read, and what save writes."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import workbench as wb
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    """A tiny checkpoint in bf16 with a tokenizer."""
    path = tmp_path_factory.mktemp("load")
    shape = Config.preset("pocket").to_dict() | {"vocab_size": 600, "num_hidden_layers": 2, "hidden_size": 32}
    config = Config.from_json(shape | {"bos_token_id": 582, "eos_token_id": 583})
    save(Model(config, Random(config)), path / "tiny", files_from=vocabulary, dtype=torch.bfloat16)
    return path / "tiny"


def test_a_directory_opens_and_talks(folder):
    bench = wb.load(str(folder), device="cpu")
    done = bench.generate("Hello", wb.Sampling(max_tokens=5, seed=0))
    assert len(done.steps) == 5
    assert bench.context == 2048
    assert (bench.model.dtype, bench.new_cache().format) == (torch.float32, "fp32")


@pytest.mark.parametrize(
    ("dtype", "kind", "cache"), [("bf16", torch.bfloat16, "bf16"), ("fp32", torch.float32, "fp32")]
)
def test_types_follow_the_request(folder, dtype, kind, cache):
    bench = wb.load(folder, device="cpu", dtype=dtype)
    assert (bench.model.dtype, bench.new_cache().format) == (kind, cache)


def test_the_cache_may_be_narrower_than_the_model(folder):
    bench = wb.load(folder, device="cpu", dtype="fp32", cache="bf16")
    assert bench.generate("Hello", wb.Sampling(max_tokens=3)).steps[-1].cache_bytes == 64 * 80 * 2 * 2


def test_what_is_saved_opens_with_the_same_weights_in_either_type(folder, tmp_path):
    bench = wb.load(folder, device="cpu", dtype="fp32")
    for dtype, per_weight in (("auto", 4), ("bf16", 2)):
        bench.save(tmp_path / dtype, dtype)
        again = wb.load(tmp_path / dtype, device="cpu", dtype="fp32")
        assert all(torch.equal(again.model.tensors[name], t) for name, t in bench.model.tensors.items())
        size = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert size == pytest.approx(per_weight * bench.config.parameters().total, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "fp16"}, "overflows"),
        ({"dtype": "int3"}, "int3"),
        ({"cache": "q9"}, "q9"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(folder, options, words):
    with pytest.raises(wb.RequestError, match=words):
        wb.load(folder, **{"device": "cpu"} | options)


def test_what_does_not_fit_is_refused_with_its_size(folder, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(wb.BudgetError, match=r"GB are free on cpu"):
        wb.load(folder, device="cpu")


def test_a_name_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(wb.CheckpointError, match="neither a directory"):
        wb.load("no such thing")
    with pytest.raises(wb.CheckpointError, match=r"config\.json"):
        wb.load(tmp_path)
    assert Path(tmp_path).exists()
