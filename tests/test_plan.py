"""The planner: its bytes are those of a real model, its limits hold, and what it says is the least works."""

import dataclasses
import json
import re

import pytest
import torch

from workbench.bandwidth import Measured, Rate
from workbench.cache import LatentCache
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.errors import BudgetError, RequestError
from workbench.experts import Resident
from workbench.model import Model
from workbench.plan import CACHE, CHUNKS, FAR, PROCESS, SLOTS, WOBBLE, Plan
from workbench.quantising import Quantising
from workbench.recipe import Recipe
from workbench.sizes import parse_bytes, show_bytes
from workbench.speed import KERNEL, Bytes, Rates, Span, published
from workbench.storages import weigh
from workbench.synth import Synth

POCKET = Config.preset("pocket")
LITE = dataclasses.replace(POCKET, q_lora_rank=None, topk_method="greedy", tie_word_embeddings=True, n_shared_experts=1)
GIB = 1 << 30


def made(config=POCKET, recipe="int4", **options):
    return Plan.make(config, recipe, **{"ram": "2GiB", "process": 300 << 20, "device": "cpu"} | options)


@pytest.mark.parametrize("config", [POCKET, LITE], ids=["pocket", "lite"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "int8", "int6", "int4", "int3", "int4,*.o_proj.weight=bf16", None])
def test_bytes_of_weights_are_those_of_a_model(config, recipe):
    source = Random(config, std=0.05)
    model = Model(config, source if recipe is None else Quantising(source, Recipe.named(recipe)), Resident())
    plan, weighed = made(config, recipe), weigh(model)
    for kind in ("embedding", "attention", "shared experts", "dense", "router and norms", "head", "rotary table"):
        assert plan.near.get(kind, 0) == weighed[kind], kind
    slack = 4096 * len(model.store.slabs)  # slabs begin on a page
    assert plan.slots * plan.block == weighed["routed experts"] - slack == plan.disk["experts"]


def test_the_cache_is_what_a_cache_of_that_context_holds():
    for format in ("fp32", "bf16", "q6", "q6+128"):
        for context in (1, 64, 65, 2048):
            plan = made(cache=format, context=context)
            cache = LatentCache(POCKET, 1, format)
            cache.reserve(context)
            assert plan.cache_bytes == plan.near[CACHE] == cache.nbytes


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 4095, 100_000, 1_000_000])
def test_no_limit_is_passed_and_no_block_is_left_out(staged, extra):
    whole = made(vram="1GiB") if staged else made()
    limit = sum(whole.fixed.values()) + 8 * whole.block + extra
    plan = made(vram=limit) if staged else made(ram=limit)
    total = sum(plan.near.values())
    assert total <= limit and (plan.whole or limit - total < plan.block or plan.chunk != whole.chunk)
    assert sum(plan.host.values()) <= plan.ram


@pytest.mark.parametrize("staged", [False, True])
def test_the_least_that_is_named_works_and_a_byte_less_does_not(staged):
    def limited(size):
        return made(vram=size, context=512) if staged else made(ram=size, context=512)

    with pytest.raises(BudgetError) as refused:
        limited(1 << 20)
    least = int(re.search(r"(?:vram|ram)=(\d+)", str(refused.value))[1])
    assert limited(least).slots >= POCKET.num_experts_per_tok
    exact = least - (0 if staged else WOBBLE)
    plan = limited(exact)
    assert plan.slots == POCKET.num_experts_per_tok and plan.chunk == min(CHUNKS)
    with pytest.raises(BudgetError, match=str(least)):
        limited(exact - 1)


@pytest.mark.parametrize("behind", [False, True])
def test_the_least_that_is_named_works_in_the_next_process_too(behind):
    """Which may take a little more before it has opened anything."""
    vram = sum(made(vram="1GiB", chunk=16).fixed.values()) + 20 * made().block if behind else None
    with pytest.raises(BudgetError) as refused:
        made(vram=vram, ram=310 << 20, chunk=16)
    least = int(re.search(r"ram=(\d+)", str(refused.value))[1])
    assert made(vram=vram, ram=least, chunk=16, process=(300 << 20) + 600_000).slots


def test_too_little_main_memory_behind_a_device_is_refused_with_the_least():
    vram = sum(made(vram="1GiB", chunk=16).fixed.values()) + 20 * made().block
    with pytest.raises(BudgetError) as refused:
        made(vram=vram, ram=310 << 20, chunk=16)
    least = int(re.search(r"ram=(\d+)", str(refused.value))[1])
    assert made(vram=vram, ram=least - WOBBLE, chunk=16).far == POCKET.num_experts_per_tok
    with pytest.raises(BudgetError):
        made(vram=vram, ram=least - WOBBLE - 1, chunk=16)


def test_plain_experts_must_all_fit():
    with pytest.raises(BudgetError, match="workbench pack"):
        made(recipe=None, ram=500 << 20, context=64, process=490 << 20)
    assert made(recipe=None).whole


def test_v2_fits_16_gib_with_its_experts_behind():
    plan = Plan.make(
        Config.preset("v2"), "int4", vram="16GiB", ram="96GiB", cache="q6", device="cuda", process=GIB // 2
    )
    assert sum(plan.near.values()) <= 16 * GIB and plan.context == 8192 and plan.chunk >= 64
    assert 400 < plan.slots < 800 and plan.far > 7000 and plan.experts == 9440
    assert plan.near["attention"] + plan.near["shared experts"] < 7e9


