"""The budget slider says what the plan says, for whatever is chosen; what does not fit costs no plan."""

import json
import re

import packs
import psutil
import pytest

from workbench.bandwidth import Measured, Rate
from workbench.config import Config
from workbench.errors import BudgetError, RequestError
from workbench.packing import pack
from workbench.plan import Plan
from workbench.widgets.budget import BudgetSlider

POCKET = Config.preset("pocket")
FIELDS = dict.fromkeys(("past_cache", "file_system", "when", "cpu", "device", "torch", "package"), "")
RATES = Measured(
    (Rate(2, (20e9,)),), (Rate(4, (3e9,)),), Rate(1, (25e9,)), Rate(1, (900e9,)), block=0, file=0, load=0.0, cores=0,
    threads=0, **FIELDS,
)  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """BudgetSlider, with what the page is told in `told`."""
    sliders = []

    def make(*what, **limits):
        slider = BudgetSlider(*what, **limits)
        slider.told = []
        monkeypatch.setattr(slider, "_tell", lambda message, buffers=(): slider.told.append(message))
        sliders.append(slider)
        return slider

    yield make
    for slider in sliders:
        slider.close()


@pytest.fixture
def slider(made):
    return made("v2", vram="16GiB", ram="96GiB", cache="q6", measured=RATES)


def planned(slider, recipe="int4", **limits):
    """What Plan says without the widget."""
    limits = {"vram": "16GiB", "ram": "96GiB", "cache": "q6"} | limits
    fixed = {"device": "cuda", "process": slider.plan.process, "measured": RATES}
    return Plan.make(Config.preset("v2"), recipe, **limits, **fixed)


def least(error):
    return int(re.search(r"v?ram=(\d+)", error)[1])


CHOICES = {"vram": "24GiB", "context": 32_768, "cache": "bf16", "recipe": "int3", "ram": 48 << 30}


def test_the_plan_is_that_of_what_is_chosen_and_each_choice_keeps_the_others(slider):
    assert slider.plan == planned(slider)
    assert slider.plan.process == pytest.approx(psutil.Process().memory_info().rss, rel=0.3), "this one's"
    chosen = {}
    for name, value in CHOICES.items():
        chosen[name] = value
        plan = slider.choose(**{name: value})
        assert plan is slider.plan and plan == planned(slider, **chosen)
    assert [message["kind"] for message in slider.told] == ["result"] * 5, "one answer a choice"


def test_a_page_is_told_the_plan(slider):
    slider._snapshot("v")
    slider.choose(context=4096, recipe="int3")
    told, plan = slider.told[-1]["plan"], slider.plan
    for tier, parts in (("near", plan.near), ("host", plan.host), ("disk", plan.disk)):
        assert dict(told[tier]) == {part: size for part, size in parts.items() if size}
    for name in ("vram", "ram", "chunk", "slots", "far", "experts", "block"):
        assert told[name] == getattr(plan, name)
    assert dict(told["capacity"]) == plan.context_capacity()
    for (speed, hit, binds), one in zip(told["speed"], plan.speed_range(), strict=True):
        assert (speed, hit) == pytest.approx((one.tokens_per_second, one.hit), rel=1e-3) and binds == one.binds
    shown = slider.told[0]
    assert (shown["kind"], shown["view"], shown["facts"]["near"]) == ("show", "v", "VRAM")
    for name, all in (("vram", sum(plan.fixed.values())), ("ram", 0)):
        stops = shown["facts"]["stops"][name]
        assert stops == sorted(set(stops)) and stops[-1] >= all + 9440 * plan.block > stops[0]
    json.dumps(slider.told)


@pytest.mark.parametrize(("name", "too_little"), [("vram", "8GiB"), ("ram", 2 << 20)])
def test_what_does_not_fit_is_refused_and_the_plan_before_stays(slider, name, too_little):
    before = slider.plan
    with pytest.raises(BudgetError) as error:
        slider.choose(**{name: too_little})
    told = slider.told[-1]
    assert slider.plan is before and slider.error == str(error.value) == told["error"]
    assert told["plan"]["slots"] == before.slots and f"{name}={least(slider.error)}" in slider.error
    assert slider.wanted[name] < least(slider.error), "what was chosen stays chosen"
    with pytest.raises(BudgetError):
        slider.choose(**{name: least(slider.error) - (64 << 20)})
    assert slider.choose(**{name: least(slider.error)}) is slider.plan is not before
    assert slider.error is None is slider.told[-1]["error"]
    assert (slider.plan.slots if name == "vram" else slider.plan.far) >= 6, "as many as a token asks a layer for"


def test_a_second_choice_may_make_the_first_one_fit(slider):
    with pytest.raises(BudgetError):
        slider.choose(context=163_840, cache="fp32")
    assert slider.choose(cache="int4") == planned(slider, context=163_840, cache="int4")


WRONG = [
    ({"cache": "q7"}, "no cache format"),
    ({"recipe": "int4,"}, "recipe|rule|codec"),
    ({"vram": "much"}, "no size of memory"),
    ({"ram": -1}, "no size of memory"),
    ({"context": 0}, "at least 1"),
]


