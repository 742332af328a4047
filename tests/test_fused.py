"""A fused pass computes what the operations compute one by one, and the same bits however it is cut."""

import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import checkpoints
import pytest
import torch

from workbench import fused, ops
from workbench.cache import LatentCache
from workbench.checkpoint import Random
from workbench.codec import Codes, Float, Groups, Tiles
from workbench.config import Config
from workbench.edits import Ablate
from workbench.engine import Engine
from workbench.evals.exam import questions
from workbench.formats import CACHE_FORMATS, Packed
from workbench.model import Model
from workbench.opening import open_model
from workbench.probe import OFF, Probe
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.recorder import Recorder
from workbench.ring import RoutingRing
from workbench.sampling import Sampling
from workbench.tokenizer import Tokenizer
from workbench.workbench import POCKET

pytestmark = pytest.mark.skipif(fused.missing() is not None, reason=f"no fused pass here: {fused.missing()}")

SMALL = replace(
    Config.preset("pocket"),
    vocab_size=301,
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=5,
    q_lora_rank=40,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=20,
    moe_intermediate_size=22,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=3,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)
SHAPES = {
    "odd": SMALL,
    "whole registers": replace(
        SMALL, hidden_size=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        moe_intermediate_size=48, num_attention_heads=8, q_lora_rank=96,
    ),
    "no compressed query": replace(SMALL, q_lora_rank=None, topk_method="greedy"),
    "no shared experts": replace(SMALL, n_shared_experts=None),
    "normed gates": replace(SMALL, norm_topk_prob=True, routed_scaling_factor=1.0),
    "one expert a token": replace(SMALL, num_experts_per_tok=1, topk_group=1),
    "all experts": replace(SMALL, num_experts_per_tok=12, topk_method="greedy"),
    "every other layer": replace(SMALL, num_hidden_layers=5, moe_layer_freq=2),
    "dense": replace(SMALL, n_routed_experts=None, num_experts_per_tok=0, topk_method="greedy"),
    "tied, no yarn": replace(SMALL, tie_word_embeddings=True, rope_scaling=None, first_k_dense_replace=0),
}  # fmt: skip

WINDOWS = ["q6+100", "int4+5", "fp8+1"]
PACKED = [name for name, format in CACHE_FORMATS.items() if isinstance(format, Packed)]
OTHERS = [
    *(Packed(f"{bits} bits", Groups(bits), Codes(bits)) for bits in (2, 3, 7, 8, 12)),
    Packed("small tiles", Tiles(16), Float(torch.float32)),
]


def built(config: Config, dtype: torch.dtype = torch.float32) -> Model:
    return Model(config, Random(config, seed=torch.seed() % 1000, dtype=dtype, std=0.12))


def tokens_of(config: Config, *shape: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape)


def decided_tokens(model: Model, *shape: int) -> torch.Tensor:
    """That no router is near a tie about: there the last bit, which is either way's own, would choose the expert."""
    config = model.config
    for _ in range(100):
        tokens, look = tokens_of(config, *shape), Recorder("moe.router_probs")
        if not config.n_routed_experts:
            return tokens
        with torch.inference_mode():
            model(tokens, probe=look)
        gaps = []
        for layer in look.layers_of("moe.router_probs"):
            probs = look["moe.router_probs", layer]
            if config.topk_method == "group_limited_greedy":
                best = probs.unflatten(-1, (config.n_group, -1)).amax(-1)
                gaps.append(_gap(best, config.topk_group))
                probs = ops._among(probs, ops.groups_kept(probs, config))
            gaps.append(_gap(probs, config.num_experts_per_tok))
        if min(gaps) > 1e-5:
            return tokens
    raise AssertionError("every text comes near a tie")


