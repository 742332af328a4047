"""The workspace by arithmetic against the allocations of real passes, which PyTorch's profiler counts one by one."""

import gc
from dataclasses import replace

import pytest
import torch

from workbench import native
from workbench.cache import LatentCache
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.formats import cache_format
from workbench.model import Model
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.ring import RoutingRing
from workbench.workspace import Pass, workspace

pytestmark = pytest.mark.usefixtures("by_operation")

# wide in the attention, so that its form and its parts decide
SHAPE = replace(
    Config.preset("pocket"),
    vocab_size=900,
    hidden_size=224,
    intermediate_size=600,
    num_hidden_layers=2,
    num_attention_heads=16,
    q_lora_rank=72,
    kv_lora_rank=136,
    qk_nope_head_dim=40,
    qk_rope_head_dim=24,
    v_head_dim=32,
    moe_intermediate_size=88,
    n_routed_experts=16,
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_id=1,
)
DIRECT = replace(SHAPE, q_lora_rank=None, tie_word_embeddings=True, n_shared_experts=None, name="direct")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def model():
    made = {}

    def make(config: Config, recipe: str | None, dtype: torch.dtype) -> Model:
        key = config, recipe, dtype
        if key not in made:
            source = Random(config, dtype=dtype)
            made[key] = Model(config, Quantising(source, Recipe.named(recipe)) if recipe else source)
        return made[key]

    return make


def allocated(call) -> int:
    """The most bytes beyond those before, at any moment of the call."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def filled(config: Config, format: str, before: int, new: int, batch: int, alone: bool) -> LatentCache:
    """A cache with room for `new` more; not `alone`, the blocks of its sequences lie between each other."""
    cache = LatentCache(config, batch if alone else batch + 1, format)
    for start in range(0, before, 64):
        for sequence in range(cache.batch):
            one, count = cache.only(sequence), min(64, before - start)
            one.reserve(count)
            one.advance(count)
    for part in (part for parts in cache.pool.layers for part in parts):
        part.zero_()
    one, cache = None, cache.only(*range(batch))  # the blocks of the other one are free for what comes
    cache.reserve(new)
    assert isinstance(cache.sequences[0].where, slice) == alone
    return cache


PASSES = [
    (200, 200, 1, True),  # expanded
    (130, 1500, 1, True),
    (130, 1500, 1, False),  # in parts
    (40, 1601, 1, True),  # absorbed
    (40, 1601, 1, False),
    (1, 2000, 1, True),
    (1, 1100, 11, False),
]
CACHES = ["fp32", "q6+128", "bf16", "q6"]
MODELS = [
    (SHAPE, "int4", "fp32"),
    (SHAPE, None, "bf16"),
    (DIRECT, "int4", "bf16"),
    (DIRECT, None, "fp32"),
    (SHAPE, "fp8", "fp32"),
]
CASES = [
    (*MODELS[(one + 2 * turn) % len(MODELS)], CACHES[(one + turn) % len(CACHES)], *PASSES[one])
    for turn in range(2)
    for one in range(len(PASSES))
]


@pytest.mark.parametrize(("config", "recipe", "dtype", "cache", "new", "length", "batch", "alone"), CASES)
def test_a_pass_takes_no_more_and_not_half_of_it(model, config, recipe, dtype, cache, new, length, batch, alone):
    made, kind = model(config, recipe, TYPES[dtype]), Recipe.named(recipe) if recipe else None
    rows = filled(config, cache, length - new, new, batch, alone)
    ring = RoutingRing(config)
    ring.to(*[ring.log() for _ in range(batch)])
    tokens = torch.randint(0, config.vocab_size, (batch, new))
    with torch.inference_mode():
        real = allocated(lambda: made(tokens, rows, ring, logits="last"))
    asked = Pass(
        config, kind, TYPES[dtype], cache_format(cache), new, length, batch, alone, native.kernel() is not None
    )
    assert real <= asked.workspace.nbytes
    if new > 1:  # of a single token there is little to be wrong about
        assert asked.workspace.nbytes <= 2 * real


def test_what_is_asked_for_a_context_covers_every_pass_within_it():
    kind, q6 = Recipe.named("int4"), cache_format("q6")
    for compiled in (True, False):
        whole = workspace(SHAPE, kind, torch.float32, q6, 2000, batch=3, chunk=200, compiled=compiled).nbytes
        for length in (1, 7, 64, 333, 1000, 1999, 2000):
            for new in {1, 5, 8, 9, 30, 77, 199, 200}:
                if new <= length:
                    one = Pass(SHAPE, kind, torch.float32, q6, new, length, 1, True, compiled).workspace
                    assert one.nbytes <= whole, (new, length)
        together = Pass(SHAPE, kind, torch.float32, q6, 1, 2000, 3, False, compiled).workspace
        assert together.nbytes <= whole


def test_smaller_chunks_take_less_and_codes_without_a_kernel_take_more():
    v2, kind, q6 = Config.preset("v2"), Recipe.named("int4"), cache_format("q6")
    sizes = [workspace(v2, kind, torch.bfloat16, q6, 8192, chunk=chunk, compiled=True).nbytes for chunk in (512, 64, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[1]
    assert workspace(v2, kind, torch.bfloat16, q6, 8192, chunk=8, compiled=False).nbytes > 2 * sizes[2]


def test_one_weight_that_is_packed_otherwise_counts():
    """In any layer: the worst of them is what must fit."""
    odd = Recipe.named("bf16,model.layers.1.mlp.experts.*=int3")
    args = torch.bfloat16, cache_format("bf16"), 100
    assert (
        workspace(SHAPE, odd, *args, compiled=False).experts
        > workspace(SHAPE, Recipe.named("bf16"), *args, compiled=False).experts
    )
