"""Scale and Add at every site, and all edits in every form a text can be read in: at once, in parts, in a batch."""

import pytest
import torch
from edited import LENGTH, PROMPT, cases, edited, run, same

from workbench.cache import LatentCache
from workbench.editcheck import indexed
from workbench.editing import Editing
from workbench.edits import Ablate, Add, Bias, Force, ReplayRouting, Scale, TopK, describe
from workbench.probe import INSIDE, SITES, both, layers_with, sizes
from workbench.recorder import Recorder
from workbench.trace import Trace

pytestmark = pytest.mark.usefixtures("by_operation")

WRITABLE = [site.name for site in SITES.values() if site.writable]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case(checkpoint, model):
    return cases(checkpoint, model, seed=21)


def vector(site, config):
    width = sizes(config, 1, 1, 1)[SITES[site].dims.split()[-1]]
    return torch.randn(width, generator=torch.Generator().manual_seed(3)).tolist()


def edits_at(site, config):
    """Scale and Add, of everything, of one entry, of some positions, of one phase."""
    layer = layers_with(site, config)[-1]
    dims = SITES[site].dims.split()
    last = sizes(config, 1, 1, 1)[dims[indexed(site)]] - 1
    scalar = indexed(site) == len(dims) - 1
    yield Scale(site, 0.5, layer)
    yield Scale(site, -2, layer, index=last, positions=(3, 8))
    yield Add(site, vector(site, config), layer, phase="decode")
    yield Add(site, 0.7 if scalar else vector(site, config), layer, index=last)


@pytest.mark.parametrize("name", ["v2", "lite"])
@pytest.mark.parametrize("site", WRITABLE)
def test_scale_and_add_at_every_writable_site(site, name, case):
    config, tensors, bench, tokens, plain = case(name)
    if not layers_with(site, bench.config):
        pytest.skip(f"{name} has no {site}")
    visible = []
    for edit in edits_at(site, bench.config):
        got = run(bench, tokens, [edit])
        assert same(got, edited(config, tensors, tokens, [edit], PROMPT).logits), describe(edit)
        visible.append(not same(got, plain, 1e-3))
    assert any(visible) or name == "lite" and site == "moe.groups"  # there is one group


def test_an_edit_without_a_layer_acts_in_every_layer(case):
    config, tensors, bench, tokens, _ = case("v2")
    for site in ("attn.out", "moe.routed_out", "attn.pattern"):
        layers = layers_with(site, bench.config)
        one = run(bench, tokens, [Scale(site, 0.5)])
        assert same(one, run(bench, tokens, [Scale(site, 0.5, layer) for layer in layers]), 1e-6)
        assert same(one, edited(config, tensors, tokens, [Scale(site, 0.5)]).logits)


def test_a_head_by_index_is_that_head_alone(case):
    _, _, bench, tokens, _ = case("v2")
    before, after = Recorder("attn.z", layers=[1]), Recorder("attn.z", layers=[1])
    edit = Scale("attn.z", 0, layer=1, index=2, positions=(4, 6))
    bench(torch.tensor([tokens]), probe=both(before, Editing([edit], bench.config), after))
    expected = before["attn.z", 1].clone()
    expected[:, 4:6, 2] = 0
    assert torch.equal(after["attn.z", 1], expected)


def test_several_at_one_site_act_in_the_order_listed(case):
    config, tensors, bench, tokens, _ = case("v2")
    for edits in (
        [Scale("resid.mid", 2, 1), Add("resid.mid", 1, 1)],
        [Add("resid.mid", 1, 1), Scale("resid.mid", 2, 1)],
    ):
        assert same(run(bench, tokens, edits), edited(config, tensors, tokens, edits).logits)


FORMS = [
    Ablate(1, range(5)),
    Ablate(2, 3, positions=(3, 8)),
    Bias(None, 4, 3, phase="decode"),
    TopK(None, 2),
    TopK(1, 9, positions=(5, 6)),
    TopK(2, 1, phase="prefill"),
    Force(1, (0, 15), gate=0.5, positions=(2, 9), phase="decode"),
    Scale("moe.gates", 0, 1, index=0),
    Scale("attn.kv_latent", 0.2, 1, positions=(2, 5)),
    Scale("attn.k_content", 0, 1, positions=(2, 5)),
    Add("attn.v", 1, phase="decode"),
    Scale("attn.v", 0, 2, index=1, phase="prefill"),
    Scale("attn.pattern", 0.5, 2, index=1, positions=(6, 10)),
    Add("attn.scores", 2, 1, phase="decode"),
    Scale("moe.expert_out", 0, 2, index=1, positions=(0, 4)),
    Scale("moe.groups", 0, 1, index=0),
    Add("resid.mid", 0.5, 1, positions=(6, 7)),
    Scale("logits", 2, positions=(1, 4)),
]


def trace(bench, tokens):
    """As much of a Trace as is replayed."""
    recorder = Recorder("moe.experts", "moe.gates")
    bench(torch.tensor([tokens]), probe=recorder)
    layers = recorder.layers_of("moe.gates")
    ids, gates = (torch.stack([recorder[site, n][0] for n in layers], 1).numpy() for site in recorder.sites)
    recorded = Trace.__new__(Trace)
    recorded.layers, recorded.experts, recorded.gates = tuple(layers), ids, gates
    recorded.tokens, recorded.sequence = {"position": range(len(tokens))}, lambda number: recorded
    return recorded


