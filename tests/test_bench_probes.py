"""What looking costs, against code without probes: that the baseline is such code, and that the figures are honest."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from workbench import model as model_file
from workbench.__main__ import main
from workbench.benchmarks import bare, probes
from workbench.benchmarks.bare import copy_of, without_probes
from workbench.benchmarks.probes import AGAIN, BARE, LIMITS, OFF_NAME, STATIC, Result, Row
from workbench.cache import LatentCache
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.errors import RequestError
from workbench.model import Model
from workbench.probe import OFF, Probe

TINY = replace(
    Config.preset("pocket"),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = torch.tensor([[5, 9, 2, 40, 7, 7, 1]])


@pytest.fixture
def model():
    return Model(TINY, Random(TINY, seed=0))


@pytest.fixture
def checkpoint(tmp_path, model):
    save(model, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(probes, "PROMPT", 8)
    monkeypatch.setattr(probes, "CHECKED", 6)
    monkeypatch.setattr(probes, "STEPS", 2)


def test_no_probe_is_left_in_the_code_that_is_compared_with():
    tree = without_probes(ast.parse(Path(model_file.__file__).read_text(encoding="utf-8")))
    code = re.sub('""".*?"""', "", ast.unparse(tree), flags=re.DOTALL)
    assert not re.search(r"\bprobe\b *[.(,):=]", code) and not re.search(r"^ *read\(", code, re.MULTILINE)
    assert not re.search(r"\b(x|content|position) = \1\n", code)


@pytest.mark.usefixtures("by_operation")
def test_the_code_without_probes_is_the_same_model_in_memory_too(model):
    copy = copy_of(model, probes=False)
    assert type(copy) is not Model and type(copy).__name__ == "Model"
    assert copy.blocks[1].mlp.router.data_ptr() == model.blocks[1].mlp.router.data_ptr()
    with torch.inference_mode():
        assert torch.equal(copy(TOKENS), model(TOKENS))
        cache, other = LatentCache(TINY, format="fp32"), LatentCache(TINY, format="fp32")
        for piece in (TOKENS[:, :5], TOKENS[:, 5:6], TOKENS[:, 6:]):
            assert torch.equal(copy(piece, cache, logits="last"), model(piece, other, logits="last"))
    with pytest.raises(TypeError):
        copy(TOKENS, probe=OFF)


def test_a_copy_with_probes_calls_them_like_the_model(model):
    class Counting(Probe):
        def __init__(self):
            self.seen = []

        def __call__(self, site, x):
            self.seen.append(site)
            return x

    ours, copied = Counting(), Counting()
    model(TOKENS, probe=ours)
    copy_of(model, probes=True)(TOKENS, probe=copied)
    assert ours.seen == copied.seen and "moe.gates" in ours.seen


def test_a_use_of_probes_that_is_not_understood_is_not_measured():
    tree = ast.parse("def forward(x, probe):\n    held = probe\n    return held('embed', x)")
    with pytest.raises(AssertionError, match="model.py:2"):
        without_probes(tree)


def test_every_way_of_looking_is_measured_and_kept(checkpoint, brief, tmp_path):
    threads = torch.get_num_threads()
    result = probes.measure(checkpoint, threads=1, rounds=3, context=5)
    assert torch.get_num_threads() == threads
    for rows in (result.decode, result.prefill):
        names = [row.name for row in rows]
        assert names[0] == BARE and len(names) == 8 == len(set(names))
        assert all(len(row.ms) == len(row.extra) > 0 and min(row.ms) > 0 for row in rows)
        assert {row.name for row in rows if len(row.ms) == 3} == {BARE, AGAIN, OFF_NAME, STATIC}
        assert {row.name: row.limit for row in rows if row.limit} == LIMITS
        ops = {row.name: row.ops for row in rows}
        assert ops[BARE] == ops[OFF_NAME] < ops["all sites, attention in the open"]
    (tmp_path / "kernels").mkdir()
    kept = result.save(tmp_path / "kernels" / "results")
    assert json.loads(kept.read_text(encoding="utf-8")) == json.loads(json.dumps(result.to_dict()))
    assert kept.name.startswith("probes-at-5-") and result.about["threads"] == 1 and result.about["context"] == 5


def test_the_static_recorder_adds_no_operation_to_a_step(checkpoint, brief):
    ops = {row.name: row.ops for row in probes.measure(checkpoint, threads=1, rounds=1, context=5).decode}
    assert ops[STATIC] == ops[OFF_NAME] < ops["static, TopK in every layer"]


def test_the_command_prints_both_tables(checkpoint, brief, capsys):
    arguments = [
        "bench",
        "probes",
        "--checkpoint",
        str(checkpoint),
        "--threads",
        "1",
        "--rounds",
        "2",
        "--context",
        "5",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "decode at 5" in text and "prefill of 8" in text and text.count("<= 0.5 %") == 2
    assert main(["bench", "cpu", "--context", "5"]) == 2


def test_a_known_cost_is_found_whatever_the_machine_does_meanwhile(checkpoint, brief, monkeypatch):
    """By a clock that moves with passes alone, slower and slower; one way takes 5 % longer than the others."""
    clock = SimpleNamespace(now=0.0, pass_takes=0.002)
    monkeypatch.setattr(probes.time, "thread_time", lambda: clock.now)
    ways = probes.ways_of

    def timed(way):
        def run(*given, **options):
            clock.now += clock.pass_takes * (1.05 if way.name == STATIC else 1)
            clock.pass_takes *= 1.0001
            return way.model(*given, **options)

        return way._replace(model=run)

    monkeypatch.setattr(probes, "ways_of", lambda model: [timed(way) for way in ways(model)])
    rows = {row.name: row for row in probes.measure(checkpoint, threads=1, rounds=20, context=5).decode}
    assert rows[STATIC].percent == pytest.approx(5, abs=0.2) and rows[STATIC].verdict == "MISSED"
    assert rows[OFF_NAME].percent == pytest.approx(0, abs=0.2) and rows[OFF_NAME].verdict == "met"
    assert 2 < min(rows[BARE].ms) < max(rows[BARE].ms)  # milliseconds a token


def test_different_bits_or_operations_are_not_timed(checkpoint, brief, monkeypatch):
    class Wrong(Probe):
        def __call__(self, site, x):
            return x + 1 if site == "resid.mid" else x

    class More(Probe):
        def __call__(self, site, x):
            return x.clone() if site == "resid.mid" else x

    for probe, said in ((Wrong(), "the same logits"), (More(), "the same operations")):
        monkeypatch.setattr(probes, "OFF", probe)
        with pytest.raises(RequestError, match=f"{said}: nothing was timed"):
            probes.measure(checkpoint, threads=1, rounds=1, context=5)


def test_rounds_fill_the_time_where_none_are_asked_for(checkpoint, brief, monkeypatch):
    monkeypatch.setattr(probes, "SECONDS", {"decode": 0.0, "prefill": 0.0})
    assert len(probes.measure(checkpoint, threads=1, context=5).decode[0].ms) == probes.FEWEST


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"threads": 0}, {"checkpoint": "x", "shape": "28m"}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(RequestError):
        probes.measure(**wrong)


@pytest.mark.parametrize("context", [0, 2048])
def test_a_context_that_does_not_fit_is_refused(checkpoint, context):
    with pytest.raises(RequestError, match="context must be from 1 to"):
        probes.measure(checkpoint, threads=1, rounds=1, context=context)


def test_a_verdict_needs_the_whole_interval():
    steady = Row("x", (1.0,) * 40, tuple([0.2, 0.3] * 20), 7, limit=0.5)
    assert steady.verdict == "met" and steady.percent == pytest.approx(0.25)
    assert replace(steady, limit=0.1).verdict == "MISSED"
    scattered = replace(steady, extra=tuple([-6.0, -2.0, 0.4, 3.0, 5.0] * 8))
    low, high = scattered.interval
    assert low < 0.5 < high and scattered.verdict.startswith("open")
    assert "open" in str(scattered) and "+0.40 %" in str(scattered)
    assert replace(steady, limit=None).verdict == ""


def test_results_are_kept_only_in_a_checkout(tmp_path):
    with pytest.raises(RequestError, match="checkout"):
        Result({"context": 5}, (), ()).save(tmp_path / "kernels" / "results")


def test_the_baseline_reads_the_file_that_runs(model):
    assert bare.source.__file__ == model_file.__file__
