"""The same answer however it is asked for: absorbed or expanded, in chunks, in a batch, forked, cut and continued."""

import math

import checkpoints
import pytest
import reference
import torch

from workbench import ops
from workbench.cache import LatentCache
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.errors import CheckpointError, RequestError
from workbench.model import Model, absorbing_is_cheaper
from workbench.opening import open_model
from workbench.probe import Probe

TOLERANCE = 1e-4
NAMES = ["lite", "v2", "released_widths"]


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([checkpoints.some_tokens(checkpoints.LITE, 160)])


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def new_cache(model, batch=1, format="fp32"):
    return LatentCache(model.config, batch=batch, format=format)


def far(a, b):
    assert a.shape == b.shape and a.isfinite().all()
    return (a - b).abs().max().item()


@pytest.mark.parametrize("cached", [False, True], ids=["without_cache", "with_cache"])
@pytest.mark.parametrize("name", NAMES)
def test_absorbed_is_expanded(name, cached, model, tokens, monkeypatch):
    bench, answers = model(name), []
    for absorbed in (True, False):
        monkeypatch.setattr("workbench.model.absorbing_is_cheaper", lambda *_, absorbed=absorbed: absorbed)
        cache = new_cache(bench) if cached else None
        whole = [bench(tokens[:, :100], cache)]
        if cached:
            whole += [bench(tokens[:, 100:150], cache), bench(tokens[:, 150:151], cache)]
        answers.append(torch.cat(whole, 1))
    assert far(*answers) <= TOLERANCE


@pytest.mark.parametrize("scores", [1, 700, 5000])
def test_attention_with_few_scores_at_once_is_attention(scores, monkeypatch):
    query, key = torch.randn(2, 9, 3, 8), torch.randn(2, 40, 1, 8)
    whole = ops.attend(query, key, key[..., :5], 0.3)
    monkeypatch.setattr(ops, "SCORES", scores)
    assert far(ops.attend(query, key, key[..., :5], 0.3), whole) <= 1e-6


@pytest.mark.parametrize("preset", ["v2", "v2.5", "v2-lite"])
def test_released_models_decode_absorbed_and_read_prompts_expanded(preset):
    config = Config.preset(preset)
    assert all(absorbing_is_cheaper(config, 1, context) for context in (2, 100, 4096, 131072))
    assert not any(absorbing_is_cheaper(config, new, new) for new in (256, 4096))


CHUNKS = {
    "halves": [80, 80],
    "ragged": [37, 27, 1, 63, 32],
    "token by token": [1] * 160,
    "then decoded": [90] + [1] * 70,
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_chunks_through_the_cache_are_one_pass(name, chunks, model, tokens):
    bench = model(name)
    cache = new_cache(bench)
    parts = [bench(chunk, cache) for chunk in tokens.split(chunks, 1)]
    assert cache.lengths == [160]
    assert far(torch.cat(parts, 1), bench(tokens)) <= TOLERANCE


def test_only_the_last_logits_are_computed_when_only_they_are_wanted(model, tokens):
    assert far(model("v2")(tokens, logits="last"), model("v2")(tokens)[:, -1:]) <= 1e-5
    assert far(model("v2")(tokens, new_cache(model("v2")), logits="last"), model("v2")(tokens)[:, -1:]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_alone(name, model, tokens):
    bench, batch = model(name), tokens.view(4, 40)
    alone = torch.cat([bench(row[None]) for row in batch])
    assert far(bench(batch), alone) <= TOLERANCE
    assert far(bench(batch, new_cache(bench, batch=4)), alone) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_ragged_lengths_is_each_alone(name, model, tokens):
    bench, lengths = model(name), [1, 63, 64, 100]
    cache = new_cache(bench, batch=4)
    for sequence, length in enumerate(lengths):
        bench(tokens[:, :length], cache.only(sequence))
    following = tokens[0, 120:136].view(4, 4)
    together = torch.cat([bench(step, cache) for step in following.split(1, 1)], 1)  # decoded side by side
    assert cache.lengths == [length + 4 for length in lengths]
    for sequence, length in enumerate(lengths):
        alone = bench(torch.cat([tokens[:, :length], following[sequence][None]], 1))
        assert far(together[sequence], alone[0, length:]) <= TOLERANCE
    several = bench(following, cache)  # and four at once
    for sequence, length in enumerate(lengths):
        alone = bench(torch.cat([tokens[:, :length], following[sequence].repeat(2)[None]], 1))
        assert far(several[sequence], alone[0, length + 4 :]) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 64, 100])
def test_a_fork_diverges_as_if_recomputed_and_its_parent_does_not_notice(length, model, tokens):
    bench, cache = model("v2"), new_cache(model("v2"))
    bench(tokens[:, :length], cache)
    fork = cache.fork()
    other = tokens.flip(1)[:, :30]
    assert far(bench(other, fork), bench(torch.cat([tokens[:, :length], other], 1))[:, length:]) <= TOLERANCE
    assert cache.lengths == [length] and fork.lengths == [length + 30]
    following = bench(tokens[:, length : length + 30], cache)
    assert far(following, bench(tokens[:, : length + 30])[:, length:]) <= TOLERANCE


