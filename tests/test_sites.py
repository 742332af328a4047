"""Every site fires where the table says, with its dimensions and type, and shows what the paper's formulas give."""

from functools import cache

import checkpoints
import pytest
import torch
from inside import Inside, opened

import workbench as wb
from workbench.cache import LatentCache
from workbench.errors import RequestError
from workbench.opening import open_model
from workbench.probe import INSIDE, SITES, Probe, layers_with, sizes
from workbench.recorder import Recorder
from workbench.workbench import POCKET

NAMES = ["pocket", "lite", "v2", "no_shared_experts", "normed_gates", "moe_every_other_layer"]
HIDDEN = {site for sites in INSIDE.values() for site in sites}  # only where an operation is opened
PROMPT, TOKENS = 9, 13


class Witness(Probe):
    """Notes the shape and type of everything that passes, with all operations opened or none."""

    def __init__(self, openly):
        self.openly, self.layer, self.seen = openly, None, {}

    def at(self, layer):
        inner = Witness(self.openly)
        inner.layer, inner.seen = layer, self.seen
        return inner

    def opens(self, op):
        return self.openly

    def __call__(self, site, x):
        assert (site, self.layer) not in self.seen, f"{site} fires twice"
        self.seen[site, self.layer] = tuple(x.shape), x.dtype
        return x


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case(checkpoint, model):
    """case(name) -> config, tensors, model, tokens."""

    @cache
    def make(name):
        if name == "pocket":
            config, tensors = opened(POCKET)
            bench = wb.load(dtype="fp32", device="cpu").model
        else:
            config, tensors, bench = checkpoint(name).config, checkpoint(name).tensors, model(name)
        return config, tensors, bench, checkpoints.some_tokens(config, TOKENS, seed=4)

    return make


@pytest.fixture(scope="module")
def seen(case):
    """seen(name) -> everything that passed in one pass without a cache, and what it should have been."""

    @cache
    def look(name):
        config, tensors, bench, tokens = case(name)
        recorder = Recorder(*(site for site in SITES if layers_with(site, bench.config)))
        with torch.no_grad():
            bench(torch.tensor([tokens]), probe=recorder)
        return recorder, Inside(config, tensors, tokens)

    return look


def ragged(bench, tokens):
    """A cache of three sequences of different lengths, and the lengths."""
    store = LatentCache(bench.config, batch=3, format="fp32")
    for row, length in enumerate((5, 1, 8)):
        bench(torch.tensor([tokens[row : row + length]]), store.only(row))
    return store


def passes(bench, tokens):
    """name -> (tokens [B, T], cache, length of the longest sequence after the pass)."""
    prompt, last = torch.tensor([tokens[:PROMPT]]), torch.tensor([tokens[PROMPT : PROMPT + 1]])
    read = LatentCache(bench.config, format="fp32")
    bench(prompt, read)
    return {
        "no cache": (prompt, None, PROMPT),
        "no cache, three rows": (torch.tensor(tokens[:12]).view(3, 4), None, 4),
        "prefill": (prompt, LatentCache(bench.config, format="fp32"), PROMPT),
        "decode": (last, read, PROMPT + 1),
        "ragged decode": (torch.tensor(tokens[:3]).view(3, 1), ragged(bench, tokens), 9),
        "ragged chunk": (torch.tensor(tokens[:6]).view(3, 2), ragged(bench, tokens), 10),
    }


def check_all(bench, tokens, openly):
    config = bench.config
    for name, (given, store, length) in passes(bench, tokens).items():
        witness = Witness(openly)
        bench(given, store, witness)
        size = sizes(config, *given.shape, length)
        expected = {
            (site.name, layer): (tuple(size[d] for d in site.dims.split()), site.dtype or bench.dtype)
            for site in SITES.values()
            for layer in layers_with(site.name, config)
            if openly or site.name not in HIDDEN
        }
        assert witness.seen == expected, name


