"""Rounding by what a matrix reads: outputs are nearer, whatever is read; and the calibration is of what is read."""

from dataclasses import replace

import pytest
import torch

from workbench import calibration, ops, rounding
from workbench.calibration import Calibration, nbytes, read_by, widths, write
from workbench.checkpoint import Random
from workbench.codec import Codes, Float, Groups, Tiles
from workbench.config import Config
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.matrix import Matrix
from workbench.model import Model
from workbench.quantising import Quantising, nearest
from workbench.recipe import Recipe
from workbench.recorder import Recorder
from workbench.rounding import compensated, prepared

NAME = "model.layers.0.self_attn.o_proj.weight"
LITE = replace(
    Config.preset("pocket"), vocab_size=90, hidden_size=40, intermediate_size=56, moe_intermediate_size=24,
    num_hidden_layers=3, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=20, n_routed_experts=8, n_group=1, topk_group=1, topk_method="greedy",
)  # fmt: skip
WITH_QUERY_LATENT = replace(LITE, q_lora_rank=20, n_shared_experts=None)


def reads(width: int, rank: int, count: int = 4000) -> torch.Tensor:
    """What a matrix may read [count, width]: some directions of unequal size, and a little of all."""
    spread = torch.randn(rank, width) * torch.logspace(0, -1, rank)[:, None]
    return torch.randn(count, rank) @ spread + 0.1 * torch.randn(count, width)


def knowing(moment: torch.Tensor) -> Calibration:
    return Calibration({read_by(NAME): moment}, "made")


def loss(matrix: Matrix, weights: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (matrix.dense(torch.float32) - weights).mT).square().mean())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("rows", "width"), [(37, 192), (64, 100), (20, 300)])
def test_outputs_are_nearer_on_what_was_not_calibrated_on(bits, rows, width):
    weights, x = torch.randn(rows, width) * torch.rand(rows, 1), reads(width, 24)
    codec, seen, fresh = Groups(bits, 64), x[:3000], x[3000:]
    made = compensated(knowing(seen.mT @ seen / len(seen)))(NAME, codec, weights)
    plain = nearest(NAME, codec, weights)
    assert loss(made, weights, fresh) < 0.7 * loss(plain, weights, fresh)
    assert (made.dense(torch.float32) - weights).square().mean() > (
        plain.dense(torch.float32) - weights
    ).square().mean()
    assert made.shape == weights.shape and made.bits == plain.bits
    for part, other in zip(made.parts, plain.parts, strict=True):
        assert (part.dtype, part.shape) == (other.dtype, other.shape)


def test_errors_are_passed_on_to_all_columns_whatever_is_done_at_once(monkeypatch):
    weights, x = torch.randn(30, 300), reads(300, 24)
    made = [compensated(knowing(x.mT @ x))(NAME, Groups(4, 64), weights)]
    monkeypatch.setattr(rounding, "BLOCK", 1000)
    made.append(compensated(knowing(x.mT @ x))(NAME, Groups(4, 64), weights))
    a, b = (one.dense(torch.float32) for one in made)
    # a sum in another order may turn one code, and with it those after it in its row
    assert (a == b).float().mean() > 0.8
    assert loss(made[0], weights, x) == pytest.approx(loss(made[1], weights, x), rel=0.05)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest(size):
    weights = torch.randn(11, 192)
    plain = nearest(NAME, Groups(4, 64), weights)
    made = compensated(knowing(torch.eye(192) * size))(NAME, Groups(4, 64), weights)
    assert all(torch.equal(*both) for both in zip(made.parts, plain.parts, strict=True))


def test_of_unequal_inputs_the_larger_count_more_in_a_scale_and_no_weight_moves():
    weights, sizes = torch.randn(50, 128), torch.logspace(0, 3, 128)[torch.randperm(128)]
    plain = nearest(NAME, Groups(3, 64), weights)
    made = compensated(knowing(sizes.diag()))(NAME, Groups(3, 64), weights)
    unit = made.parts[1].float() / 255 * made.parts[2].float()
    unit = unit.repeat_interleave(64, 1)
    assert torch.equal(made.dense(torch.float32), (weights / unit).round().clamp(-3, 3) * unit)
    assert not torch.equal(made.parts[1], plain.parts[1])
    x = torch.randn(500, 128) * sizes.sqrt()
    assert loss(made, weights, x) < loss(plain, weights, x)


