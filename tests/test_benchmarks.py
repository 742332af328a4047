"""The comparison with transformers: it refuses to time two different things, and its numbers are what they say."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from workbench.__main__ import main
from workbench.benchmarks import cpu
from workbench.benchmarks.cpu import Result, Row, Workload
from workbench.benchmarks.measure import SHAPES
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.errors import RequestError
from workbench.model import Model
from workbench.opening import open_model

TINY = replace(
    Config.preset("pocket"),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    bos_token_id=0,
    eos_token_id=1,
)
LOADS = (Workload("prefill 8", 0, 8, 1, 1.0), Workload("decode at 16", 16, 1, 4, 1.0))


@pytest.fixture
def checkpoint(tmp_path):
    save(Model(TINY, Random(TINY, seed=0)), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(cpu, "WORKLOADS", LOADS)
    monkeypatch.setattr(cpu, "LONG_ENOUGH", 0.0)


def test_both_sides_are_measured_and_the_figures_kept(checkpoint, short, tmp_path):
    threads = torch.get_num_threads()
    result = cpu.measure(checkpoint, threads=1, rounds=2)
    assert torch.get_num_threads() == threads
    assert [row.name for row in result.rows] == ["prefill 8", "decode at 16"]
    for row in result.rows:
        assert len(row.ours) == len(row.theirs) == 2 and min(row.ours + row.theirs) > 0
        assert "attention" in row.setting and "experts" in row.setting
    (tmp_path / "kernels").mkdir()
    kept = json.loads(result.save(tmp_path / "kernels" / "results").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result.to_dict()))
    assert kept["about"]["threads"] == 1 and kept["about"]["model"] == "tiny" and kept["about"]["date"]


def test_the_command_prints_the_table(checkpoint, short, capsys):
    assert main(["bench", "cpu", "--checkpoint", str(checkpoint), "--rounds", "1", "--threads", "1"]) == 0
    assert "logits agree within" in (text := capsys.readouterr().out) and "decode at 16" in text


def test_two_different_models_are_not_timed(checkpoint, tmp_path, monkeypatch):
    save(Model(TINY, Random(TINY, seed=1)), tmp_path / "other")
    monkeypatch.setattr("workbench.benchmarks.rivals.open_model", lambda path, dtype: open_model(tmp_path / "other"))
    with pytest.raises(RequestError, match="do not compute the same"):
        cpu.measure(checkpoint, threads=1, rounds=1)


def test_without_transformers_it_says_so(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match="transformers is not installed"):
        cpu.measure(checkpoint)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"threads": 0}, {"checkpoint": "x", "shape": "28m"}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(RequestError):
        cpu.measure(**wrong)


def test_the_shapes_are_about_the_size_they_are_called():
    for name, millions in (("28m", 28), ("200m", 200)):
        assert SHAPES[name].parameters().total / 1e6 == pytest.approx(millions, rel=0.1)


def test_a_ratio_is_of_medians_and_judged_against_the_target():
    row = Row("decode", ours=(90.0, 130.0, 120.0), theirs=(100.0, 99.0, 300.0), target=1.2)
    assert row.ratio == 1.2 and row.met
    assert "1.20x" in str(row) and "0.40 to 1.31" in str(row) and "met" in str(row)
    assert not replace(row, target=1.5).met and "MISSED" in str(replace(row, target=1.5))


def test_a_row_without_a_rival_claims_nothing():
    row = Row("whole engine", ours=(50.0, 70.0))
    assert row.ratio is None and row.met is None and "x" not in str(row)


def test_results_are_kept_only_in_a_checkout(tmp_path):
    with pytest.raises(RequestError, match="checkout"):
        Result({}, 0.0, ()).save(tmp_path / "kernels" / "results")
