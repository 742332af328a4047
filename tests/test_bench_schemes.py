"""What was tried for 6 bits: the candidates store what they say, and are compared with the default on the same text."""

import json
from dataclasses import replace

import pytest
import torch

from workbench.__main__ import main
from workbench.benchmarks import schemes
from workbench.benchmarks.quantisers import Exact, Rounded, Stored, hadamard, lloyd_max
from workbench.benchmarks.report import points
from workbench.benchmarks.schemes import BUDGET, ROW, Scheme, candidates, made_rows, measure
from workbench.checkpoint import Random, save
from workbench.codec import Codes, Groups
from workbench.config import Config
from workbench.errors import RequestError
from workbench.formats import CACHE_FORMATS
from workbench.model import Model

ROWS = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 96)


def error(rounding, x: torch.Tensor) -> float:
    return float((rounding(x) - x).square().mean().sqrt() / x.square().mean().sqrt())


@pytest.mark.parametrize(
    ("candidate", "codec"),
    [
        (Rounded(6), Codes(6)),
        (Rounded(10), Codes(10)),
        (Rounded(5, 16, "8 bit", search=True), Groups(5, 16)),
        (Rounded(4, 8, "8 bit", search=True), Groups(4, 8)),
    ],
)
def test_a_candidate_that_was_chosen_rounds_as_its_codec_packs(candidate, codec):
    stored = Stored(codec)
    assert torch.equal(candidate(ROWS), stored(ROWS))
    assert [candidate.nbytes(width) for width in (96, 64, 50)] == [stored.nbytes(width) for width in (96, 64, 50)]


def test_bytes_are_codes_scales_and_offsets():
    assert Rounded(5, 32).nbytes(512) == 320 + 32
    assert Rounded(5, 16, "8 bit").nbytes(512) == 320 + 32 + 2
    assert Rounded(6, levels="asymmetric").nbytes(512) == 384 + 4
    assert Exact().nbytes(64) == 128 and torch.equal(Exact()(ROWS), ROWS)


def test_the_codebook_loses_what_is_known_of_it():
    """Distortion of the best 4 and 16 levels on a normal distribution (Max, 1960)."""
    x = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    weight = (-x.square() / 2).exp()
    for bits, known in ((2, 0.1175), (4, 0.009497)):
        levels = lloyd_max(bits).double()
        nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        assert float(((nearest - x).square() * weight).sum() / weight.sum()) == pytest.approx(known, rel=0.01)


def test_a_rotation_turns_back_and_spreads_what_stands_out():
    turn = hadamard(128)
    assert torch.allclose(turn @ turn.mT, torch.eye(128), atol=1e-5)
    channels = made_rows(256)["channels"]
    assert error(Rounded(5, turned=True), channels) < error(Rounded(5), channels) / 3
    with pytest.raises(RequestError, match="power of two"):
        Rounded(6, turned=True)(ROWS)


def test_more_bits_and_smaller_groups_lose_less():
    errors = [error(Rounded(bits), ROWS) for bits in (4, 5, 6, 8, 10)]
    assert errors == sorted(errors, reverse=True)
    errors = [error(Rounded(5, group), ROWS) for group in (None, 32, 16, 8)]
    assert errors == sorted(errors, reverse=True)
    assert error(Rounded(4, 16, search=True), ROWS) < error(Rounded(4, 16), ROWS)


@pytest.mark.parametrize(
    "candidate", [scheme.latent for scheme in candidates()] + [Rounded(6, levels="mid-rise")], ids=str
)
def test_zeros_and_constants_come_back_finite_and_close(candidate):
    for x in (torch.zeros(2, 64), torch.full((2, 64), 3.0), torch.full((2, 64), 1e4)):
        back = candidate(x)
        assert torch.isfinite(back).all() and (back - x).abs().max() <= 0.16 * x.abs().max() + 1e-5


@pytest.mark.parametrize("wrong", [{"levels": "even"}, {"scale": "fp8"}, {"levels": "mid-rise", "search": True}])
def test_what_is_no_candidate_is_refused(wrong):
    with pytest.raises(RequestError):
        Rounded(6, **wrong)


def test_the_default_and_the_plain_way_are_among_them_within_the_budget():
    found = {scheme.name: scheme for scheme in candidates()}
    assert len(found) == len(candidates())
    assert found["q6"].nbytes(ROW) == CACHE_FORMATS["q6"].nbytes(ROW) == 436 <= BUDGET
    assert found["int6"].nbytes(ROW) == CACHE_FORMATS["int6"].nbytes(ROW) <= BUDGET
    choices = {scheme.asks for scheme in candidates()}
    assert choices == {"shipped", "scales", "levels", "channels", "rotary key", "one part alone"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary, tokenizer):
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    config = replace(
        Config.preset("pocket"), vocab_size=600, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=32, qk_rope_head_dim=8,
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
    )  # fmt: skip
    save(Model(config, Random(config, seed=0)), path, files_from=vocabulary)
    return path


TRIED = [
    Scheme("shipped", "q6", Stored(Groups(5, 16)), Stored(Codes(10))),
    Scheme("scales", "coarse", Rounded(3), Rounded(3)),
    Scheme("channels", "folded", Stored(Groups(5, 16)), Stored(Codes(10)), folded=True),
    Scheme("one part alone", "nothing lost", Exact(), Exact()),
]


def test_schemes_are_measured_beside_the_default_and_kept(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(schemes, "candidates", lambda: TRIED)
    monkeypatch.setattr(schemes, "LENGTH", 48)
    result = measure(checkpoint, threads=1, quick=True)
    rows = {row.scheme.name: row for row in result.rows}
    assert rows["q6"].over_q6 == (0, 0, 0) and rows["coarse"].over_q6.low > 0
    assert rows["nothing lost"].summary.kl_mean == 0 and rows["nothing lost"].errors == (0, 0)
    # norm weights of random models are all 1: there is nothing to fold away
    assert rows["folded"].summary.kl_mean == pytest.approx(rows["q6"].summary.kl_mean, rel=1e-3)
    assert [one["layer"] for one in result.layers] == [0, 1] and result.layers[0]["weight_spread"] == 0
    (tmp_path / "kernels").mkdir()
    kept = json.loads(result.save(tmp_path / "kernels" / "results").read_text(encoding="utf-8"))
    assert kept["not_carried"] and kept["about"]["row"] == "32 + 8"
    assert points(kept).index.tolist() == list(rows) and kept["schemes"][0]["bytes"] == 436
    text = str(result)
    assert "Not carried over" in text and all(name in text for name in rows)


def test_options_of_other_benchmarks_are_refused(capsys):
    assert main(["bench", "schemes", "--formats", "q6"]) == 2
    assert "--formats is not of `workbench bench schemes`" in capsys.readouterr().err