def test_v2_lite_runs_in_4_gb_of_which_a_third_of_its_experts():
    plan = Plan.make(Config.preset("v2-lite"), "int4", ram="4GB", context=1024, device="cpu", process=400 << 20)
    assert sum(plan.near.values()) <= 4e9 and 400 < plan.slots < plan.experts == 1664
    assert plan.host == {} and sum(plan.disk.values()) == pytest.approx(8.36e9, rel=0.01)


def test_longer_contexts_and_wider_caches_leave_fewer_slots():
    def slots(**options):
        return Plan.make(Config.preset("v2"), "int4", vram="16GiB", ram="96GiB", process=GIB, **options).slots

    assert slots(context=1024) > slots(context=8192) > slots(context=32768)
    assert slots(cache="q6") > slots(cache="bf16")


def test_the_context_it_promises_is_possible():
    plan = Plan.make(Config.preset("v2"), "int4", vram="16GiB", ram="96GiB", cache="bf16", process=GIB, chunk=64)
    capacity = plan.context_capacity()
    assert capacity["q6"] > capacity["int8"] > capacity["bf16"] >= plan.context


@pytest.mark.parametrize(
    ("size", "bytes"), [("16GiB", 16 * GIB), ("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), (7, 7), ("12", 12)]
)
def test_sizes(size, bytes):
    assert parse_bytes(size) == bytes


@pytest.mark.parametrize("size", ["16 gigs", "", "-4GB", 0, -1, None, True, 1.5, "GB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(RequestError, match="no size of memory"):
        parse_bytes(size)
    assert show_bytes(4_460_000) == "4.46 MB"


def measured(memory=(20e9, 40e9), disk=(1e9, 3e9), link=None):
    fields = {field.name: None for field in dataclasses.fields(Measured)}
    return Measured(**fields | {"memory": (Rate(2, memory),), "disk": (Rate(4, disk),), "link": link, "load": 0.0})


def test_speed_by_hand():
    token = Bytes(residents=10, experts=90, layers=2)
    rates = Rates(near=Span(50, 100), disk=Span(9, 45))
    slow, fast = token.speed(rates, 0.5, overlap=False), token.speed(rates, 0.5)
    assert fast.seconds == {"memory": 1.0, "disk": 1.0} and fast.tokens_per_second == 1.0
    assert slow.seconds == {"memory": 2.0 / KERNEL, "disk": 5.0, "steps": pytest.approx(1e-3)}
    assert slow.binds == "disk" and slow.tokens_per_second == pytest.approx(1 / (2.0 / KERNEL + 5.001))
    assert token.speed(rates, 1.0).seconds == {"memory": 1.0}
    behind = token.speed(Rates(Span(50, 100), Span(9, 45), Span(30, 90)), 0.5, behind=1.0)
    assert behind.seconds == {"memory": 1.0, "link": 0.5}


def test_the_range_is_wider_where_less_is_near_and_there_is_none_unmeasured():
    assert made().speed_range() is None and "doctor --measure" in str(made())
    tight = sum(made(chunk=16).fixed.values()) + 16 * made().block
    low, high = made(measured=measured(), ram=tight, chunk=16).speed_range()
    assert low.tokens_per_second < high.tokens_per_second and low.hit == pytest.approx(0.1, abs=0.05)
    assert made(measured=measured()).speed_range()[1].hit == 1.0
    assert published(0.0) == 0.0 and published(1.0) == 1.0 and published(0.19) == pytest.approx(0.741)


def test_it_prints_and_tells_programs_the_same(tmp_path):
    plan = made(vram="40MB", measured=measured())
    said, table = plan.to_dict(), plan.to_frame()["bytes"]
    assert said["near"][SLOTS] == plan.slots * said["block_bytes"] == table["near", SLOTS]
    assert said["host"].get(FAR, 0) == plan.far * plan.block and said["host"][PROCESS] > 300 << 20
    for part in plan.near:
        assert part in str(plan) or not plan.near[part]
    compared = plan.compare({SLOTS: said["near"][SLOTS] + 100, "unknown": 3})
    assert list(compared.index) == [SLOTS] and 0 < compared["error"][SLOTS] < 0.01


def test_of_reads_presets_directories_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.plan.saved", lambda: None)
    options = {"ram": "8GiB", "process": 1}
    assert Plan.of("v2-lite", **options).recipe.name == "int4"
    (tmp_path / "config.json").write_text(json.dumps(POCKET.to_dict()))
    for what in (tmp_path, tmp_path / "config.json"):
        assert Plan.of(what, "int8", **options).config == dataclasses.replace(POCKET)
    assert Plan.of("pocket", dtype="bf16", **options).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong", [{"dtype": "fp16"}, {"dtype": torch.float16}, {"context": 0}, {"context": -1}, {"batch": 0}], ids=str
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(RequestError, match="no dtype called|at least 1 token"):
        made(**wrong)


def test_a_packed_one_has_its_own_recipe(tmp_path):
    Synth.named("pocket", "int3").write(tmp_path / "out")
    for said in (None, "int3"):
        assert Plan.of(tmp_path / "out", said, ram="2GiB").recipe.name == "int3"
    with pytest.raises(RequestError, match="packed already, by recipe int3"):
        Plan.of(tmp_path / "out", "int8", ram="2GiB")
