"""What a user asks before a first answer: what will answer, and that it is ready."""

import pytest

import workbench as wb
from workbench.model import Model


@pytest.fixture(scope="module")
def bench():
    return wb.load("pocket", device="cpu")


def test_operations_are_counted_with_their_reasons(bench, monkeypatch):
    monkeypatch.setattr(Model, "fuse", False)
    table = bench.explain()
    assert table.loc[0, "why"] == "model.fuse is False"
    norms = table[table["operation"] == "rms_norm"].iloc[0]
    layers, per_layer = bench.config.num_hidden_layers, 3 + bool(bench.config.q_lora_rank)
    assert (norms["calls"], norms["body"]) == (layers * per_layer + 1, "reference")
    assert norms["why"] == "tensors are on cpu"


def test_a_fused_pass_is_one_row_or_says_why_not(bench):
    table = bench.explain(new=3)
    if bench.model.explain() is None:
        assert table["body"].tolist() == ["kernels/fused.c"]
    else:
        assert table.loc[0, "why"] == bench.model.explain()


def test_explaining_leaves_no_trace(bench):
    before = bench.generate("A dog", wb.Sampling(temperature=0, max_tokens=5)).tokens
    bench.explain()
    assert bench.generate("A dog", wb.Sampling(temperature=0, max_tokens=5)).tokens == before


def test_warming_tells_its_stages_and_changes_nothing(bench):
    sampling = wb.Sampling(temperature=0, max_tokens=5)
    before, stages = bench.generate("A dog", sampling).tokens, []
    assert bench.warm(stages.append) > 0
    assert stages[0].startswith("reading a prompt") and stages[-1] == "step 3 of 3"
    assert bench.generate("A dog", sampling).tokens == before


def test_triton_is_listened_to_only_while_warming(bench):
    knobs = pytest.importorskip("triton.knobs")
    before, stages = knobs.compilation.listener, []

    def once(stage):
        stages.append(stage)
        if stage.startswith("step 1"):
            knobs.compilation.listener(src=type("Source", (), {"name": "mla_decode"})(), cache_hit=False)

    bench.warm(once)
    assert "compiled mla_decode" in stages and knobs.compilation.listener is before
