"""The benchmark of the cache formats: what is compared is what it says, and nothing else differs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workbench import load
from workbench.__main__ import main
from workbench.benchmarks import cache as bench_cache
from workbench.benchmarks import needle, quality
from workbench.benchmarks.cache import Size, decode, held, measure
from workbench.benchmarks.paired import interval
from workbench.benchmarks.report import points
from workbench.checkpoint import Random, save
from workbench.config import Config
from workbench.errors import RequestError
from workbench.evals.exam import Marked, Report
from workbench.formats import CACHE_FORMATS, Row, cache_format
from workbench.hook import Hook
from workbench.model import Model
from workbench.probe import both
from workbench.workbench import POCKET

TINY = replace(
    Config.preset("pocket"), vocab_size=600, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8,
)  # fmt: skip
SMALL = Size(texts=2, length=64, lengths=(400, 4096), needles=1, every=150, contexts=(16, 4096), rounds=2)
needs_pocket = pytest.mark.skipif(not (POCKET / "config.json").is_file(), reason="pocket has not been trained here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary, tokenizer):
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    config = replace(TINY, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
    model = Model(config, Random(config, seed=0))
    for tensor in model.tensors.values():  # small random weights hardly attend to anything
        tensor.data.mul_(4 if tensor.dim() > 1 else 1)
    save(model, path, files_from=vocabulary)
    return path


@pytest.fixture(scope="module")
def bench(checkpoint):
    return load(str(checkpoint), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def result(checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_cache, "QUICK", SMALL)
        return measure(checkpoint, formats=["fp32", "q6", "int4", "q6+32"], threads=1, quick=True)


def test_every_format_is_measured_against_the_models_own_precision(result):
    rows = {row.format.name: row for row in result.rows}
    assert list(rows) == ["fp32", "q6", "int4", "q6+32"] and result.about["reference"] == "fp32"
    own = rows["fp32"].quality
    assert own.kl_mean == own.kl_p99 == 0 and own.same == 1 and own.nats == (0, 0, 0)
    assert 0 < rows["q6+32"].quality.kl_mean < rows["q6"].quality.kl_mean < rows["int4"].quality.kl_mean
    for row in rows.values():
        low, high = row.quality.nats.low, row.quality.nats.high
        assert low <= row.quality.nats.mean <= high
        assert row.held.allocated == row.held.computed
        assert row.exam.total == 2 and row.exam.reference == rows["fp32"].exam.passed
        assert list(row.decode) == [16] and len(row.decode[16]) == 2  # 4,096 is more than its context
        assert {length for length, _ in row.needles.cells} == {400}


def test_figures_are_kept_as_data_and_drawn_from_it(result, tmp_path):
    (tmp_path / "kernels").mkdir()
    kept = json.loads(result.save(tmp_path / "kernels" / "results").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result.to_dict()))
    assert kept["about"]["commit"] is not None and kept["about"]["date"] and kept["about"]["cpu"]
    q6 = kept["formats"][1]
    assert q6["v2"]["row"] == 436 and q6["v2"]["ratios"]["DeepSeek-67B (GQA, bf16)"] == pytest.approx(0.9328, abs=1e-4)
    assert set(q6["ratios"]) == {name for name, one in kept["baselines"].items() if one["same model"]}
    table = points(kept)
    assert table.equals(result.table()) and table.loc["q6", "bytes per token"] == q6["bytes"]["per_token"]


def test_the_text_names_every_baseline_beside_its_ratio(result):
    text = str(result)
    for name in ("MHA (bf16)", "GQA, 1 groups (bf16)", "MQA (bf16)", "expanded (bf16)", "DeepSeek-67B (GQA, bf16)"):
        assert name in text
    assert "q6+32" in text and "where another value was told" in text and "tokens/s at 16" in text


@pytest.mark.parametrize("name", [*CACHE_FORMATS, "q6+100"])
def test_bytes_are_those_allocated_windows_included(name):
    format = cache_format(name)
    one = held(TINY, name, tokens=200)  # whole blocks: 192
    row = Row(TINY.kv_lora_rank, TINY.qk_rope_head_dim)
    assert one.tokens == 192 and one.allocated == one.computed
    window = format.recent * row.width * torch.bfloat16.itemsize
    assert one.per_token == pytest.approx(TINY.num_hidden_layers * (format.nbytes(row) + window / 192))


def test_a_text_is_read_from_packed_rows(bench):
    """The same as rounding what enters the cache, which is how `schemes` measures; not what an exact cache gives."""
    [tokens] = quality.batches(quality.held_out(bench.tokenizer, 2, 100))
    format = CACHE_FORMATS["int4"]

    def stored(codec):
        return lambda x, layer: codec.unpack(codec.pack(x), x.shape[-1]).to(x.dtype)

    probe = both(Hook("attn.kv_latent", stored(format.latent)), Hook("attn.k_rope", stored(format.rope)))
    with torch.inference_mode():
        rounded, exact = bench.model(tokens, probe=probe).log_softmax(-1), bench.model(tokens).log_softmax(-1)
    read = quality.through(bench.model, tokens, format)
    assert (read - rounded).abs().max() < 1e-3 < (read - exact).abs().max()
    assert (quality.through(bench.model, tokens, "fp32") - exact).abs().max() < 1e-3


def test_a_window_as_long_as_the_text_is_bf16(bench):
    tokens = quality.held_out(bench.tokenizer, 1, 70).tokens
    assert torch.equal(*(quality.through(bench.model, tokens, name) for name in ("int4+128", "int8+128")))


def test_changes_are_those_of_the_next_token_and_weighed_by_who_says_it(bench):
    texts = quality.held_out(bench.tokenizer, 3, 50)
    assert texts.tokens.shape == texts.said.shape == (3, 50) and 0 < texts.said.float().mean() < 1
    reference = torch.randn(3, 50, 600, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    other = reference.clone()
    other[:, :, 7] -= 1.0  # not normalised: only to see where it is read
    changed = quality.change(reference, other, texts.tokens)
    assert torch.equal(changed.nats.nonzero(), (texts.tokens[:, 1:] == 7).nonzero())
    made = quality.summary(texts, quality.Change(texts.said[:, 1:] * 2.0, changed.kl, changed.same))
    assert made.said.mean == pytest.approx(2.0)
    assert made.nats.mean == pytest.approx(float(texts.said[:, 1:].float().mean() * 2))
    with pytest.raises(RequestError, match="finite"):
        quality.change(reference, reference * float("nan"), texts.tokens)


def test_texts_are_drawn_anew_and_the_same_each_time(tokenizer):
    a, b = (quality.held_out(tokenizer, 2, 64).tokens for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, quality.held_out(tokenizer, 2, 64, seed=0).tokens)


@needs_pocket
def test_no_training_of_pocket_used_the_seed():
    stages = json.loads((POCKET / "training.json").read_text(encoding="utf-8"))
    assert quality.SEED not in {stage["seed"] for stage in stages}


def test_needles_stand_where_they_should_and_can_be_found(tokenizer):
    made = needle.needles(tokenizer, (400, 700), depths=(0.0, 0.5, 1.0), count=5, seed=3)
    assert made == needle.needles(tokenizer, (400, 700), depths=(0.0, 0.5, 1.0), count=5, seed=3)
    assert [one.topic for one in made[:5]] == list(needle.TOPICS)
    for one in made:
        value = tokenizer.decode(one.answer[one.value]).strip()
        text, other = tokenizer.decode(one.prompt), tokenizer.decode(one.other)
        assert one.length * 0.6 < len(one.prompt) + len(one.answer) <= one.length
        assert one.answer[-1] == tokenizer.eos and value and value in text
        told = text.index(value) / len(text)
        assert abs(told - 0.85 * one.depth) < 0.3
        assert text != other
    assert len({tuple(one.prompt) for one in made}) == len(made)


def test_a_needle_is_worth_what_the_model_says_after_the_prompt(bench):
    [one] = needle.needles(bench.tokenizer, (300,), depths=(0.5,), count=1)
    found = needle.ask(bench.model, "fp32", one.prompt, one)
    whole = torch.tensor([[*one.prompt, *one.answer]])
    with torch.inference_mode():
        predicted = bench.model(whole)[0, len(one.prompt) - 1 : -1].log_softmax(-1)
    nats = predicted.gather(-1, torch.tensor(one.answer)[:, None])[one.value].sum()
    assert found.nats == pytest.approx(float(nats), abs=1e-3)
    assert found.said == bool((predicted.argmax(-1) == torch.tensor(one.answer)).all())


def test_exam_marks_are_compared_question_by_question(bench, monkeypatch):
    def examine(engine, asked):
        right = {"fp32": {0, 1, 2}, "q6": {0, 1, 3}, "int4": set()}[engine.cache_format]
        return Report(tuple(Marked(q, f"{n in right}", n in right) for n, q in enumerate(asked)))

    monkeypatch.setattr(bench_cache, "examine", examine)
    formats = [cache_format(name) for name in ("q6", "int4")]
    found = bench_cache._exam(bench, cache_format("fp32"), formats, every=60)
    total = found["q6"].total
    assert total == 5 and (found["q6"].gained, found["q6"].lost, found["q6"].same) == (1, 1, 3)
    assert found["q6"].difference.mean == 0 and found["q6"].difference.low < 0 < found["q6"].difference.high
    assert (found["int4"].passed, found["int4"].lost, found["int4"].difference.mean) == (0, 3, -3 / total)
    assert bench_cache._exam(bench, cache_format("fp32"), formats, every=0) == {}


def test_formats_take_turns_when_timed(bench, monkeypatch):
    order = []
    monkeypatch.setattr(bench_cache, "_decode", lambda model, cache, *rest: order.append(cache.format) or 1.0)
    speeds = decode(bench.model, [cache_format("q6"), cache_format("bf16")], [8], rounds=2)
    assert order == ["q6", "bf16"] * 3 and speeds == {"q6": {8: (1.0, 1.0)}, "bf16": {8: (1.0, 1.0)}}


def test_an_interval_is_of_the_mean_and_the_same_each_time():
    one = interval([0.0, 1.0, 2.0, 3.0] * 10)
    assert one == interval([0.0, 1.0, 2.0, 3.0] * 10) and one.mean == 1.5 and 1.0 < one.low < 1.5 < one.high < 2.0
    assert interval([5.0, 1.0], [0.0, 2.0]) == (1.0, 1.0, 1.0)
    assert interval([2.0, 8.0], [2.0, 1.0]).mean == 4.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "q7"], "no cache format called 'q7'"),
        (["--formats", "q6", "q6"], "once each"),
        (["--shape", "28m"], "--shape is not of `workbench bench cache`"),
        (["--context", "64"], "--context is not of"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, said, capsys):
    assert main(["bench", "cache", "--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@needs_pocket
def test_six_bits_cost_pocket_little_and_less_than_the_plain_way():
    """The default 6-bit format against plain rounding to 6 bits, in one run."""
    bench = load(device="cpu", dtype="fp32")
    texts = quality.held_out(bench.tokenizer, 8, 512)
    read = {name: lambda x, name=name: quality.through(bench.model, x, name) for name in ("fp32", "q6", "int6")}
    _, changes = quality.compared(texts, read["fp32"], {name: read[name] for name in ("q6", "int6")})
    q6, int6 = (quality.summary(texts, changes[name]) for name in ("q6", "int6"))
    assert abs(q6.perplexity.mean) <= 0.003 and q6.same >= 0.99
    assert q6.kl_mean < int6.kl_mean and q6.kl_p99 < int6.kl_p99 and q6.same >= int6.same


def test_saved_results_are_what_the_code_writes():
    """A result that lies in kernels/results was written by this benchmark, and can be drawn."""
    for path in Path(bench_cache.__file__).parents[2].glob("kernels/results/cache-*.json"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        assert kept["about"]["date"] and points(kept).loc["q6"].gt(0).all()