@pytest.fixture(params=[*FORMS, "replay", "all together"], ids=lambda e: e if isinstance(e, str) else describe(e))
def edits(request, case):
    if request.param == "replay":
        _, _, bench, tokens, _ = case("v2")
        return [ReplayRouting(trace(bench, tokens[8::-1]), gates=True)]
    return FORMS[:9] if request.param == "all together" else [request.param]


@pytest.mark.parametrize("chunks", [[4, 3, 5], [1] * LENGTH], ids=["in chunks", "one by one"])
def test_in_parts_as_at_once(edits, chunks, case):
    _, _, bench, tokens, _ = case("v2")
    editing, store = Editing(edits, bench.config, PROMPT), LatentCache(bench.config, format="fp32")
    parts = [bench(chunk, store, editing) for chunk in torch.tensor([tokens]).split(chunks, 1)]
    assert same(torch.cat(parts, 1)[0], run(bench, tokens, edits))
    assert not editing.silent()


@pytest.mark.parametrize("new", [1, 3])
def test_in_a_ragged_batch_as_alone(edits, new, case):
    _, _, bench, tokens, _ = case("v2")
    lengths, prompts = [2, 7, 4], [3, 4, 9]
    store = LatentCache(bench.config, batch=3, format="fp32")
    editing = Editing(edits, bench.config, [])
    texts = [tokens[row : row + length + new] for row, length in enumerate(lengths)]
    for row, length in enumerate(lengths):
        bench(torch.tensor([texts[row][:length]]), store.only(row), editing.on([prompts[row]]))
    together = bench(torch.tensor([text[-new:] for text in texts]), store, editing.on(prompts))
    for row, length in enumerate(lengths):
        assert same(together[row], run(bench, texts[row], edits, prompts[row])[length:]), row


def test_only_the_last_logits_as_all_of_them(edits, case):
    _, _, bench, tokens, _ = case("v2")
    for length in (4, 7, LENGTH):
        editing = Editing(edits, bench.config, PROMPT)
        last = bench(torch.tensor([tokens[:length]]), probe=editing, logits="last")[0]
        assert same(last, run(bench, tokens[:length], edits)[-1:], 1e-5)


@pytest.mark.parametrize(
    "place", [{"positions": (6, 8)}, {"phase": "decode"}, {"phase": "decode", "positions": (0, 9)}], ids=str
)
@pytest.mark.parametrize("name", ["v2", "normed_gates"])
def test_tokens_before_are_untouched_bit_for_bit(name, place, case):
    _, _, bench, tokens, _ = case(name)
    first = 6 if "phase" not in place else PROMPT
    kinds = [Ablate(1, range(8), **place), TopK(2, 1, **place), Force(1, 7, **place), Add("resid.pre", 1, 1, **place)]
    kinds += [Scale("attn.v", 0, **place), Scale("attn.pattern", 0, **place)]

    def read(probe):
        store = LatentCache(bench.config, format="fp32")
        parts = torch.tensor([tokens]).split([first - 2, 1, 1, 1, LENGTH - first - 1], 1)
        return torch.cat([bench(part, store, probe) for part in parts], 1)[0]

    plain = read(Recorder("embed"))
    for edit in kinds:
        got = read(Editing([edit], bench.config, PROMPT))
        assert torch.equal(got[:first], plain[:first]), describe(edit)
        assert not same(got[first:], plain[first:], 1e-3), describe(edit)
        at_once = run(bench, tokens, [edit])
        assert same(at_once[:first], plain[:first], 1e-5) and same(at_once, got), describe(edit)


def test_tokens_after_the_last_edited_one_see_it_only_through_attention(case):
    """An edit of the last block's output at one position stays there."""
    _, _, bench, tokens, plain = case("v2")
    got = run(bench, tokens, [Add("resid.post", vector("resid.post", bench.config), 2, positions=(6, 7))])
    touched = (got - plain).abs().amax(-1) > 1e-3
    assert touched.tolist() == [position == 6 for position in range(LENGTH)]


def test_what_no_token_met_is_known(case):
    _, _, bench, tokens, _ = case("v2")
    never = [Ablate(1, 3, positions=(50, 60)), Scale("attn.v", 0, phase="decode"), TopK(1, 2, positions=(8, 9))]
    editing = Editing([*never, Bias(1, 3, 1)], bench.config, prompts=LENGTH)
    assert editing.silent() == list(editing.edits)
    bench(torch.tensor([tokens[:4]]), probe=editing)
    assert editing.silent() == never
    bench(torch.tensor([tokens]), probe=editing)
    assert editing.silent() == never[:2]


def test_a_pass_that_failed_met_nothing(case):
    _, _, bench, tokens, _ = case("v2")
    editing = Editing([Ablate(1, 3)], bench.config)
    with pytest.raises(ValueError, match="in the middle"):
        bench(torch.tensor([tokens]), probe=both(editing, _Fails(0)))
    assert editing.silent() == [Ablate(1, 3)]


class _Fails(Recorder):
    def __init__(self, layer):
        super().__init__("embed")

    def begin(self, config, positions, dtype):
        return self

    def __call__(self, site, x):
        raise ValueError("in the middle")


def test_every_site_inside_an_operation_was_edited():
    """The forms above cover each operation that an edit opens."""
    covered = {edit.site for edit in FORMS if isinstance(edit, Scale | Add)}
    assert all(covered & set(sites) for sites in INSIDE.values())