@pytest.mark.parametrize("length", [0, 1, 64, 99])
def test_cut_and_continued_is_recomputed(length, model, tokens):
    bench, cache = model("v2"), new_cache(model("v2"))
    bench(tokens[:, :100], cache)
    cache.truncate(length)
    other = tokens.flip(1)[:, :40]
    assert far(bench(other, cache), bench(torch.cat([tokens[:, :length], other], 1))[:, length:]) <= TOLERANCE


def test_a_bf16_cache_changes_the_logits_by_its_rounding_only(model, tokens):
    bench = model("lite")
    cache = new_cache(bench, format="bf16")
    through = torch.cat([bench(chunk, cache) for chunk in tokens.split(40, 1)], 1)
    assert (through - bench(tokens)).square().mean().sqrt() < 0.05


class Interrupt(Probe):
    """Stands for the stop button: raises in the middle of a pass."""

    def __call__(self, site, x):
        if site == "resid.mid":
            raise KeyboardInterrupt
        return x


def test_an_interrupted_pass_can_be_repeated(model, tokens):
    bench, cache = model("v2"), new_cache(model("v2"))
    bench(tokens[:, :60], cache)
    with pytest.raises(KeyboardInterrupt):
        bench(tokens[:, 60:], cache, probe=Interrupt())
    assert cache.lengths == [60]
    assert far(bench(tokens[:, 60:70], cache), bench(tokens[:, :70])[:, 60:]) <= TOLERANCE


def test_a_cache_grown_in_inference_mode_serves_outside_it(model, tokens):
    bench, cache = model("lite"), new_cache(model("lite"))
    with torch.inference_mode():
        bench(tokens[:, :70], cache)
    assert far(bench(tokens[:, 70:], cache), bench(tokens)[:, 70:]) <= TOLERANCE


# requests that cannot be carried out: an error that says so, and a cache as it was

BAD_TOKENS = {
    "beyond the vocabulary": (torch.tensor([[3, 192]]), "192"),
    "negative": (torch.tensor([[3, -1]]), "-1"),
    "none": (torch.empty(1, 0, dtype=torch.int64), "non-empty"),
    "without a batch": (torch.tensor([3, 4]), "batch"),
    "fractions": (torch.tensor([[3.0, 4.0]]), "integers"),
    "two sequences for a cache of one": (torch.tensor([[3], [4]]), "1 sequences"),
    "more than the context": (torch.zeros(1, 1279, dtype=torch.int64), "1280"),
}


@pytest.mark.parametrize(("bad", "named"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_bad_tokens_are_refused_and_the_cache_is_as_it_was(bad, named, model, tokens):
    bench, cache = model("lite"), new_cache(model("lite"))
    bench(tokens[:, :2], cache)
    held = cache.nbytes
    with pytest.raises(RequestError, match=named):
        bench(bad, cache)
    assert cache.lengths == [2] and cache.nbytes == held
    assert far(bench(tokens[:, 2:10], cache), bench(tokens[:, :10])[:, 2:]) <= TOLERANCE


def test_more_tokens_than_the_context_are_refused_without_a_cache_too(model):
    with pytest.raises(RequestError, match="1280"):
        model("lite")(torch.zeros(1, 1281, dtype=torch.int64))


def test_fp16_is_refused_with_the_reason(checkpoint):
    with pytest.raises(CheckpointError, match="65,504"):
        open_model(checkpoint("lite").path, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="bf16"):
        Model(Config.from_json(checkpoint("lite").config), Random(dtype=torch.float16))


# gradients, for training and for looking


def gradient_of(model, name):
    """The gradient of a named checkpoint tensor, which is a view into a parameter."""
    tensor = model.tensors[name]
    [owner] = [p for p in model.parameters() if p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()]
    return owner.grad.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - owner.storage_offset())


@pytest.mark.parametrize(
    "name", ["lite", "v2", "groups_differ", "tied_embeddings", "normed_gates", "no_shared_experts"]
)
def test_gradients_are_those_of_the_reference(name, checkpoint, tokens):
    config, length = checkpoint(name).config, 48
    bench = open_model(checkpoint(name).path, dtype=torch.float32).requires_grad_()
    drawn = {key: tensor.double().requires_grad_() for key, tensor in checkpoint(name).tensors.items()}
    following = tokens[0, 1 : length + 1]
    torch.nn.functional.cross_entropy(bench(tokens[:, :length])[0], following).backward()
    exact = reference.run(config, drawn, tokens[0, :length].tolist()).logits
    torch.nn.functional.cross_entropy(exact, following).backward()
    for key, tensor in drawn.items():
        ours = gradient_of(bench, key)
        if tensor.grad is None:  # an expert no token chose
            assert not ours.any()
            continue
        assert (ours - tensor.grad).norm() <= 1e-4 * tensor.grad.norm() + 1e-7, key


def test_gradients_are_not_asked_for_unless_somebody_does(model, tokens):
    assert not model("lite")(tokens[:, :4]).requires_grad


def test_a_fresh_model_guesses_no_better_than_chance(tokens):
    config = Config.from_json(checkpoints.V2)
    loss = torch.nn.functional.cross_entropy(Model(config, Random(config))(tokens)[0, :-1], tokens[0, 1:])
    assert abs(loss - math.log(config.vocab_size)) < 0.2