@pytest.mark.parametrize("wrong", ["dead", "all dead", "one direction", "not quite positive", "huge"])
def test_whatever_was_read_the_result_is_finite_and_no_row_is_worse_than_the_nearest(wrong):
    weights, x = torch.randn(20, 130), reads(130, 16)
    x[:, torch.randperm(130)[:40]] = 0
    if wrong == "all dead":
        x = torch.zeros_like(x)
    if wrong == "one direction":
        x = torch.randn(300, 1) @ torch.randn(1, 130)
    moment = x.mT @ x / len(x)
    if wrong == "not quite positive":
        moment -= 0.5 * torch.linalg.eigvalsh(moment)[-1] * (torch.ones(130, 130) - torch.eye(130)) / 130
    if wrong == "huge":
        moment[3, 3] *= 1e8
    weights[2, 5] = 1e4  # far beyond the others
    made = compensated(knowing(moment))(NAME, Groups(3, 64), weights).dense(torch.float32)
    plain = nearest(NAME, Groups(3, 64), weights).dense(torch.float32)
    assert torch.isfinite(made).all()
    damped, _, factor = prepared(moment)
    assert torch.isfinite(factor).all()
    errors = [((one - weights).double() @ damped.double() * (one - weights)).sum(1) for one in (made, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    if wrong == "all dead":
        assert torch.equal(made, plain)
    if wrong == "dead":  # nothing is known of them, so nothing is done to them
        dead = moment.diagonal() == 0
        unit = (plain - weights).abs().amax(1, keepdim=True)
        assert ((made - weights).abs()[:, dead] <= 2 * unit).all()


def test_a_factor_undoes_the_moment():
    x = reads(33, 9)
    damped, order, factor = prepared(x.mT @ x / len(x))
    assert torch.equal(damped.diagonal()[order].argsort(descending=True), torch.arange(33))
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor @ damped[order][:, order], torch.eye(33), atol=2e-3)


@pytest.mark.parametrize("moment", [torch.full((64, 64), float("nan")), -torch.eye(64), torch.eye(63)])
def test_what_is_no_moment_of_this_matrix_is_refused(moment):
    with pytest.raises(CheckpointError, match="o_proj"):
        compensated(knowing(moment))(NAME, Groups(4, 64), torch.randn(3, 64))


def test_other_formats_and_broken_weights_are_as_the_nearest():
    x = reads(64, 8)
    round = compensated(knowing(x.mT @ x / len(x)))
    weights = torch.randn(6, 64)
    broken = weights.clone()
    broken[1, 7] = float("nan")
    for codec, given in [
        (Codes(8), weights),
        (Tiles(128), weights),
        (Float(torch.bfloat16), weights),
        (Groups(4, 64), broken),
    ]:
        made, plain = round(NAME, codec, given), nearest(NAME, codec, given)
        for part, other in zip(made.parts, plain.parts, strict=True):
            assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))
    embedding = round("model.embed_tokens.weight", Groups(4, 64), weights)
    assert torch.equal(embedding.parts[0], nearest("", Groups(4, 64), weights).parts[0])


def test_the_same_calibration_gives_the_same_bytes_in_any_order():
    moments = {f"layers.{n}.attn.z": x.mT @ x for n, x in enumerate((reads(70, 5), reads(70, 9)))}
    names = [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 1)]
    weights = torch.randn(9, 70)
    a, b = compensated(Calibration(moments, "a")), compensated(Calibration(moments, "a"))
    one = {name: a(name, Groups(4, 64), weights) for name in names}
    two = {name: b(name, Groups(4, 64), weights) for name in reversed(names)}
    assert all(torch.equal(*both) for name in names for both in zip(one[name].parts, two[name].parts, strict=True))
    assert not torch.equal(one[names[0]].parts[0], one[names[1]].parts[0])
    assert a.identity == b.identity != compensated(Calibration(moments, "b")).identity


@pytest.fixture(scope="module", params=[LITE, WITH_QUERY_LATENT], ids=["lite", "query latent"])
def model(request):
    return Model(request.param, Random(request.param, seed=3, std=0.3))


@pytest.fixture(scope="module")
def texts():
    return [torch.randint(90, (5, 30)), torch.randint(90, (1, 21))]


@pytest.fixture(scope="module")
def taken(model, texts):
    return Calibration.collect(model, texts)


def test_every_matrix_that_is_multiplied_with_has_its_moment(model, taken):
    read = {name: read_by(name) for name in model.tensors}
    assert set(taken.moments) == set(widths(model.config))
    unread = set(taken.moments) - set(read.values())
    assert set(read.values()) - {None} <= set(taken.moments)
    assert unread == (set() if model.config.n_shared_experts else {"layers.1.mlp.in", "layers.2.mlp.in"})
    none = {name for name, one in read.items() if one is None}
    assert all("norm" in name or name.endswith(("mlp.gate.weight", "embed_tokens.weight")) for name in none)
    for name in set(read) - none:
        width = model.tensors[name].shape[-1]
        moment = taken.of(name, width)
        assert torch.allclose(moment, moment.mT, rtol=1e-3, atol=1e-5) and (moment.diagonal() >= 0).all()
        with pytest.raises(CheckpointError, match="another model"):
            taken.of(name, width + 1)
    assert nbytes(model.config) == sum(moment.nbytes for moment in taken.moments.values())


