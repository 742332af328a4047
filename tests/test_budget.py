"""Hard limits, kept: a real process inside a fence of the system, and the bytes the plan told for it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.benchmarks.confined import run
from workbench.benchmarks.offload_child import measure
from workbench.config import Config
from workbench.errors import BudgetError
from workbench.recipe import Recipe
from workbench.synth import Synth

SHAPE = replace(  # 90 MB of experts: far beyond what the process' own memory may hide
    Config.preset("pocket"),
    hidden_size=768,
    moe_intermediate_size=384,
    num_hidden_layers=5,
    n_routed_experts=48,
    bos_token_id=1,
    eos_token_id=2,
)
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("budget") / "model"
    Synth(SHAPE, Recipe.named("int4")).write(path)
    return path


BASE = "import json, psutil, workbench.benchmarks.offload_child; print(psutil.Process().memory_info().rss)"


@pytest.fixture(scope="module")
def base():
    """What Python with PyTorch and this package takes before a model is opened."""
    return int(subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=True).stdout)


def asked(packed, **how):
    return {"path": str(packed), "threads": 1, "prompt": 80, "tokens": 12, "rounds": 1, "dtype": "fp32"} | how


@linux
@pytest.mark.parametrize("cache", ["fp32", "q6"])
def test_a_process_stays_within_what_it_was_given_and_the_plan_was_right(packed, base, cache):
    limit = base + (180 << 20)
    told, kept = run("workbench.benchmarks.offload_child", asked(packed, ram=limit, context=256, cache=cache), limit)
    plan, held = told["plan"], told["held"]
    assert plan["slots"] < plan["experts"] and told["runs"][0]["traffic"]["phases"]["answer"]["from_disk"] > 0
    assert told["peak_rss"] <= limit
    for name, size in held.items():
        if name != "cache" and size:
            assert size == pytest.approx(plan["near"][name], rel=0.01), name
    assert held["cache"] <= plan["near"]["cache"]


@linux
def test_a_stand_in_for_a_gpu_keeps_both_limits(packed):
    told = measure(**asked(packed, vram="40MB", ram="4GB", context=128))
    plan, held = told["plan"], told["held"]
    assert sum(plan["near"].values()) <= 40e6 and plan["slots"] < plan["experts"] == plan["far"]
    assert held["expert slots (host)"] == pytest.approx(plan["host"]["expert slots (host)"], rel=0.01)


@linux
def test_too_small_a_limit_is_refused_in_the_other_process_too(packed):
    with pytest.raises(BudgetError, match="least that works"):
        run("workbench.benchmarks.offload_child", asked(packed, ram="100MB", context=128), 3 << 30)


def test_what_is_asked_and_answered_is_json(packed):
    told = measure(**asked(packed, ram="4GB", context=128, prompt=4, tokens=3))
    assert json.loads(json.dumps(told)) == told and told["tokens_per_second"] > 0