def test_what_there_is_not_changes_nothing(slider):
    before, wanted = slider.plan, slider.wanted
    for choice, said in WRONG:
        with pytest.raises(RequestError, match=said):
            slider.choose(**choice)
        slider._handle_custom_msg({"kind": "choose", "view": "v"} | choice, [])
        assert slider.plan is before and slider.wanted == wanted
    assert not {message["kind"] for message in slider.told} & {"result", "show"}
    assert slider.choose(context=10**9).context == slider.wanted["context"] == 163_840, "at most the model's"


def test_a_page_chooses_with_the_same_words(slider):
    chosen = {}
    for message in ({"vram": 32 << 30}, {"context": 1024}, {"cache": "int8"}, {"recipe": "int6"}, {"ram": 200 << 30}):
        slider._handle_custom_msg({"kind": "choose", "view": "v"} | message, [])
        chosen |= message
        assert slider.plan == planned(slider, **chosen)
    slider._handle_custom_msg({"kind": "choose", "view": "v", "vram": 1 << 30}, [])
    assert "too little" in slider.told[-1]["error"] and slider.plan.vram == 32 << 30
    for nonsense in ({"kind": "choose"}, {"kind": "choose", "vram": "16GiB"}, {"kind": "other"}):
        slider._handle_custom_msg(nonsense, [])
    assert slider.wanted["vram"] == 1 << 30 and len(slider.told) == 6, "each was answered once"


def test_a_packed_checkpoint_keeps_its_recipe(made, tmp_path):
    recipe = "int6,*.o_proj.weight=bf16"
    folder = pack(packs.plain(tmp_path / "plain", packs.CASES["v2"]), tmp_path / "packed", recipe).path
    slider = made(folder, device="cpu", ram="64GiB")
    assert slider.plan == Plan.of(folder, device="cpu", ram="64GiB", process=slider.plan.process)
    assert slider.plan.recipe.name == recipe
    slider._snapshot("v")
    assert slider.told[-1]["facts"]["recipes"] == [recipe], "there is nothing to choose"
    assert slider.choose(ram="32GiB").recipe.name == recipe
    with pytest.raises(RequestError, match="packed already"):
        made(folder, "int4", device="cpu")


def test_main_memory_may_be_all_there_is(made):
    slider = made(POCKET, device="cpu", ram="64GiB")
    slider._snapshot("v")
    assert list(slider.told[-1]["facts"]["stops"]) == ["ram"] and slider.told[-1]["wanted"]["vram"] is None
    assert slider.wanted["cache"] == "fp32" and slider.plan.whole and not slider.told[-1]["plan"]["host"]
    with pytest.raises(RequestError, match="only main memory"):
        slider.choose(vram="1GiB")
    assert slider.plan.vram is None


def test_a_part_of_main_memory_may_stand_in_for_a_device(made):
    slider = made(POCKET, device="cpu", vram="32MiB", ram="64GiB")
    slider._snapshot("v")
    assert slider.told[-1]["facts"]["near"] == "main memory in place of VRAM"
    with pytest.raises(BudgetError) as error:
        slider.choose(vram="1MiB")
    assert 12 <= slider.choose(vram=least(str(error.value)) + 9 * slider.plan.block).slots < 20
    assert slider.plan.far == 160 and dict(slider.told[-1]["plan"]["host"])["expert slots (host)"] > 0


def test_a_model_without_experts_has_a_plan_too(made):
    slider = made(packs.CASES["dense"], device="cpu", ram="64GiB")
    slider._snapshot("v")
    assert slider.plan.experts == 0 and slider.plan.near == slider.plan.fixed | {"expert slots": 0}
    assert "0 of 0 experts" in repr(slider) and "text/html" in slider._repr_mimebundle_()


# Without a browser


def test_without_a_browser_there_are_text_a_table_and_a_picture(slider):
    bundle = slider._repr_mimebundle_()
    assert bundle["text/plain"] == str(slider.plan) and bundle["image/png"][:4] == b"\x89PNG"
    assert f"{slider.plan.near['expert slots']}</td>" in bundle["text/html"] and "application/vnd" in str(bundle.keys())
    assert f"{slider.plan.slots:,} of 9,440 experts near" in repr(slider)
    with pytest.raises(BudgetError):
        slider.choose(vram="1GiB")
    bundle = slider._repr_mimebundle_()
    assert str(slider.plan) in bundle["text/plain"] and slider.error in bundle["text/plain"]
    assert "is the least that works" in bundle["text/html"]


def test_before_anything_fitted_it_says_what_would(made):
    slider = made("v2", vram="2GiB", ram="96GiB")
    assert slider.plan is None and "vram=" in slider.error and slider.error in repr(slider)
    assert "too little" in slider._repr_mimebundle_()["text/html"]
    slider._snapshot("v")
    assert slider.told[-1]["plan"] is None and slider.told[-1]["error"] == slider.error
    assert slider.choose(vram=least(slider.error)).slots == 6