def test_moments_are_of_what_passes_the_sites(model, taken, texts):
    sites = ["attn.in", "attn.kv_latent", "attn.z", "mlp.in", "moe.experts", "final.norm"]
    sites += ["attn.q_latent"] if model.config.q_lora_rank else []
    seen = []
    with torch.inference_mode():
        for tokens in texts:
            look = Recorder(*sites)
            model(tokens, probe=look)
            seen.append(look)

    def rows(site: str, layer: int | None) -> torch.Tensor:
        return torch.cat([look[site, layer].flatten(0, 1).flatten(1) for look in seen])

    def check(name: str, x: torch.Tensor) -> None:
        assert torch.allclose(taken.moments[name], x.mT @ x / len(x), rtol=1e-3, atol=1e-4), name

    check("final.norm", rows("final.norm", None))
    for layer in range(3):
        for site in set(sites) - {"moe.experts", "final.norm"}:
            check(f"layers.{layer}.{site}", rows(site, layer))
    tensors, x = model.tensors, rows("mlp.in", 1)
    check("layers.0.hidden", hidden(tensors, "model.layers.0.mlp", rows("mlp.in", 0)))
    if model.config.n_shared_experts:
        check("layers.1.shared.hidden", hidden(tensors, "model.layers.1.mlp.shared_experts", x))
    ids = rows("moe.experts", 1)
    for expert in range(8):
        own, name = x[(ids == expert).any(1)], f"layers.1.experts.{expert}.mlp.in"
        blend = (own.mT @ own + 40 * (x.mT @ x / len(x))) / (len(own) + 40)
        assert torch.allclose(taken.moments[name], blend, rtol=1e-3, atol=1e-4)
        made = hidden(tensors, f"model.layers.1.mlp.experts.{expert}", own)
        rest = taken.moments[f"layers.1.experts.{expert}.hidden"] * (len(own) + 24) - made.mT @ made
        assert torch.linalg.eigvalsh(rest)[0] > -1e-2 * rest.diagonal().amax()  # what all experts saw is left


def hidden(tensors: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    both = torch.cat([tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"]])
    return ops.swiglu(x @ both.mT)


def test_an_expert_that_no_token_chose_has_moments_of_the_others(model, taken):
    with torch.inference_mode():
        one = Calibration.collect(model, [torch.zeros(1, 1, dtype=torch.int64)])
    assert all(torch.isfinite(moment).all() for moment in one.moments.values())
    for expert in range(8):  # one token: what some read is what all read
        assert torch.allclose(one.moments[f"layers.1.experts.{expert}.mlp.in"], one.moments["layers.1.mlp.in"])
        hidden = one.moments[f"layers.1.experts.{expert}.hidden"]
        assert hidden.shape == (24, 24) and hidden.any()


def test_a_file_holds_the_same_a_layer_at_a_time(model, taken, texts, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(
        calibration, "_Sums", lambda *args, sums=calibration._Sums: passes.append(args[1]) or sums(*args)
    )
    write(model, texts, tmp_path / "c.safetensors", limit=1)
    assert passes == [[0], [1], [2]]
    write(model, texts, tmp_path / "two.safetensors", limit=nbytes(model.config, [0, 1]))
    assert passes[3:] == [[0, 1], [2]]
    read = Calibration.open(tmp_path / "c.safetensors")
    assert set(read.moments) == set(taken.moments)
    for name, moment in taken.moments.items():
        assert torch.allclose(read.moments[name], moment, rtol=1e-4, atol=1e-5)
    weights = model.tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    made = compensated(read)("model.layers.1.mlp.experts.3.down_proj.weight", Groups(4, 64), weights)
    assert made.shape == weights.shape and read.identity in compensated(read).identity


def test_what_cannot_be_calibrated_is_refused(model, texts, tmp_path):
    with pytest.raises(BudgetError, match="bytes"):
        Calibration.collect(model, texts, limit=10_000)
    with pytest.raises(RequestError, match="text"):
        Calibration.collect(model, [])
    packed = Model(LITE, Quantising(Random(LITE, seed=3), Recipe.named("int4")))
    with pytest.raises(RequestError, match="plain"):
        write(packed, texts, tmp_path / "c.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))
    calibration.PackWriter(tmp_path / "other.safetensors", [], {}).__enter__().__exit__(None, None, None)
    with pytest.raises(CheckpointError, match="no calibration"):
        Calibration.open(tmp_path / "other.safetensors")


@pytest.mark.parametrize("recipe", ["int4", "int3"])
def test_every_matrix_of_a_model_gives_what_it_gave_more_nearly(model, recipe):
    """On text it was not calibrated on."""
    taken, fresh = (Calibration.collect(model, [torch.randint(90, (40, 50))]) for _ in range(2))
    multiplied = [name for name in model.tensors if read_by(name)]
    source, found = Random(model.config, seed=3, std=0.3), {}
    for round in (nearest, compensated(taken)):
        source.taken.clear()
        other = Model(model.config, Quantising(source, Recipe.named(recipe), round))
        for name in multiplied:
            weights = model.tensors[name]
            if isinstance(other.tensors[name].codec, Groups):
                wrong = other.tensors[name].dense(torch.float32) - weights
                found.setdefault(name, []).append(float((wrong @ fresh.of(name, weights.shape[-1]) * wrong).sum()))
    assert len(found) > 50
    ratios = torch.tensor([after / before for before, after in found.values()])
    assert ratios.max() < 1.2 and ratios.mean() < 0.9
