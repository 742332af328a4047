"""Probes of one's own: what they may change changes the answer, the rest is refused; and no probe costs nothing."""

import ast
import inspect

import checkpoints
import pytest
import torch
from inside import Inside
from torch.utils._python_dispatch import TorchDispatchMode

from workbench import model as model_module
from workbench.cache import LatentCache
from workbench.editing import Editing
from workbench.edits import Ablate
from workbench.errors import RequestError
from workbench.probe import INSIDE, OFF, SITES, Probe, both, layers_with, read
from workbench.recorder import Recorder

LENGTH = 10
WRITABLE = [site.name for site in SITES.values() if site.writable]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokens():
    return checkpoints.some_tokens(checkpoints.V2, LENGTH, seed=7)


class Change(Probe):
    """Makes something else of what passes one site, in one layer or outside them."""

    def __init__(self, site, layer, function, opening=()):
        self.site, self.layer, self.function, self.opening, self.here = site, layer, function, opening, None

    def at(self, layer):
        inner = Change(self.site, self.layer, self.function, self.opening)
        inner.here = layer
        return inner

    def opens(self, op):
        return op in self.opening

    def __call__(self, site, x):
        return self.function(x) if (site, self.here) == (self.site, self.layer) else x


def operation(site):
    """What must be opened to change a site."""
    route = ("route",) if site in ("moe.router_probs", "moe.groups") else ()
    return route + tuple(op for op, sites in INSIDE.items() if site in sites)


def altered(x):
    """Something else of the same shape, by the same rule in every type: the last dimension turned, then scaled."""
    return x.roll(1, -1) * 1.25


def altered_groups(x):
    return x.roll(1, -1)


@pytest.mark.parametrize("name", ["v2", "lite"])
@pytest.mark.parametrize("site", WRITABLE)
def test_a_change_at_a_writable_site_changes_the_answer_as_it_should(site, name, checkpoint, model, tokens):
    bench = model(name)
    layers = layers_with(site, bench.config)
    if not layers:
        pytest.skip(f"{name} has no {site}")
    layer, function = layers[-1], altered_groups if site == "moe.groups" else altered

    def change(inside, name_of_site, at, x):
        return function(x) if (name_of_site, at) == (site, layer) else x

    expected = Inside(checkpoint(name).config, checkpoint(name).tensors, tokens, change).logits
    got = bench(torch.tensor([tokens]), probe=Change(site, layer, function, operation(site)))[0]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    if site != "moe.groups" or name == "v2":  # the one group there is cannot be turned
        assert (got - bench(torch.tensor([tokens]))[0]).abs().max() > 1e-2


@pytest.mark.parametrize("site", ["moe.experts", "moe.scores", "moe.router_probs"])
def test_a_change_where_there_is_only_reading_is_refused(site, model, tokens):
    bench = model("v2")
    store = LatentCache(bench.config, format="fp32")
    with pytest.raises(RequestError, match=f"changed {site}, which is only read here"):
        bench(torch.tensor([tokens]), store, Change(site, 1, lambda x: x.clone()))
    assert store.lengths == [0]
    assert torch.isfinite(bench(torch.tensor([tokens]), store)).all()


@pytest.mark.parametrize("site", ["moe.experts", "moe.scores"])
def test_it_is_refused_in_the_opened_router_too(site, model, tokens):
    with pytest.raises(RequestError, match="only read here. Edit another site"):
        model("v2")(torch.tensor([tokens]), probe=Change(site, 1, lambda x: x + 0, ("route",)))


def test_the_refusal_says_what_to_open():
    with pytest.raises(RequestError, match=r'opens\("route"\) return True'):
        read(Change("moe.router_probs", None, torch.clone), "moe.router_probs", torch.ones(1, 1, 4))


def test_of_two_probes_the_second_sees_what_the_first_made(model, tokens):
    double, add = Change("resid.mid", 1, lambda x: x * 2), Change("resid.mid", 1, lambda x: x + 1)
    for first, second, expected in ((double, add, lambda x: x * 2 + 1), (add, double, lambda x: (x + 1) * 2)):
        before, after = Recorder("resid.mid", layers=[1]), Recorder("resid.mid", layers=[1])
        model("v2")(torch.tensor([tokens]), probe=both(before, first, second, after))
        assert torch.equal(after["resid.mid", 1], expected(before["resid.mid", 1]))