@pytest.mark.parametrize("openly", [True, False], ids=["opened", "closed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_site_fires_once_with_its_dims_and_type(name, openly, case):
    _, _, bench, tokens = case(name)
    check_all(bench, tokens, openly)


def test_types_in_a_bf16_model(checkpoint):
    bench = open_model(checkpoint("v2").path, dtype=torch.bfloat16)
    check_all(bench, checkpoints.some_tokens(checkpoints.V2, TOKENS), openly=True)


def test_where_sites_are(case):
    assert layers_with("attn.q_latent", case("lite")[2].config) == []
    assert layers_with("attn.q_latent", case("v2")[2].config) == [0, 1, 2]
    assert layers_with("moe.shared_out", case("no_shared_experts")[2].config) == []
    assert layers_with("moe.gates", case("moe_every_other_layer")[2].config) == [2, 4]
    assert layers_with("logits", case("lite")[2].config) == [None]


@pytest.mark.parametrize(
    "name, site, layers",
    [
        ("lite", "attn.q_latent", None),
        ("no_shared_experts", "moe.shared_out", None),
        ("v2", "moe.gates", [0]),
        ("v2", "resid.post", [1, 3]),
    ],
)
def test_a_site_that_is_not_there_is_refused_before_any_work(name, site, layers, case):
    _, _, bench, tokens = case(name)
    store = LatentCache(bench.config, format="fp32")
    with pytest.raises(RequestError, match=f"{site} never fires|layers go from 0 to 2"):
        bench(torch.tensor([tokens]), store, Recorder(site, layers=layers))
    assert (store.lengths, store.nbytes) == ([0], 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_the_independent_one(name, seen):
    recorder, expected = seen(name)
    fired = {(site, layer) for site in recorder.sites for layer in recorder.layers_of(site)}
    assert fired == set(expected)
    for (site, layer), value in expected.items():
        got = recorder[site, layer][0]
        if site in ("moe.experts", "moe.groups"):
            assert torch.equal(got, value.to(got.dtype)), (site, layer)
        else:
            far = (got - value).abs().max() / value.abs().max()
            assert far <= 1e-4, (site, layer, far)


@pytest.mark.parametrize("name", NAMES)
def test_parts_make_the_whole(name, seen, case):
    recorder, _ = seen(name)
    bench = case(name)[2]
    config = bench.config

    def near(a, b):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())

    for layer in range(config.num_hidden_layers):
        at = {site: recorder[site, layer] for site in SITES if (site, layer) in recorder}
        assert near(at["attn.scores_content"] + at["attn.scores_position"], at["attn.scores"])
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        assert near(at["attn.scores"].masked_fill(future, -torch.inf).softmax(-1), at["attn.pattern"])
        assert near(torch.einsum("bhts,bshv->bthv", at["attn.pattern"], at["attn.v"]), at["attn.z"])
        assert near(at["resid.mid"] - at["resid.pre"], at["attn.out"])
        assert near(at["resid.post"] - at["resid.mid"], at["mlp.out"])
        if config.is_moe(layer):
            assert near(at["moe.router_logits"].softmax(-1), at["moe.router_probs"])
            assert near((at["moe.gates"][..., None] * at["moe.expert_out"]).sum(-2), at["moe.routed_out"])
            shared = at["moe.shared_out"] if config.n_shared_experts else 0
            assert near(at["moe.routed_out"] + shared, at["mlp.out"])
            assert torch.equal(at["moe.router_probs"].gather(-1, at["moe.experts"]), at["moe.scores"][..., :-1])
            of_group = at["moe.experts"] // (config.n_routed_experts // at["moe.groups"].shape[-1])
            assert at["moe.groups"].gather(-1, of_group).all()
            kept = config.topk_group if config.topk_method == "group_limited_greedy" else 1
            assert (at["moe.groups"].sum(-1) == kept).all()
    final = recorder["resid.post", config.num_hidden_layers - 1]
    assert near(bench.unembed(final), recorder["logits", None])
    assert near(recorder["final.norm", None] @ bench.head.T, recorder["logits", None])
    assert torch.equal(recorder["embed", None], recorder["resid.pre", 0])


def keys_seen(site, got, whole):
    """Both, with what a token cannot see left out: keys after it."""
    if "S" not in SITES[site].dims or "T" not in SITES[site].dims:
        return got, whole
    visible = torch.ones(whole.shape[-2:], dtype=torch.bool).tril()
    return got.masked_fill(~visible, 0), whole.masked_fill(~visible, 0)


@pytest.mark.parametrize("name", ["pocket", "lite", "v2"])
@pytest.mark.parametrize("chunks", [[TOKENS], [5, 1, 7], [1] * TOKENS], ids=["at once", "chunks", "one by one"])
def test_the_record_is_the_same_in_however_many_passes(name, chunks, case, seen):
    _, _, bench, tokens = case(name)
    recorder, store = Recorder(*seen(name)[0].sites), LatentCache(bench.config, format="fp32")
    for chunk in torch.tensor([tokens]).split(chunks, 1):
        bench(chunk, store, recorder)
    for site in recorder.sites:
        for layer in recorder.layers_of(site):
            got, whole = keys_seen(site, recorder[site, layer], seen(name)[0][site, layer])
            assert got.shape == whole.shape, site
            assert torch.allclose(got, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item()), (site, layer)


@pytest.mark.parametrize("name", ["pocket", "lite", "v2"])
def test_the_record_of_a_ragged_batch_is_that_of_each_row(name, case):
    _, _, bench, tokens = case(name)
    sites = [site for site in SITES if layers_with(site, bench.config)]
    together, following = Recorder(*sites), torch.tensor(tokens[6:12]).view(3, 2)
    bench(following, ragged(bench, tokens), together)
    for row, length in enumerate((5, 1, 8)):
        alone = Recorder(*sites, positions=range(length, length + 2))
        bench(torch.cat([torch.tensor(tokens[row : row + length]), following[row]])[None], probe=alone)
        for site in sites:
            dims = SITES[site].dims.split()
            for layer in alone.layers_of(site):
                got, whole = together[site, layer][row], alone[site, layer][0]
                if "S" in dims:
                    got = got.narrow(dims.index("S") - 1, 0, length + 2)
                if "T" in dims and "S" in dims:
                    visible = torch.ones(2, length + 2, dtype=torch.bool).tril(length)
                    got, whole = got.masked_fill(~visible, 0), whole.masked_fill(~visible, 0)
                assert torch.allclose(got, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item()), (site, layer, row)


@pytest.mark.parametrize("name", ["pocket", "v2"])
@pytest.mark.usefixtures("by_operation")
def test_looking_changes_nothing_that_is_said(name, case, seen):
    _, _, bench, tokens = case(name)
    plain = bench(torch.tensor([tokens]))
    assert torch.allclose(seen(name)[0]["logits", None], plain, rtol=1e-4, atol=1e-4)
    outer = Recorder(*(site for site in SITES if site not in HIDDEN and layers_with(site, bench.config)))
    assert torch.equal(bench(torch.tensor([tokens]), probe=outer), plain)
