"""A Hook is a plain function at a site: what it returns counts, and what would break the model is refused."""

import checkpoints
import pytest
import torch

from workbench.editing import Editing
from workbench.edits import Bias, Scale
from workbench.errors import RequestError
from workbench.hook import Hook
from workbench.probe import OFF, SITES, both, layers_with
from workbench.recorder import Recorder

LENGTH = 9


@pytest.fixture(params=["no_grad", "inference_mode"], autouse=True)
def without_gradients(request):
    with getattr(torch, request.param)():
        yield


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([checkpoints.some_tokens(checkpoints.V2, LENGTH, seed=3)])


@pytest.fixture(scope="module")
def bench(model):
    return model("v2")


@pytest.mark.parametrize("site", SITES)
def test_looking_changes_nothing_and_sees_what_a_recorder_sees(site, bench, tokens):
    seen, recorder = {}, Recorder(site)

    def look(x, layer):
        seen[layer] = x.clone()
        return x

    logits = bench(tokens, probe=both(Hook(site, look), recorder))
    assert list(seen) == layers_with(site, bench.config)
    assert all(torch.equal(seen[layer], recorder[site, layer]) for layer in seen)
    assert torch.allclose(logits, bench(tokens), atol=1e-4)


@pytest.mark.parametrize("site", [site.name for site in SITES.values() if site.writable])
def test_what_it_returns_takes_the_place(site, bench, tokens):
    layer = layers_with(site, bench.config)[-1]
    hook = Hook(site, lambda x, layer: x.roll(1, -1) * 1.25, None if layer is None else [layer])
    assert (bench(tokens, probe=hook) - bench(tokens)).abs().max() > 1e-2


def test_it_acts_in_its_layers_only(bench, tokens):
    called = []

    def halved(x, layer):
        called.append(layer)
        return x / 2

    got = bench(tokens, probe=Hook("attn.z", halved, layers=[2, 0]))
    edits = [Scale("attn.z", 0.5, layer=0), Scale("attn.z", 0.5, layer=2)]
    assert called == [0, 2]
    assert torch.equal(got, bench(tokens, probe=Editing(edits, bench.config)))
    assert Hook("attn.z", halved, layers=[2]).at(1) is OFF


def test_the_router_can_be_steered_by_a_function(bench, tokens):
    def louder(x, layer):
        return x + torch.nn.functional.one_hot(torch.tensor(3), x.shape[-1]) * 2.0

    expected = bench(tokens, probe=Editing([Bias(1, 3, 2.0)], bench.config))
    assert torch.allclose(bench(tokens, probe=Hook("moe.router_logits", louder, [1])), expected, atol=1e-5)


def written_into(x, layer):
    x[:, 0] = 0
    return x


def written_by_a_view(x, layer):
    x.select(1, 0).add_(1)
    return x.clone()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, layer: None, "returned nothing. Return x"),
        (lambda x, layer: x.tolist(), "returned list"),
        (lambda x, layer: x[:, :1], r"returned \[1, 1, .*\] torch.float32; \[1, 9, .*\] torch.float32 is needed"),
        (lambda x, layer: x.double(), r"returned .* torch.float64; .* torch.float32 is needed"),
        (written_into, r"wrote into x. Change a copy"),
        (written_by_a_view, r"wrote into x. Change a copy"),
    ],
)
def test_a_function_that_breaks_the_rules_is_refused(function, says, bench, tokens):
    with pytest.raises(RequestError, match=f"function at attn.z {says}"):
        bench(tokens, probe=Hook("attn.z", function))


def test_what_is_only_read_stays_as_it_is(bench, tokens):
    with pytest.raises(RequestError, match="changed moe.experts, which is only read here"):
        bench(tokens, probe=Hook("moe.experts", lambda x, layer: x.flip(-1)))


@pytest.mark.parametrize(
    ("site", "layers", "says"),
    [
        ("moe.gates", [0], "moe.gates never fires in layers"),
        ("attn.z", [99], "layers go from 0 to"),
    ],
)
def test_a_place_that_is_not_there_is_refused_before_any_work(site, layers, says, bench, tokens):
    called = []
    with pytest.raises(RequestError, match=says):
        bench(tokens, probe=both(Hook("embed", lambda x, layer: called.append(x) or x), Hook(site, None, layers)))
    assert not called


def test_a_site_that_the_model_lacks_and_one_that_nobody_has(model, tokens):
    with pytest.raises(RequestError, match="attn.q_latent never fires in this model"):
        model("lite")(tokens, probe=Hook("attn.q_latent", None))
    with pytest.raises(RequestError, match="no site called 'attn.zz'"):
        Hook("attn.zz", None)
