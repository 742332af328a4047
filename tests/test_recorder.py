"""The Recorder keeps what it was asked for, within the limit it was given, and says why where it does not."""

import checkpoints
import pytest
import torch

from workbench.cache import LatentCache
from workbench.editing import Editing
from workbench.edits import Add
from workbench.errors import BudgetError, RequestError
from workbench.probe import Probe, both
from workbench.recorder import Recorder

LENGTH = 12


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([checkpoints.some_tokens(checkpoints.V2, LENGTH, seed=1)])


@pytest.fixture(scope="module")
def bench(model):
    return model("v2")


def new_cache(bench, batch=1):
    return LatentCache(bench.config, batch=batch, format="fp32")


def record(bench, tokens, *sites, cache=None, **options):
    recorder = Recorder(*sites, **options)
    bench(tokens, cache, recorder)
    return recorder


def test_only_the_layers_asked_for(bench, tokens):
    recorder = record(bench, tokens, "resid.post", "moe.gates", "logits", layers=[0, 2])
    assert recorder.layers_of("resid.post") == [0, 2]
    assert recorder.layers_of("moe.gates") == [2]
    assert recorder.layers_of("logits") == [None]
    assert ("resid.post", 2) in recorder and ("resid.post", 1) not in recorder


@pytest.mark.parametrize("positions", [range(3, 7), {3, 4, 5, 6}, [6, 3, 5, 4], range(3, 7, 3)])
def test_only_the_positions_asked_for_in_any_number_of_passes(positions, bench, tokens):
    sites = ("resid.mid", "attn.pattern", "moe.experts", "attn.v")
    whole = record(bench, tokens, *sites)
    wanted = sorted(positions)
    some = Recorder(*sites, positions=positions)
    store = new_cache(bench)
    for chunk in tokens.split([4, 1, 7], 1):
        bench(chunk, store, some)
    assert torch.equal(some["moe.experts", 1], whole["moe.experts", 1][:, wanted])
    assert torch.allclose(some["resid.mid", 2], whole["resid.mid", 2][:, wanted], atol=1e-4)
    assert torch.allclose(some["attn.pattern", 1], whole["attn.pattern", 1][:, :, wanted], atol=1e-5)
    assert torch.allclose(some["attn.v", 1], whole["attn.v", 1], atol=1e-4)  # keys are those of the last pass


def test_keys_that_were_not_there_yet_are_no_numbers(bench, tokens):
    recorder, store = Recorder("attn.scores", "attn.pattern", layers=[1]), new_cache(bench)
    for chunk in tokens.split([5, 7], 1):
        bench(chunk, store, recorder)
    assert recorder["attn.scores", 1][..., :5, 5:].isnan().all()
    assert (
        recorder["attn.scores", 1][..., :5, :5].isfinite().all()
        and recorder["attn.scores", 1][..., 5:, :].isfinite().all()
    )
    assert not recorder["attn.pattern", 1][..., :5, 5:].any()
    assert torch.allclose(recorder["attn.pattern", 1].sum(-1), torch.ones(()))


def test_keys_that_a_shorter_row_does_not_have_are_no_numbers(bench, tokens):
    recorder, store = Recorder("attn.scores", "attn.pattern", "attn.v", layers=[1]), new_cache(bench, batch=2)
    bench(tokens[:, :6], store.only(1))
    bench(tokens[:, :4].view(2, 2), store, recorder)
    scores, pattern, values = (recorder[site, 1] for site in recorder.sites)
    assert scores[0, ..., 2:].isnan().all() and scores[0, ..., :2].isfinite().all() and scores[1].isfinite().all()
    assert values[0, 2:].isnan().all() and values[1].isfinite().all()
    assert torch.allclose(pattern.sum(-1), torch.ones(()))


def test_too_much_is_refused_before_the_pass_and_says_how_to_narrow(bench, tokens):
    store = new_cache(bench)
    bench(tokens[:, :2], store)
    before = store.lengths, store.nbytes, store.rows(0, 0, torch.float32).clone()
    recorder = Recorder("attn.pattern", "logits", limit=1000)
    with pytest.raises(
        BudgetError, match=r"attn.pattern, logits over 10 tokens takes .* limit is 1,000 bytes.*layers= or"
    ):
        bench(tokens[:, 2:], store, recorder)
    assert (store.lengths, store.nbytes) == before[:2] and torch.equal(store.rows(0, 0, torch.float32), before[2])
    assert not recorder.layers_of("logits") and recorder.nbytes == 0


def test_a_refused_pass_takes_no_room_in_the_cache(bench, tokens):
    store = new_cache(bench)
    with pytest.raises(BudgetError):
        bench(tokens, store, Recorder("logits", limit=1))
    assert store.nbytes == 0


def test_the_limit_is_exact_and_counts_what_is_there(bench, tokens):
    sites = ("resid.post", "attn.pattern", "moe.experts", "attn.k_content", "logits")
    needed = record(bench, tokens, *sites).nbytes
    assert record(bench, tokens, *sites, limit=needed).nbytes == needed
    with pytest.raises(BudgetError):
        record(bench, tokens, *sites, limit=needed - 1)
    again = Recorder("logits", limit=2 * LENGTH * bench.config.vocab_size * 4)
    bench(tokens, probe=again)
    bench(tokens, probe=again)
    with pytest.raises(BudgetError, match="on top of"):
        bench(tokens, probe=again)
    again.clear()
    bench(tokens, probe=again)
    assert again["logits", None].shape[1] == LENGTH


