"""Edits of the routing do what they say: what plain loops over tokens do, and what a model made that way would do."""

import random
from dataclasses import replace

import checkpoints
import numpy as np
import pandas as pd
import pytest
import torch
from edited import LENGTH, PROMPT, cases, edited, run, same
from inside import Inside

from workbench.cache import LatentCache
from workbench.editing import Editing
from workbench.edits import Ablate, Add, Bias, Force, ReplayRouting, Scale, TopK, describe
from workbench.errors import RequestError
from workbench.opening import open_model
from workbench.probe import both
from workbench.recorder import Recorder
from workbench.trace import Trace, new_header

pytestmark = pytest.mark.usefixtures("by_operation")

NAMES = ["lite", "v2", "groups_differ", "normed_gates"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case(checkpoint, model):
    return cases(checkpoint, model, seed=11)


EDITS = [
    Ablate(1, 3),
    Ablate(None, (0, 5, 9)),
    Ablate(2, range(8), positions=(3, 6)),
    Bias(1, 4, 2.5),
    Bias(None, 7, -3, phase="decode"),
    TopK(1, 1),
    TopK(None, 2),
    TopK(None, 8),
    TopK(2, 10, positions=(2, 5)),
    TopK(1, 3, phase="prefill"),
    Force(1, 15),
    Force(None, (2, 13, 15)),
    Force(2, (0, 1), gate=0.7),
    Force(1, 5, gate=-2, phase="decode", positions=(2, 9)),
]


@pytest.mark.parametrize("edit", EDITS, ids=describe)
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_does_what_it_says(name, edit, case):
    config, tensors, bench, tokens, plain = case(name)
    got = run(bench, tokens, [edit])
    assert same(got, edited(config, tensors, tokens, [edit], PROMPT).logits)
    assert not same(got, plain, 1e-3)


def test_an_ablated_expert_is_one_whose_gate_row_gives_minus_infinity(case):
    config, tensors, bench, tokens, _ = case("v2")
    recorder = Recorder("moe.experts", "moe.router_probs")
    bench(torch.tensor([tokens]), probe=recorder)
    top = int(recorder["moe.experts", 1][0, -1, 0])

    def never(inside, site, layer, x):
        if (site, layer) == ("moe.router_logits", 1):
            x = x.clone()
            x[:, top] = float("-inf")
        return x

    after = Recorder("moe.experts", "moe.router_probs", "moe.gates")
    got = bench(torch.tensor([tokens]), probe=both(Editing([Ablate(1, top)], bench.config), after))[0]
    assert same(got, Inside(config, tensors, tokens, never).logits)
    assert not (after["moe.experts", 1] == top).any() and not after["moe.router_probs", 1][..., top].any()
    assert (after["moe.gates", 1] > 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("name", NAMES)
def test_k_experts_are_those_of_a_model_with_that_k(name, k, case, tmp_path):
    config, tensors, bench, tokens, plain = case(name)
    path = checkpoints.write(tmp_path, config | {"num_experts_per_tok": k}, tensors)
    other = open_model(path, dtype=torch.float32)
    assert other.config == replace(bench.config, num_experts_per_tok=k, dtype=other.config.dtype)
    got = run(bench, tokens, [TopK(None, k)])
    assert same(got, other(torch.tensor([tokens]))[0], 1e-5)
    assert not same(got, plain, 1e-3)


def test_the_usual_k_changes_nothing(case):
    _, _, bench, tokens, plain = case("v2")
    assert same(run(bench, tokens, [TopK(None, 6)]), plain, 1e-6)


@pytest.mark.parametrize("name", ["v2", "groups_differ"])
def test_an_expert_can_be_forced_out_of_a_dropped_group(name, case):
    config, tensors, bench, tokens, _ = case(name)
    before = Recorder("moe.groups", "moe.router_probs", layers=[1])
    bench(torch.tensor([tokens]), probe=before)
    dropped = int(before["moe.groups", 1][0, -1].argmin())
    expert = dropped * bench.config.n_routed_experts // bench.config.n_group
    after = Recorder("moe.experts", "moe.gates", "moe.groups", layers=[1])
    got = bench(torch.tensor([tokens]), probe=both(Editing([Force(1, expert)], bench.config), after))[0]
    assert after["moe.experts", 1][0, -1, 0] == expert and not after["moe.groups", 1][0, -1, dropped]
    own = before["moe.router_probs", 1][0, -1, expert]
    assert after["moe.gates", 1][0, -1, 0] == own * bench.config.routed_scaling_factor
    assert same(got, edited(config, tensors, tokens, [Force(1, expert)]).logits)


def test_editing_router_logits_chooses_again(case):
    config, tensors, bench, tokens, plain = case("v2")
    for edit in (Add("moe.router_logits", 60.0, layer=1, index=9), Bias(1, 9, 60.0), Scale("moe.router_logits", -1)):
        after = Recorder("moe.experts", layers=[1])
        got = bench(torch.tensor([tokens]), probe=both(Editing([edit], bench.config), after))[0]
        assert same(got, edited(config, tensors, tokens, [edit]).logits) and not same(got, plain, 1e-2)
        if not isinstance(edit, Scale):
            assert (after["moe.experts", 1][..., 0] == 9).all()


def trace_of(bench, tokens, edits=()):
    """A Trace of one pass, in full precision."""
    recorder = Recorder("moe.experts", "moe.gates", "moe.scores")
    bench(torch.tensor([tokens]), probe=both(Editing(edits, bench.config), recorder))
    layers = recorder.layers_of("moe.gates")
    margins = {n: recorder["moe.scores", n][0, :, :-1] - recorder["moe.scores", n][0, :, -1:] for n in layers}
    slots = max(margin.shape[-1] for margin in margins.values())

    def stacked(values, unused):
        parts = [torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=unused) for x in values]
        return torch.stack(parts, 1)

    ids = stacked([recorder["moe.experts", n][0] for n in layers], -1)
    gates = stacked([recorder["moe.gates", n][0] for n in layers], 0.0)
    margins = stacked(margins.values(), float("nan")).masked_fill(ids < 0, float("nan"))
    unknown = {name: np.full(len(tokens), np.nan) for name in ("logprob", "probability", "entropy", "ms")}
    columns = {"sequence": 0, "position": range(len(tokens)), "id": tokens, "text": "", "phase": "prefill"}
    table = pd.DataFrame(columns | unknown | {"cache_bytes": -1})
    return Trace(new_header("", "", bench.config.to_dict()), table, layers, ids.numpy(), gates.numpy(), margins.numpy())


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_replaying_its_own_routing_changes_nothing(name, gates, case):
    _, _, bench, tokens, plain = case(name)
    got = run(bench, tokens, [ReplayRouting(trace_of(bench, tokens), gates)])
    assert (got - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize(
    "edits", [[TopK(None, 2)], [TopK(1, 9)], [TopK(2, 1, positions=(3, 8))], [Force(1, (0, 31), 0.5), Ablate(2, 3)]]
)
def test_replaying_edited_routing_goes_where_that_went(edits, gates, case):
    config, tensors, bench, tokens, plain = case("v2")
    replay = [ReplayRouting(trace_of(bench, tokens, edits), gates)]
    got = run(bench, tokens, replay)
    assert same(got, edited(config, tensors, tokens, replay).logits) and not same(got, plain, 1e-3)
    if gates or not isinstance(edits[0], Force):  # without gates, the probabilities of now weigh them
        assert same(got, run(bench, tokens, edits), 1e-5)


def test_replaying_the_routing_of_another_text_changes_the_answer(case):
    config, tensors, bench, tokens, plain = case("v2")
    other = trace_of(bench, checkpoints.some_tokens(config, 9, seed=12))
    for replay in (
        ReplayRouting(other),
        ReplayRouting(other, gates=True),
        ReplayRouting(other, positions=(4, 6)),
        ReplayRouting(other, phase="decode"),
    ):
        recorder = Recorder("moe.experts", layers=[2])
        got = bench(torch.tensor([tokens]), probe=both(Editing([replay], bench.config, PROMPT), recorder))[0]
        assert same(got, edited(config, tensors, tokens, [replay], PROMPT).logits) and not same(got, plain, 1e-2)
        if replay.positions is None and replay.phase is None:
            assert np.array_equal(recorder["moe.experts", 2][0, :9], other.experts[:, 1])  # beyond it, as usual


def combinations(config, count):
    """Edits at random, several at a time, such as fit the model."""
    dice = random.Random(5)
    experts = config.n_routed_experts

    def where():
        options = {}
        if dice.random() < 0.4:
            start = dice.randrange(LENGTH)
            options["positions"] = (start, start + 1 + dice.randrange(6))
        if dice.random() < 0.3:
            options["phase"] = dice.choice(["prefill", "decode"])
        return options

    def one():
        layer, some = dice.choice([None, 1, 2]), dice.sample(range(experts), 2)
        return dice.choice(
            [
                lambda: Ablate(layer, some, **where()),
                lambda: Force(layer, some[:1], **where()),
                lambda: Force(layer, some, dice.choice([None, 0.3]), **where()),
                lambda: Bias(layer, some[0], dice.uniform(-4, 4), **where()),
                lambda: TopK(layer, dice.randint(2, 8), **where()),
                lambda: Scale("moe.gates", dice.uniform(-1, 2), layer, dice.choice([None, 0, 3]), **where()),
                lambda: Add("moe.gates", dice.uniform(-1, 2), layer, **where()),
                lambda: Scale("moe.router_logits", dice.uniform(-1, 1), layer, **where()),
                lambda: Add("resid.mid", dice.uniform(-1, 1), layer, **where()),
                lambda: Scale("attn.v", dice.uniform(-1, 1), layer, **where()),
            ]
        )()

    while count:
        edits = [one() for _ in range(dice.randint(2, 5))]
        try:
            Editing(edits, config, PROMPT)
        except RequestError:
            continue
        count -= 1
        yield edits


@pytest.mark.parametrize("name", ["v2", "normed_gates"])
def test_any_edits_together_act_in_the_documented_order(name, case):
    config, tensors, bench, tokens, _ = case(name)
    for edits in combinations(bench.config, 25):
        expected = edited(config, tensors, tokens, edits, PROMPT).logits
        assert same(run(bench, tokens, edits), expected, 1e-3), edits


@pytest.mark.parametrize("name", ["v2", "lite"])
def test_the_order_in_which_different_edits_are_listed_does_not_matter(name, case):
    _, _, bench, tokens, _ = case(name)
    replay = ReplayRouting(trace_of(bench, tokens[::-1]), gates=True)
    edits = [Ablate(1, 3), Bias(1, 5, 2), replay, TopK(1, 5), Force(1, 7, 0.4), Scale("moe.gates", 0.5, 1)]
    assert torch.equal(run(bench, tokens, edits), run(bench, tokens, edits[::-1]))


def test_of_several_of_a_kind_the_last_listed_counts(case):
    _, _, bench, tokens, _ = case("v2")
    others = [ReplayRouting(trace_of(bench, tokens[::-1])), ReplayRouting(trace_of(bench, tokens[3:]))]
    for first, last in ([TopK(1, 2), TopK(None, 4)], others, [Force(1, 3, 0.1), Force(1, 3, 0.9)]):
        alone = Recorder("moe.experts", "moe.gates", layers=[1])
        after = Recorder("moe.experts", "moe.gates", layers=[1])
        bench(torch.tensor([tokens[:9]]), probe=both(Editing([last], bench.config), alone))
        bench(torch.tensor([tokens[:9]]), probe=both(Editing([first, last], bench.config), after))
        assert torch.equal(after["moe.experts", 1], alone["moe.experts", 1])
        assert torch.equal(after["moe.gates", 1], alone["moe.gates", 1])


def test_a_slot_that_is_not_used_takes_no_part_whatever_is_done_to_gates(case):
    _, _, bench, tokens, _ = case("v2")
    few = TopK(1, 2, positions=(3, 8))
    filled = run(bench, tokens, [few, *(Add("moe.gates", 9.0, 1, slot, positions=(3, 8)) for slot in range(2, 6))])
    assert same(filled, run(bench, tokens, [few]), 1e-6)


def test_an_editing_is_of_one_model(case, model):
    _, _, bench, tokens, _ = case("v2")
    with pytest.raises(RequestError, match="made for another model"):
        bench(torch.tensor([tokens]), probe=Editing([Ablate(1, 3)], model("lite").config))


def test_live_edits_change_in_place(case):
    _, _, bench, tokens, plain = case("v2")
    live = Editing([Ablate(1, 3)], bench.config, live=True)
    probe = {key: buffer.data_ptr() for key, buffer in live.bias.items()}

    def answer():
        return bench(torch.tensor([tokens]), probe=live)[0]

    assert torch.equal(answer(), run(bench, tokens, [Ablate(1, 3)]))
    live.update([Bias(None, 5, 3.0), Ablate(2, (1, 2)), Bias(2, 1, 5.0)])
    together = [Ablate(1, 3), Bias(None, 5, 3.0), Ablate(2, (1, 2))]
    assert same(answer(), run(bench, tokens, together), 1e-6)
    live.update([])
    assert torch.equal(answer(), run(bench, tokens, [Ablate(1, 3)]))
    assert {key: buffer.data_ptr() for key, buffer in live.bias.items()} == probe
    assert live.static
    for wrong in ([TopK(1, 2)], [Ablate(1, 5, positions=(1, 2))], [Bias(1, 5, 1, phase="decode")]):
        with pytest.raises(RequestError, match="only Ablate and Bias without positions or phase"):
            live.update(wrong)
    with pytest.raises(RequestError, match="as few as 0 experts"):
        live.update([Ablate(1, [expert for expert in range(32) if expert != 3])])
    with pytest.raises(RequestError, match="live=True"):
        Editing([], bench.config).update([])
    assert torch.equal(answer(), run(bench, tokens, [Ablate(1, 3)]))
    nothing = Editing([], bench.config, live=True)
    assert torch.equal(bench(torch.tensor([tokens]), probe=nothing)[0], plain)


def test_the_buffers_of_an_editing_are_made_once(case):
    """A captured pass must read the same tensors each time, so nothing may come from the host in between."""
    _, _, bench, tokens, _ = case("v2")
    edits = [Ablate(1, 3), Bias(2, 4, 1), TopK(1, 5), Force(2, (1, 2), 0.5), Add("resid.mid", 0.1), Scale("mlp.out", 2)]
    editing = Editing(edits, bench.config)

    def held():
        return [t.data_ptr() for t in (*editing.bias.values(), *editing.limit.values(), *editing.values.values())]

    before = held()
    store = LatentCache(bench.config, format="fp32")
    for one in torch.tensor([tokens]).split(4, 1):
        bench(one, store, editing)
    assert held() == before and len(before) == 5 and editing.static
    for edit in (Ablate(1, 3, positions=(0, 5)), TopK(1, 2, phase="decode"), ReplayRouting(trace_of(bench, tokens))):
        assert not Editing([edit], bench.config, PROMPT).static