def test_a_recorder_after_an_edit_shows_the_edited_router(model, tokens):
    bench = model("v2")
    before, after = Recorder("moe.router_probs", layers=[1]), Recorder("moe.router_probs", "moe.experts", layers=[1])
    bench(torch.tensor([tokens]), probe=both(before, Editing([Ablate(1, 3)], bench.config), after))
    assert not after["moe.router_probs", 1][..., 3].any() and not (after["moe.experts", 1] == 3).any()


def test_nothing_and_nothing_is_nothing():
    recorder = Recorder("logits")
    assert both() is both(OFF, OFF) is OFF and both(OFF, recorder) is recorder
    assert both(OFF, Probe()).static is False and OFF.static


def test_one_choice_passes_through_all_probes(model, tokens):
    """`select` is chained like the sites."""

    class Pick(Probe):
        def __init__(self, slot, expert):
            self.slot, self.expert = slot, expert

        def opens(self, op):
            return op == "route"

        def select(self, ids, allowed):
            ids = ids.clone()
            ids[..., self.slot] = self.expert
            return ids

    recorder = Recorder("moe.experts", layers=[1])
    model("lite")(torch.tensor([tokens]), probe=both(Pick(5, 0), Pick(4, 1), recorder))
    assert (recorder["moe.experts", 1][..., 4:] == torch.tensor([1, 0])).all()


class Strip(ast.NodeTransformer):
    """The source of a model in which nobody ever thought of probes."""

    def __init__(self):
        self.sites = 0

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("probe", "see"):
            self.sites += 1
            return node.args[1]
        if ast.unparse(node.func) == "probe.routed":
            assert all(isinstance(each, ast.Name) for each in node.args), "computed only to be shown"
            self.sites += len(node.args)
            return node.args[1]
        return node

    def visit_Expr(self, node):
        if ast.unparse(node.value).startswith("probe.end("):
            return None
        return self.generic_visit(node)

    def visit_Assign(self, node):
        return None if ast.unparse(node.targets[0]) in ("probe", "see") else self.generic_visit(node)

    def visit_If(self, node):
        if ast.unparse(node.test).startswith("probe.opens("):
            return [self.visit(one) for one in node.orelse]
        return self.generic_visit(node)


class Launches(TorchDispatchMode):
    """Every operation, in order, with the shapes and types of its tensors."""

    def __init__(self):
        super().__init__()
        self.list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shapes = [(tuple(x.shape), x.dtype) for x in args if isinstance(x, torch.Tensor)]
        self.list.append((str(function), shapes))
        return result


def stripped():
    """The classes of workbench/model.py without probes."""
    strip = Strip()
    bare = ast.fix_missing_locations(strip.visit(ast.parse(inspect.getsource(model_module))))
    calls = [node for node in ast.walk(bare) if isinstance(node, ast.Call)]
    left = [node for node in calls if ast.unparse(node.func).startswith(("probe", "see"))]
    assert not left, [ast.unparse(node) for node in left]
    assert strip.sites == len(SITES) - sum(map(len, INSIDE.values()))
    names = {"__name__": model_module.__name__}
    exec(compile(bare, "model without probes", "exec"), names)
    return names


def steps(bench, tokens):
    """Launches and logits of a prompt, a token after it, and a batch without a cache."""
    store, results = LatentCache(bench.config, format="fp32"), []
    for given, cache in (([tokens[:-1]], store), ([tokens[-1:]], store), ([tokens, tokens[::-1]], None)):
        with Launches() as launches:
            logits = bench(torch.tensor(given), cache)
        results.append((launches.list, logits))
    return results


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["v2", "lite", "moe_every_other_layer"])
@pytest.mark.usefixtures("by_operation")
def test_without_a_probe_the_operations_are_those_of_code_without_probes(name, training, model, tokens, monkeypatch):
    bench, names = model(name), stripped()
    with torch.set_grad_enabled(training):
        probed = steps(bench, tokens)
        for kind in (model_module.Attention, model_module.Mixture, model_module.Block, model_module.Model):
            for method, function in vars(names[kind.__name__]).items():
                if inspect.isfunction(function) and method != "__init__":
                    monkeypatch.setattr(kind, method, function)
        bare = steps(bench, tokens)
    for (with_probes, logits), (without, same) in zip(probed, bare, strict=True):
        assert len(without) > 50 and with_probes == without
        assert torch.equal(logits, same)
