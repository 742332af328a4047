"""bench decode, prefill and batch: their bounds are counted right, and what cannot be measured is refused."""

import pytest
import torch

from workbench.benchmarks import batch, decode, kernels, prefill
from workbench.benchmarks.speeds import Row, operations, rates_of, weight_bytes
from workbench.errors import RequestError


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(decode, "STEPS", 4)
    monkeypatch.setattr(batch, "STEPS", 2)


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("v2").path


@pytest.mark.parametrize(
    ("module", "told"),
    [(decode, {"context": 5}), (prefill, {"context": 16}), (batch, {"context": 5})],
    ids=["decode", "prefill", "batch"],
)
def test_every_row_has_all_its_rounds_and_survives_the_file(module, told, path, short, tmp_path):
    result = module.measure(path, rounds=2, threads=1, **told)
    for row in result.rows:
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in row.sides.values())
        assert row.share == pytest.approx(row.medians[next(iter(row.sides))] / row.bound)
    kept = tmp_path / "results"
    saved = result.save(kept)
    assert saved.name.startswith(f"{result.kind}-") and saved.parent == kept
    assert "at most" in str(result) and str(path.name) in str(result)


def test_what_a_token_reads_and_computes(model):
    """Counted by hand: every weight but the embedding once, of the experts those that are chosen."""
    bench = model("v2")
    config, all_weights = bench.config, sum(weight.numel() for weight in bench.tensors.values())
    embedding, expert = bench.embedding.numel(), 3 * config.hidden_size * config.moe_intermediate_size
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    idle = layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    row = embedding / config.vocab_size
    assert weight_bytes(bench) == pytest.approx(4 * (all_weights - embedding + row - idle))
    assert weight_bytes(bench, 10_000) == pytest.approx(4 * all_weights, rel=1e-6)
    vectors = sum(weight.numel() for weight in bench.tensors.values() if weight.dim() == 1)
    products = all_weights - embedding - idle - vectors
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * config.num_hidden_layers
    assert operations(bench, 1) == pytest.approx(2 * products + 2 * width)
    assert operations(bench, 1, 99) - operations(bench, 1) == pytest.approx(2 * 99 * width)


def test_a_row_says_who_is_how_much_faster():
    row = Row("decode", {"workbench": (100.0, 120.0, 110.0), "other": (55.0, 50.0, 60.0)}, 220.0, "bytes")
    assert row.share == 0.5 and row.to_dict()["medians"] == {"workbench": 110.0, "other": 55.0}
    assert "2.00x" in str(row) and "50%" in str(row)


def test_rates_are_of_this_machine():
    rates = rates_of(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.bandwidth < 1e13 and 1e8 < rates.operations < 1e15


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: decode.measure(path, rounds=0), "at least 1"),
        (lambda path: decode.measure(path, context=10**6, threads=1), "this model holds"),
        (lambda path: prefill.measure(path, context=0, threads=1), "this model holds"),
        (lambda path: batch.measure(path, context=10**6, threads=1), "more than this model holds"),
        (lambda path: kernels.measure(only=["flash"]), "mla_decode"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, said, path):
    with pytest.raises(RequestError, match=said):
        call(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("call", [kernels.measure, lambda: decode.measure(device="cuda")], ids=["kernels", "decode"])
def test_without_a_gpu_nothing_pretends(call):
    with pytest.raises(RequestError, match="GPU"):
        call()
