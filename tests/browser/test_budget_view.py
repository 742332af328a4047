"""The browser half of the budget slider, alone in a page: its sliders and the keyboard lead to the plan of `choose`."""

import pytest

from workbench.config import Config
from workbench.plan import Plan
from workbench.widgets.budget import BudgetSlider

pytestmark = pytest.mark.browser


@pytest.fixture
def view(opened):
    return opened(BudgetSlider("v2", vram="16GiB", ram="96GiB", cache="q6"))


def press(view, *keys):
    for key in keys:
        view.page.keyboard.press(key)
    view.settle()


def chosen(view, recipe="int4", **limits):
    """The plan that `choose` leads to, of a slider without a page."""
    limits = {"vram": "16GiB", "ram": "96GiB", "cache": "q6"} | limits
    fixed = {"device": "cuda", "process": view.widget.plan.process, "measured": view.widget.plan.measured}
    return Plan.make(Config.preset("v2"), recipe, **limits, **fixed)


def tiles(view):
    return view.page.locator(".wbm-tile").all_inner_texts()


def stack(view, name):
    """What a screen reader says of the bar, and the share of each part of it in pixels."""
    bar = view.page.get_by_role("region", name=name, exact=True).locator(".wbm-stack")
    widths = bar.locator("i").evaluate_all("(parts) => parts.map((part) => part.getBoundingClientRect().width)")
    return bar.get_attribute("aria-label"), [width / sum(widths) for width in widths]


@pytest.mark.parametrize(
    ("label", "keys", "choice"),
    [
        ("VRAM, GiB", ["ArrowRight", "ArrowRight", "ArrowLeft"], {"vram": "20GiB"}),
        ("Main memory, GiB", ["ArrowLeft", "ArrowLeft"], {"ram": "64GiB"}),
        ("Context, tokens", ["End"], {"context": 163_840}),
    ],
)
def test_arrow_keys_on_a_slider_lead_to_the_plan_of_choose(view, label, keys, choice):
    slider = view.page.get_by_role("slider", name=label, exact=True)
    slider.focus()
    press(view, *keys)
    assert view.widget.plan == chosen(view, **choice)
    plan = view.widget.plan
    assert f"{plan.slots:,} of 9,440, " in tiles(view)[0] and f"{plan.far:,} behind" in tiles(view)[0]
    said, (value,) = slider.get_attribute("aria-valuetext"), choice.values()
    assert said == (f"{value:,} tokens" if isinstance(value, int) else f"{value[:-3]} GiB")
    exactly = view.page.get_by_label(f"{label}, exactly").input_value()
    assert exactly == str(value).removesuffix("GiB")


def test_bars_and_tiles_are_the_plan(view):
    plan = view.widget.plan
    words, shares = stack(view, "VRAM")
    parts = {part: size for part, size in plan.near.items() if size}
    assert [one.rsplit(" ", 2)[0] for one in words.removeprefix("VRAM: ").split(", ")] == [*parts, "free"]
    free = plan.vram - sum(parts.values())
    assert shares == pytest.approx([size / plan.vram for size in (*parts.values(), free)], abs=0.003)
    words, shares = stack(view, "main memory")
    assert "expert slots (host)" in words
    assert shares[1] == pytest.approx(plan.host["expert slots (host)"] / plan.ram, abs=0.003)
    words, shares = stack(view, "disk")
    assert words.startswith("disk: residents ") and "free" not in words and sum(shares) == pytest.approx(1)
    room = plan.context_capacity()
    assert tiles(view)[2].startswith(f"{room['q6']:,}") and f"int4 {room['int4']:,}" in tiles(view)[2]


def test_what_does_not_fit_is_told_and_the_last_plan_is_left_pale(view):
    before = tiles(view)
    view.page.get_by_role("slider", name="VRAM, GiB", exact=True).focus()
    press(view, "Home")
    alert = view.page.get_by_role("alert")
    assert view.widget.error in alert.inner_text() and "is the least that works" in alert.inner_text()
    assert "last plan that fitted" in alert.inner_text() and tiles(view) == before
    pale = "() => Number(getComputedStyle(document.querySelector('.wbm-stack')).opacity)"
    assert view.page.evaluate(pale) < 1
    press(view, "End")
    assert not alert.is_visible() and view.page.evaluate(pale) == 1
    assert view.widget.plan.whole and tiles(view)[0].startswith("100 %")


def test_a_dragged_slider_asks_one_question_at_a_time_and_ends_where_it_was_left(view):
    view.page.get_by_role("slider", name="VRAM, GiB", exact=True).focus()
    for _ in range(4):
        view.page.keyboard.press("ArrowRight")
    assert len(view.sent("choose")) == 1
    view.settle()
    assert [message["vram"] >> 30 for message in view.sent("choose")] == [20, 32], "the first, and then the newest"
    assert view.widget.plan == chosen(view, vram="32GiB")


def test_formats_and_weights_are_chosen_and_exact_numbers_typed(view):
    view.page.get_by_label("Cache format").select_option("int8")
    view.settle()
    view.page.get_by_label("Weights").select_option("int3")
    view.settle()
    number = view.page.get_by_label("VRAM, GiB, exactly")
    number.fill("17.5")
    number.press("Enter")
    view.settle()
    assert view.widget.plan == chosen(view, "int3", vram=35 << 29, cache="int8")
    number.press("Tab")
    number.fill("-3")
    number.press("Tab")
    view.settle()
    assert number.input_value() == "17.5" and len(view.sent("choose")) == 3, "no size, no question"


def test_a_context_that_there_is_not_is_put_right(view):
    number = view.page.get_by_label("Context, tokens, exactly")
    for typed, context in (("1000000", 163_840), ("0", 163_840), ("12345", 12_345)):
        number.fill(typed)
        number.press("Tab")
        view.settle()
        assert view.widget.plan.context == context and number.input_value() == str(context)


def test_without_a_device_there_is_one_slider_of_memory_and_one_bar(opened):
    view = opened(BudgetSlider("pocket", device="cpu", ram="64GiB"))
    names = view.page.get_by_role("slider").evaluate_all("(all) => all.map((one) => one.labels[0].innerText)")
    assert names == ["Main memory, GiB", "Context, tokens"]
    assert view.page.locator(".wbm-part h4").all_inner_texts()[0].startswith("Main memory")
    assert len(view.page.locator(".wbm-part").all()) == 2 and "100 %" in tiles(view)[0]
    assert view.page.get_by_label("Context, tokens", exact=True).get_attribute("max") == "3"


def test_before_anything_fitted_there_is_only_what_would(opened):
    view = opened(BudgetSlider("v2", vram="2GiB", ram="96GiB"))
    alert = view.page.get_by_role("alert")
    assert alert.inner_text() == view.widget.error and not view.page.locator(".wbb-plan").is_visible()
    view.page.get_by_role("slider", name="VRAM, GiB", exact=True).focus()
    press(view, "End")
    assert view.page.locator(".wbb-plan").is_visible() and not alert.is_visible()
