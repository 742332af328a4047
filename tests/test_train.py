"""Training: the losses are the paper's, the assistant's words are the target, and a model learns."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from workbench.checkpoint import Random
from workbench.config import Config
from workbench.errors import RequestError
from workbench.model import Model
from workbench.opening import open_model
from workbench.recorder import Recorder
from workbench.tokenizer import Tokenizer
from workbench.train.balance import losses
from workbench.train.loop import Recipe, batches, rows, train
from workbench.train.pocket import keep, stage, train_pocket

TALK = [
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Bonjour !"}],
    [{"role": "user", "content": "12 + 30"}, {"role": "assistant", "content": "12 + 30 = 42."}],
]


@pytest.fixture
def model(tokenizer):
    config = replace(
        Config.preset("pocket"),
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        n_routed_experts=8,
        n_group=4,
        num_experts_per_tok=2,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
    )
    return Model(config, Random(config, seed=0))


def endless(conversations, tokenizer):
    while True:
        yield from rows(conversations, tokenizer, others=0.1)


def test_the_balance_losses_are_equations_23_to_31():
    config = replace(Config.preset("pocket"), n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=2)
    probs = torch.rand(2, 5, 6).softmax(-1).double()
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(10)]).view(2, 5, 2)
    recorder = Recorder("moe.router_probs", "moe.experts")
    recorder._keep({("moe.router_probs", 1): probs, ("moe.experts", 1): ids})
    expected = torch.zeros(3, dtype=torch.float64)
    for b in range(2):
        f = [6 / (2 * 5) * sum(i in ids[b, t] for t in range(5)) for i in range(6)]
        p = [sum(probs[b, t, i] for t in range(5)) / 5 for i in range(6)]
        expected[0] += sum(x * y for x, y in zip(f, p, strict=True)) / 2
        for d in range(3):
            own = [2 * d, 2 * d + 1]
            mass = sum(p[j] for j in own)
            expected[1] += sum(f[j] for j in own) / 2 * mass / 2
            sent = sum(any(j in ids[b, t] for j in own) for t in range(5))
            expected[2] += 3 / (2 * 5) * sent * mass / 2
    assert torch.stack(losses(recorder, config)).tolist() == pytest.approx(expected.tolist())


def test_balance_pulls_the_router_and_only_the_router(model):
    model.requires_grad_(True)
    recorder = Recorder("moe.router_probs", "moe.experts")
    model(torch.randint(0, 600, (2, 30)), probe=recorder)
    sum(losses(recorder, model.config)).backward()
    assert all(block.mlp.router.grad.abs().sum() > 0 for block in model.blocks[1:])
    assert model.head.grad is None


def test_the_assistant_and_its_end_mark_are_the_target(tokenizer):
    tokens, weights = next(rows(TALK, tokenizer, others=0.1))
    said = [token for token, weight in zip(tokens, weights, strict=True) if weight == 1]
    assert tokenizer.decode(said) == "Bonjour !<｜end▁of▁sentence｜>"
    assert set(weights) == {0.1, 1.0}


def test_rows_start_with_a_conversation_and_end_long(tokenizer):
    recipe = Recipe(steps=10, rows=3, length=20, long_rows=1, long_length=60, long_share=0.2)
    made = list(batches(endless(TALK, tokenizer), recipe))
    assert [tuple(tokens.shape) for tokens, _ in made] == [(3, 21)] * 8 + [(1, 61)] * 2
    assert all((tokens[:, 0] == tokenizer.bos).all() and tokens.shape == weights.shape for tokens, weights in made)


def test_the_rate_rises_stays_and_falls_to_nothing():
    recipe = Recipe(steps=100, warm_up=10, rate=1.0, descent=0.4)
    rates = [recipe.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:60] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.025)


def test_a_model_learns_what_it_is_told_and_ends_without_gradients(model, tokenizer):
    recipe = Recipe(steps=40, rows=2, length=48, long_share=0, warm_up=5, rate=2e-2)
    seen = list(train(model, endless(TALK, tokenizer), recipe))
    assert seen[0].loss > 5 > 1 > seen[-1].loss
    assert seen[-1].tokens == 40 * 2 * 48
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_what_is_kept_opens_again_with_its_record(model, tokenizer, tmp_path):
    recipe = Recipe(steps=2, rows=1, length=24, long_share=0)
    [*_, last] = islice(train(model, endless(TALK, tokenizer), recipe), 2)
    keep(model, tmp_path / "kept", tokenizer.path.parent, [stage(last, recipe, seed=7)])
    again = open_model(tmp_path / "kept", dtype=torch.float32)
    for name, tensor in model.tensors.items():
        assert torch.equal(again.tensors[name], tensor.bfloat16().float()), name
    [record] = json.loads((tmp_path / "kept" / "training.json").read_text())
    assert (record["seed"], record["recipe"]["steps"], record["reached"]["tokens"]) == (7, 2, 48)


def test_training_goes_on_from_a_checkpoint_and_remembers_both_stages(model, tokenizer, tmp_path):
    first = Recipe(steps=1, rows=1, length=16, long_share=0)
    [last] = train(model, endless(TALK, tokenizer), first)
    keep(model, tmp_path / "first", tokenizer.path.parent, [stage(last, first, seed=1)])
    train_pocket(tmp_path / "second", replace(first, steps=3), seed=2, start=tmp_path / "first")
    record = json.loads((tmp_path / "second" / "training.json").read_text())
    assert [(part["seed"], part["recipe"]["steps"]) for part in record] == [(1, 1), (2, 3)]
    assert Tokenizer(tmp_path / "second").encode("Bonjour !") == tokenizer.encode("Bonjour !")


def test_a_recorder_names_the_sites_it_knows():
    with pytest.raises(RequestError, match=r"moe\.gate.*moe\.gates"):
        Recorder("moe.gate")