def test_one_long_answer_does_not_keep_every_state_of_the_keys(bench, tokens):
    recorder, store = Recorder("attn.v", "attn.k_content", layers=[1]), new_cache(bench)
    for one in tokens.split(1, 1):
        bench(one, store, recorder)
    assert recorder.nbytes == recorder["attn.v", 1].nbytes + recorder["attn.k_content", 1].nbytes
    assert recorder["attn.v", 1].shape[1] == LENGTH


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_record_is_a_window_into_something_larger(mode, bench, tokens):
    with mode():
        recorder = record(bench, tokens, "attn.q_content", "attn.q_rope", "attn.k_rope", "attn.v", "attn.k_content")
    for site in recorder.sites:
        assert recorder[site, 1].untyped_storage().nbytes() == recorder[site, 1].nbytes, site


def test_unknown_sites_and_layers(bench, tokens):
    with pytest.raises(RequestError, match="no site called 'resid.past'; there are embed, resid.pre"):
        Recorder("resid.post", "resid.past")
    with pytest.raises(RequestError, match="no site was named"):
        Recorder()
    with pytest.raises(RequestError, match=r"moe.gates never fires in layers \[0\]; it is in layers 1 to 2"):
        record(bench, tokens, "moe.gates", layers=[0])
    with pytest.raises(RequestError, match="layers go from 0 to 2"):
        record(bench, tokens, "resid.post", layers=[0, 7])


def test_asking_for_what_did_not_pass(bench, tokens):
    recorder = Recorder("resid.post", positions=range(50, 60))
    with pytest.raises(RequestError, match="nothing yet; run a pass"):
        recorder["resid.post", 1]
    bench(tokens, probe=recorder)
    with pytest.raises(RequestError, match="nothing passed resid.post: no token was at these positions"):
        recorder.check()
    recorder = record(bench, tokens, "resid.post", layers=[1])
    with pytest.raises(RequestError, match=r"nothing passed \('resid.post', 2\). Recorded: resid.post in layers \[1\]"):
        recorder["resid.post", 2]
    recorder.check()


def test_rows_at_different_positions_cannot_be_narrowed_together(bench, tokens):
    store = new_cache(bench, batch=2)
    bench(tokens[:, :3], store.only(0))
    with pytest.raises(RequestError, match="record them one by one"):
        bench(tokens[:, :2].view(2, 1), store, Recorder("logits", positions=[3]))
    bench(tokens[:, :2].view(2, 1), store, Recorder("logits", positions=range(100)))


def test_a_pass_that_fails_leaves_nothing(bench, tokens):
    class Fails(Probe):
        def __call__(self, site, x):
            if site == "logits":
                raise OSError("a disk is full")
            return x

    recorder, store = record(bench, tokens[:, :4], "resid.post", "embed"), new_cache(bench)
    bench(tokens[:, :4], store)
    before = recorder.nbytes
    with pytest.raises(OSError):
        bench(tokens[:, 4:], store, both(recorder, Fails()))
    assert recorder["resid.post", 2].shape[1] == 4 and recorder.nbytes == before
    assert store.lengths == [4]
    bench(tokens[:, 4:], store, recorder)
    whole = record(bench, tokens, "resid.post")
    assert torch.allclose(recorder["resid.post", 2], whole["resid.post", 2], atol=1e-4)


@pytest.mark.parametrize("positions, expected", [(None, 1), (range(LENGTH), 1), (range(3, 6), 0), ([2, LENGTH - 1], 1)])
def test_where_only_the_last_logits_are_computed_no_others_are_recorded(positions, expected, bench, tokens):
    recorder = Recorder("resid.post", "final.norm", "logits", positions=positions)
    last = bench(tokens, probe=recorder, logits="last")
    assert recorder["resid.post", 1].shape[1] == (LENGTH if positions is None else len(list(positions)))
    assert len(recorder.layers_of("logits")) == len(recorder.layers_of("final.norm")) == expected
    if expected:
        assert torch.equal(recorder["logits", None], last)


def test_gradients_flow_into_what_was_recorded(bench, tokens):
    recorder = Recorder("resid.mid", "moe.router_probs", "attn.pattern")

    class Leaf(Probe):
        """Puts a leaf in the middle, on which everything after it depends."""

        x = None

        def at(self, layer):
            return self if layer == 1 else Probe()

        def __call__(self, site, x):
            if site != "resid.pre":
                return x
            self.x = x.detach().requires_grad_()
            return self.x

    leaf = Leaf()
    logits = bench(tokens, probe=both(leaf, recorder))
    for value in (recorder["resid.mid", 2], recorder["moe.router_probs", 1], recorder["attn.pattern", 1], logits):
        [gradient] = torch.autograd.grad(value.square().sum(), leaf.x, retain_graph=True)
        assert gradient.isfinite().all() and gradient.any()
    assert not recorder["resid.mid", 0].requires_grad


def test_gradients_pass_an_edit(bench, tokens):
    """The slope of a logit along a direction is what a small step in that direction makes of it."""
    direction = torch.randn(bench.config.hidden_size, generator=torch.Generator().manual_seed(0))
    recorder = Recorder("resid.pre", layers=[2])
    bench.requires_grad_()
    try:
        logit = bench(tokens, probe=recorder)[0, -1, 5]
        [gradient] = torch.autograd.grad(logit, recorder["resid.pre", 2])
    finally:
        bench.requires_grad_(False)
    slope = float(gradient[0, -1] @ direction)
    with torch.no_grad():
        step = 1e-2
        sides = [
            bench(tokens, probe=Editing([Add("resid.pre", sign * step * direction, 2, positions=(LENGTH - 1, LENGTH))],
                                        bench.config))[0, -1, 5].item()
            for sign in (1, -1)
        ]  # fmt: skip
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=0.05)