def _gap(scores: torch.Tensor, kept: int) -> float:
    if kept == scores.shape[-1]:
        return 1.0
    ranked = scores.sort(-1, descending=True).values
    return (ranked[..., kept - 1] - ranked[..., kept]).min().item()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def read(model: Model, tokens: torch.Tensor, format: str | None, cuts: list[int], fuse: bool, probe: Probe = OFF):
    """Logits of every token, read in pieces of these lengths."""
    model.fuse = fuse
    cache = LatentCache(model.config, len(tokens), format) if format else None
    with torch.inference_mode():
        assert (model.explain(cache, probe) is None) == fuse
        return torch.cat([model(piece, cache, probe) for piece in tokens.split(cuts, 1)], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format, cuts", [(None, [97]), ("fp32", [97]), ("fp32", [61, 1, 1, 33, 1])])
def test_it_is_what_the_operations_compute(shape, format, cuts):
    model = built(SHAPES[shape])
    tokens = decided_tokens(model, 2, sum(cuts))
    got, wanted = (read(model, tokens, format, cuts, fuse) for fuse in (True, False))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_read_before_it_is_written(shape):
    model = built(SHAPES[shape])
    tokens = tokens_of(model.config, 2, 80)
    wanted = read(model, tokens, "fp32", [66, 14], True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is allocated is then not a number
    try:
        assert torch.empty(3).isnan().all()
        assert torch.equal(read(model, tokens, "fp32", [66, 14], True), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", ["odd", "whole registers", "no compressed query", "dense"])
def test_in_bf16_it_errs_no_more_than_the_operations(shape):
    """Where no near tie of the router flips: the expert is then another, by either way."""
    config = replace(SHAPES[shape], n_routed_experts=None, num_experts_per_tok=0, topk_method="greedy")
    narrow = built(config, torch.bfloat16)
    exact = built(config)
    exact.load_state_dict(narrow.state_dict())
    tokens = tokens_of(config, 2, 70)
    wanted = read(exact, tokens, None, [70], False)
    errors = [
        (read(narrow, tokens, "bf16", [50, 1, 19], fuse) - wanted).square().mean().sqrt() for fuse in (True, False)
    ]
    assert 0 < errors[0] <= 1.5 * errors[1]


def filled(model: Model, tokens: torch.Tensor, format, cuts: list[int]) -> LatentCache:
    """A cache of two sequences, in blocks that take turns, after a fused pass for each piece."""
    cache = LatentCache(model.config, 2, format)
    with torch.inference_mode():
        for piece in tokens.split(cuts, 1):
            for row in range(2):
                assert model.explain(cache) is None
                model(piece[row : row + 1], cache.only(row))
    return cache


@pytest.mark.parametrize("shape", ["odd", "whole registers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_packed_to_the_bytes_of_the_format(shape, dtype):
    """Without what attention adds, rows are the same whatever the format before them loses."""
    config = SHAPES[shape]
    model = built(config, dtype)
    with torch.no_grad():
        for block, size in zip(model.blocks, (1, 1e-6, 1e7)):  # the last: more than fp16 holds
            block.attention.out.zero_()
            block.attention.kv_norm.mul_(torch.randn(config.kv_lora_rank).exp() * size)
        model.embedding[5] = 0
        model.embedding[6, 3] = float("nan")
    tokens = tokens_of(config, 2, 330)
    tokens[:, :4], tokens[1, 300] = 5, 6
    cuts = [70, 1, 1, 258]  # the same, as what is not a number also counts for tokens before it that are read with it
    plain = filled(model, tokens, "fp32", cuts)
    for format in [*CACHE_FORMATS, *WINDOWS, *OTHERS]:
        cache = filled(model, tokens, format, cuts)
        for layer, parts in enumerate(cache.pool.layers):
            for number, sequence in enumerate(cache.sequences):
                rows = plain.rows(layer, number, torch.float32)
                for part, wanted in zip(parts, cache.pool.format.pack(rows, cache.pool.row)):
                    assert _same(part[sequence.where], wanted), (format, layer, number, wanted.dtype)
                if sequence.window:
                    assert sequence.window.start == max(0, 330 - cache.pool.recent)
                    got = sequence.window.overlay(layer, 0, torch.zeros_like(rows))[sequence.window.start :]
                    assert _same(got, rows[sequence.window.start :].bfloat16().float())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """In every bit, but that any NaN is one."""
    if a.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", ["odd", "whole registers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_read_as_the_format_unpacks_them(shape, dtype):
    config = SHAPES[shape]
    model = built(config, dtype)
    tokens, last = tokens_of(config, 2, 128), tokens_of(config, 2, 64)  # the last block of the pool is read to its end
    caches = [filled(model, tokens, format, [70, 1, 57]) for format in [*PACKED, "fp32", *OTHERS]]
    with torch.no_grad():
        for block in model.blocks:  # from now on rows are 0, which every format keeps
            block.attention.down[-config.latent_width :] = 0
        for cache in caches:
            assert model.explain(cache) is None
            fork, name = cache.fork(), cache.format
            got = model(last, cache)
            fork.convert("bf16" if dtype == torch.bfloat16 else "fp32")
            assert torch.equal(got, model(last, fork)) and got.isfinite().all(), name


@pytest.mark.parametrize("name", [*PACKED, *WINDOWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_packed_cache_it_computes_what_the_operations_do(name, dtype):
    """But for codes that the last bit of a row decides: less by far than what the format loses."""
    config = replace(SMALL, n_routed_experts=None, num_experts_per_tok=0, topk_method="greedy")
    model = built(config, dtype)
    tokens = tokens_of(config, 3, 190)
    pieces = [150, 1, 9, 30]
    got, wanted = (read(model, tokens, name, pieces, fuse).double() for fuse in (True, False))
    exact = [read(model, tokens, "fp32", pieces, fuse).double() for fuse in (True, False)]
    lost, last_bits = (wanted - exact[1]).square().mean().sqrt(), (exact[0] - exact[1]).square().mean().sqrt()
    off = (got - wanted).square().mean().sqrt()
    assert off < 0.1 * lost + 2 * last_bits
    assert (got - wanted).abs().amax(-1).median() < 0.1 * (wanted - exact[1]).abs().amax(-1).median() + 4 * last_bits


@pytest.mark.parametrize("name", ["fp32", *PACKED, *WINDOWS])
def test_a_cache_that_is_cut_forked_and_converted(name):
    """In two caches the same happens, one is filled by fused passes: they keep saying the same."""
    config = replace(SMALL, n_routed_experts=None, num_experts_per_tok=0, topk_method="greedy")
    model = built(config)
    caches = [LatentCache(config, 3, name) for _ in range(2)]
    choose = random.Random(torch.seed())
    kept, said = [], []

    def both(tokens, *rows):
        logits = []
        for fuse, cache in zip((True, False), caches):
            model.fuse = fuse
            with torch.inference_mode():
                logits.append(model(tokens, cache.only(*rows) if rows else cache))
        scale = logits[1].std()
        said.append(((logits[0] - logits[1]).square().mean().sqrt() / scale).item())

    for turn in range(4):
        for row in range(3):
            both(tokens_of(config, 1, choose.randint(1, 70)), row)
        kept.append([cache.fork() for cache in caches])
        length, row = choose.randint(0, min(caches[0].lengths)), choose.randrange(3)
        for cache in caches:
            cache.truncate(length, row)
        both(tokens_of(config, 3, choose.choice([1, 1, 5])))
        if "+" not in name and turn == 2:
            plain = len(said)
            for cache in caches:
                cache.convert("int8")
    caches = kept[1]
    both(tokens_of(config, 3, 2))
    for mine, its in zip(caches[0].sequences, caches[1].sequences):
        assert not mine.window or mine.window.start == its.window.start
    # codes of rows that differ in their last bits may differ by one
    assert max(said) < 0.02 and (name != "fp32" or max(said[:plain]) < 1e-4), said


@pytest.mark.parametrize("shape", ["odd", "whole registers", "no compressed query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["fp32", "bf16", "q6", "fp8", "int8"])
def test_a_token_has_the_same_bits_however_it_is_read(shape, dtype, format, threads):
    model = built(SHAPES[shape], dtype)
    tokens = tokens_of(model.config, 3, 150)
    threads(1)
    wanted = read(model, tokens, format, [150], True)
    for count, cuts in ((2, [150]), (3, [64, 64, 22]), (1, [1, 2, 3, 5, 70, 69]), (2, [149, 1])):
        threads(count)
        assert torch.equal(read(model, tokens, format, cuts, True), wanted), (count, cuts)
    for row in range(3):
        assert torch.equal(read(model, tokens[row : row + 1], format, [31, 119], True), wanted[row : row + 1])


@pytest.mark.parametrize("name", WINDOWS)
def test_with_a_window_a_token_has_the_same_bits_beside_others(name, threads):
    """Which rows are wide is said by how a prompt was cut, by any way of computing."""
    model, cuts = built(SMALL), [64, 1, 50, 1]
    tokens = tokens_of(SMALL, 3, sum(cuts))
    threads(1)
    wanted = read(model, tokens, name, cuts, True)
    threads(3)
    assert torch.equal(read(model, tokens, name, cuts, True), wanted)
    for row in range(3):
        assert torch.equal(read(model, tokens[row : row + 1], name, cuts, True), wanted[row : row + 1])


@pytest.mark.parametrize("format", ["fp32", *PACKED])
def test_a_ragged_batch_over_scattered_blocks_and_forks(format, threads):
    threads(2)
    model = built(SMALL)
    texts = [tokens_of(SMALL, 1, length) for length in (1, 63, 130, 200)]
    model.fuse = True
    with torch.inference_mode():
        cache = LatentCache(SMALL, 4, format)
        for start in range(0, 200, 50):  # in turns, so that no sequence lies in a row
            for number, text in enumerate(texts):
                if text[:, start : start + 50].numel():
                    model(text[:, start : start + 50], cache.only(number))
        for layer in cache.pool.layers:
            poison = torch.ones(len(layer[0]), dtype=torch.bool)
            for sequence in cache.sequences:
                where = sequence.where
                poison[where] = False
            for part in layer:
                part.view(torch.uint8)[poison] = 255
        assert any(not isinstance(sequence.where, slice) for sequence in cache.sequences)
        fork, one = cache.fork(), tokens_of(SMALL, 4, 1)
        got = model(one, cache)
        again = model(one, fork, logits="last")
        assert torch.equal(got, again) and got.isfinite().all()
        for row, text in enumerate(texts):
            alone = model(torch.cat([text, one[row : row + 1]], 1), LatentCache(SMALL, 1, format))[:, -1:]
            assert torch.equal(got[row : row + 1], alone)


def test_routing_is_recorded_as_it_was():
    for shape in ("odd", "normed gates", "all experts", "every other layer"):
        model = built(SHAPES[shape])
        tokens, logs = tokens_of(model.config, 2, 40), []
        for fuse in (True, False):
            ring = RoutingRing(model.config)
            logs.append([ring.log(), ring.log()])
            read(model, tokens, "fp32", [30, 1, 9], fuse, ring.to(*logs[-1]))
        for mine, wanted in zip(*logs):
            mine, wanted = mine.rows(), wanted.rows()
            assert mine.experts.shape == wanted.experts.shape == (40, len(ring.layers), ring.slots)
            same = mine.experts == wanted.experts
            assert same.mean() > 0.99  # a near tie may go either way
            assert abs(mine.gates - wanted.gates)[same].max() < 2e-3
            assert abs(mine.margins - wanted.margins)[same].max() < 2e-3


def test_it_says_when_and_why_it_is_not_fused(monkeypatch):
    model, cache = built(SMALL), LatentCache(SMALL, 1, "fp32")
    tokens = tokens_of(SMALL, 1, 5)
    assert model.explain() is None and model.explain(cache, RoutingRing(SMALL)) is None
    assert "looks inside" in model.explain(cache, Recorder("resid.pre"))
    assert "(wide groups)" in model.explain(LatentCache(SMALL, 1, Packed("wide groups", Groups(4, 32), Codes(8))))
    assert "(half)" in model.explain(
        LatentCache(SMALL, 1, replace(CACHE_FORMATS["bf16"], name="half", dtype=torch.half))
    )
    hook = model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    seen = []
    assert "hook" in model.explain()
    model(tokens)
    hook.remove()
    assert seen and model.explain() is None
    model.requires_grad_()
    assert "gradient" in model.explain()
    model(tokens).sum().backward()
    assert model.blocks[1].mlp.router.grad.abs().sum() > 0
    with torch.no_grad():
        assert model.explain() is None
    packed = Model(SMALL, Quantising(Random(SMALL), Recipe.named("int4")))
    assert "packed" in packed.explain()
    monkeypatch.setattr(fused, "_opened", lambda: (None, "no C compiler: looked for cc"))
    assert "no C compiler" in built(SMALL).explain()
    assert built(SMALL)(tokens).isfinite().all()


class Twice(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_weights_that_change_or_move_are_the_ones_that_count():
    model = built(SMALL)
    tokens = tokens_of(SMALL, 1, 20)
    first = model(tokens)
    with torch.no_grad():
        model.blocks[1].attention.out.mul_(0.5)
        second = model(tokens)
        model.blocks[1].attention.out.data = model.blocks[1].attention.out * 2
        assert torch.equal(model(tokens), first) and not torch.allclose(second, first)
        # not only its data: the parameter itself, and a module around others
        model.blocks[1].attention.out = torch.nn.Parameter(model.blocks[1].attention.out * 0.5)
        assert model.explain() is None and torch.equal(model(tokens), second)
        model.blocks[1].attention.out.mul_(2)
        shared = model.blocks[1].mlp.shared
        model.blocks[1].mlp.shared = Twice(shared)
        assert "own" in model.explain() and not torch.allclose(model(tokens), first)
        model.blocks[1].mlp.shared, model._fused = shared, None
        assert model.explain() is None and torch.equal(model(tokens), first)
        model.norm.data = model.norm.data.repeat_interleave(2)[::2]
        assert model.explain() == "weights do not lie in a row" and torch.allclose(model(tokens), first, atol=1e-4)


def test_defaults_of_torch_make_no_difference():
    model = built(SMALL)
    tokens = tokens_of(SMALL, 2, 40)
    wanted = model(tokens)
    before = torch.get_default_dtype()
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            assert torch.equal(model(tokens), wanted)
    finally:
        torch.set_default_dtype(before)


def test_an_engine_says_the_same(tokenizer):
    """Of three random models one may hang on the last bit of a router's near tie: one in some thousand texts does."""
    config = replace(SMALL, vocab_size=600, eos_token_id=tokenizer.eos, bos_token_id=tokenizer.bos)
    same = []
    for _ in range(3):
        model, texts = built(config), []
        for fuse in (True, False):
            model.fuse = fuse
            engine = Engine(model, tokenizer, "fp32")
            said = [engine.generate("Hello there", Sampling(temperature=0, max_tokens=40))]
            said += engine.batch(["a", "of the latent " * 9], Sampling(seed=3, max_tokens=20))
            edits = [Ablate(1, range(6))]
            said.append(engine.generate("Hello there", Sampling(temperature=0, max_tokens=9), edits=edits))
            texts.append([one.tokens for one in said])
        same.append(texts[0] == texts[1])
    assert sum(same) >= 2


@pytest.mark.parametrize("name", ["fp32", *PACKED, "q6+32"])
def test_pocket_writes_the_same_text(name):
    """Where the operations are decided: what comes first leads by more than one code can add."""
    pocket, tokenizer = open_model(POCKET, dtype=torch.float32), Tokenizer(POCKET)
    for prompt in ("Once upon a time there was a little dog", "Why is the sky blue?"):
        tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])
        caches = [LatentCache(pocket.config, 1, name) for _ in range(2)]
        decided = 0
        for _ in range(40):
            logits = []
            for fuse, cache in zip((True, False), caches):
                pocket.fuse = fuse
                assert (pocket.explain(cache) is None) == fuse
                with torch.inference_mode():
                    logits.append(pocket(tokens, cache, logits="last")[0, -1])
            first, second = logits[1].topk(2).values
            tokens = logits[0].argmax().reshape(1, 1)
            if first - second > 0.1:
                decided += 1
                assert tokens.item() == logits[1].argmax().item(), (prompt, caches[0].lengths)
        assert decided > 25


@pytest.mark.parametrize("name", ["fp32", "q6"])
def test_pocket_answers_its_exam_in_the_same_words(name):
    """Greedy, some questions each time; all 140 of one run did, in both formats. One may hang on a last bit."""
    pocket, tokenizer = open_model(POCKET, dtype=torch.float32), Tokenizer(POCKET)
    asked, calm = random.Random(torch.seed()).sample(questions(), 12), Sampling(temperature=0, max_tokens=80)
    same = 0
    for question in asked:
        answers = []
        for fuse in (True, False):
            pocket.fuse = fuse
            answers.append(Engine(pocket, tokenizer, name).generate(question.messages, calm).tokens)
        same += answers[0] == answers[1]
    assert same >= len(asked) - 1


def test_threads_that_pass_at_once_do_not_disturb_each_other(threads):
    threads(2)
    model = built(SMALL)
    texts = [tokens_of(SMALL, 1, length) for length in (7, 33, 64, 90)]
    wanted = [model(text) for text in texts]
    wrong = []

    def work(text, right):
        for _ in range(40):
            if not torch.equal(model(text), right):
                wrong.append(len(text))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(texts, wanted)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_after_a_fork_the_child_has_threads_of_its_own():
    code = """
import os, torch
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.model import Model
torch.set_num_threads(2)
model = Model(Config.preset("pocket"), Random(Config.preset("pocket")))
tokens = torch.randint(0, 4000, (1, 30))
wanted = model(tokens)
assert model.explain() is None
child = os.fork()
if not child:  # NumPy compares: PyTorch's own threads do not survive a fork
    os._exit(0 if (model(tokens).numpy() == wanted.numpy()).all() else 1)
assert torch.equal(model(tokens), wanted)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr.decode()


def test_checkpoints_of_transformers(model):
    """As tests/test_parity.py compares the operations with transformers."""
    for name in checkpoints.CASES:
        ours = model(name)
        tokens = decided_tokens(ours, 2, 120)
        got, wanted = (read(ours, tokens, "fp32", [90, 1, 29], fuse) for fuse in (True, False))
        del ours.fuse  # it is shared
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), name


def test_a_prompt_through_wide_bf16_layers_is_left_to_torch():
    """Not a step, not in fp32, and not where layers are narrow: there one call is faster."""
    shape = replace(SMALL, hidden_size=1024, num_hidden_layers=1, first_k_dense_replace=1)
    wide = Model(shape, Random(shape, dtype=torch.bfloat16))
    assert "faster" in wide.explain(tokens=32) and wide.explain(tokens=8) is None
    assert Model(shape, Random(shape)).explain(tokens=32) is None and built(SMALL).explain(tokens=999) is None
    tokens = torch.randint(shape.vocab_size, (1, 40))
    whole, parts = LatentCache(shape, format="bf16"), LatentCache(shape, format="bf16")
    with torch.inference_mode():
        one = wide(tokens, whole)
        other = torch.cat([wide(part, parts) for part in tokens.split(8, 1)], 1)
    assert (one - other).abs().median() < 0.05 * one.std()
