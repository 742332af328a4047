"""The browser half of the memory widgets, alone in a page: what they draw, what they ask for, and the keyboard."""

import pytest

import workbench as wb
from workbench.meter import Meter
from workbench.timeline import Sampler
from workbench.widgets.cachemeter import CacheMeter
from workbench.widgets.timeline import MemoryTimeline
from workbench.widgets.whatif import WhatIf

pytestmark = pytest.mark.browser


@pytest.fixture
def bench():
    return wb.load("pocket", cache="bf16")


@pytest.fixture
def sampler(bench):
    """One that does not run by itself: a page shows what the test made."""
    return Sampler(Meter(bench))


def say(bench, text="What is an expert?", tokens=30):
    return bench.generate(text, wb.Sampling(temperature=0, max_tokens=tokens))


def tiles(view):
    return view.page.locator(".wbm-tile > b").all_inner_texts()


def bars(view):
    """{scheme: (bytes as text, share of the axis)}"""
    read = """(rows) => rows.map((row) => {
      const [bar, axis] = [row.querySelector(".wbm-bar"), row.cells[1]].map((e) => e.getBoundingClientRect().width);
      return [row.cells[0].innerText, row.cells[2].innerText, bar / axis];
    })"""
    return {name: (said, width) for name, said, width in view.page.locator(".wbm-bars tbody tr").evaluate_all(read)}


# Cache meter


def test_bytes_are_drawn_as_they_are_held(opened, bench, sampler):
    say(bench)
    view, held = opened(CacheMeter(bench, sampler)), measured(bench)
    assert tiles(view) == [f"{held.tokens * 960:,} B", f"{held.nbytes:,} B", "84.4 % less"]
    drawn = bars(view)
    assert drawn["MHA (bf16)"][0] == f"{held.tokens * 6144 / 1000:.0f} KB" and len(drawn) == 8
    widths = [drawn[name][1] for name in ("expanded (bf16)", "MHA (bf16)", "this cache, bf16", "MQA (bf16)")]
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    tank = view.page.locator(".wbm-columns[role=img]").get_attribute("aria-label")
    assert tank.startswith("6 layers. Layer 0 holds ") and f"latent {held.tokens * 128:,} B" in tank


def measured(bench):
    return CacheMeter(bench, Sampler(Meter(bench))).held


def test_it_grows_with_the_conversation(opened, bench, sampler):
    widget = CacheMeter(bench, sampler)
    view = opened(widget)
    assert tiles(view)[0] == "0 B" and "Nothing is cached yet" in view.page.locator(".wbm-head").inner_text()
    for text in ("What is an expert?", "What is an expert? Tell me much more of it."):
        say(bench, text)
        widget.refresh()
        assert tiles(view)[0] == f"{bench.engine.cache.lengths[0] * 960:,} B"


def test_a_switch_is_one_press_of_a_key_and_says_what_it_cost(opened, bench, sampler):
    say(bench)
    before = bench.engine.cache.nbytes
    view = opened(CacheMeter(bench, sampler))
    button = view.page.get_by_role("button", name="Switch the cache to q6")
    button.focus()
    view.page.keyboard.press("Enter")
    assert button.is_disabled(), "until it is done"
    view.settle()
    after = bench.engine.cache.nbytes
    assert view.sent("switch") == [{"kind": "switch", "format": "q6", "view": view.sent("ready")[0]["view"]}]
    cost = view.page.get_by_role("region", name="What the last switch did").inner_text()
    assert f"{before:,} B → {after:,} B" in cost and "bf16 → q6" in cost and "latent" in cost
    assert tiles(view)[1:] == [f"{after:,} B", "93.4 % less"]
    assert view.page.locator(".wbm-losses .wbm-column").count() == 6
    assert view.page.locator(".wbm-used th").inner_text() == "q6"
    assert f"{after:,} B" in view.page.locator("[role=status]").first.inner_text()


def test_a_refused_switch_is_told_and_can_be_tried_again(opened, bench, sampler):
    refuse = [True]

    def convert(format):
        if refuse:
            raise wb.RequestError("still answering: stop() this one first.")
        return bench.engine.convert_cache(format)

    view = opened(CacheMeter(bench, sampler, convert))
    button = view.page.get_by_role("button", name="Switch the cache to int8")
    button.click()
    view.settle()
    assert "still answering" in view.page.get_by_role("alert").inner_text() and button.is_enabled()
    refuse.clear()
    button.click()
    view.settle()
    assert not view.page.get_by_role("alert").is_visible() and bench.engine.cache_format == "int8"


def test_recent_tokens_are_kept_wide_where_a_format_is_packed(opened, bench, sampler):
    view = opened(CacheMeter(bench, sampler))
    view.page.get_by_label("Recent tokens kept in bf16").select_option("+128")
    names = view.page.locator(".wbm-formats tbody th").all_inner_texts()
    assert names[:2] == ["fp32", "bf16"] and names[4] == "q6+128"
    view.page.get_by_role("button", name="Switch the cache to q6+128").click()
    view.settle()
    assert bench.engine.cache_format == "q6+128"
    assert "no rows to convert" in view.page.get_by_role("region", name="What the last switch did").inner_text()


def test_the_baseline_is_chosen_and_always_named(opened, bench, sampler):
    widget = CacheMeter(bench, sampler)
    view = opened(widget)
    view.page.get_by_label("Baseline of the ratio").select_option("DeepSeek-67B (GQA, bf16)")
    view.settle()
    assert widget.baseline == "DeepSeek-67B (GQA, bf16)" and tiles(view)[2] == "99.8 % less"
    assert "another model" in view.page.locator(".wbm-tile option:checked").inner_text()
    widget.baseline = "MQA (bf16)"
    assert tiles(view)[2] == "25.0 % more"


# Timeline


def test_the_areas_are_walked_by_keys_and_read_out(opened, bench, sampler):
    cache = bench.new_cache()
    for _ in range(6):
        cache.reserve(40)
        cache.advance(40)
        sampler.sample()
    view = opened(MemoryTimeline(sampler))
    chart, said = view.page.get_by_role("slider", name="Memory over time"), view.page.locator(".wbm-readout")
    assert said.inner_text() == f"Now, 240 tokens cached: {cache.nbytes:,} B in all"
    chart.focus()
    view.page.keyboard.press("Home")
    assert "40 tokens cached: 61,440 B in all" in said.inner_text()
    view.page.keyboard.press("ArrowRight")
    assert "80 tokens cached" in chart.get_attribute("aria-valuetext")
    view.page.keyboard.press("Escape")
    assert said.inner_text().startswith("Now")
    assert view.page.locator(".wbm-mark-block").count() == 3


def test_the_timeline_shows_the_cache_all_of_ours_or_the_process_over_time_or_tokens(opened, bench, sampler):
    cache = bench.new_cache()
    for tokens in (100, 100, 50):
        cache.reserve(tokens)
        cache.advance(tokens)
        sampler.sample()
    view = opened(MemoryTimeline(sampler))
    keys = view.page.locator(".wbm-keys").first
    assert "rows that hold a token 240 KB" in keys.inner_text()
    view.page.get_by_role("button", name="All we allocated").click()
    view.settle()
    assert "routed experts 23.6 MB" in keys.inner_text()
    view.page.get_by_role("button", name="The process").click()
    view.settle()
    assert f"{sampler.readings[-1].process['rss']:,} B" in view.page.locator(".wbm-readout").inner_text()
    view.page.get_by_role("button", name="tokens", exact=True).click()
    view.settle()
    assert view.page.get_by_role("button", name="tokens", exact=True).get_attribute("aria-pressed") == "true"
    assert view.page.locator(".wbm-areas").get_by_text("tokens cached").count() == 1


def test_news_are_added_and_a_switch_is_marked(opened, bench, sampler):
    sampler.sample()
    widget = MemoryTimeline(sampler)
    view = opened(widget)
    say(bench)
    sampler.sample()
    bench.engine.convert_cache("q6")
    sampler.sample()
    widget.refresh()
    view.settle()
    assert view.page.locator(".wbm-said-format").text_content() == "bf16 to q6"


# What-if


def test_what_if_is_asked_by_its_controls_and_answers_exactly(opened):
    widget = WhatIf()
    view = opened(widget)
    assert (
        tiles(view)[0] == "3.43 GB" and "93.3% less than DeepSeek-67B" in view.page.locator(".wbm-tiles").inner_text()
    )
    view.page.get_by_label("Cache format").select_option("bf16")
    view.settle()
    assert view.page.locator(".wbm-tile > b").first.get_attribute("title") == "9,059,696,640 B"
    view.page.get_by_label("Model").select_option("v2-lite")
    view.settle()
    number = view.page.get_by_label("Batch, sequences at once, exactly")
    number.fill("3")
    number.press("Tab")
    view.settle()
    assert widget.footprint.batch == 3 and tiles(view)[0] == "12.2 GB"
    assert "routed experts" in view.page.locator(".wbm-parts").inner_text()


def test_a_dragged_slider_asks_one_question_at_a_time(opened):
    widget = WhatIf(model="pocket", context=64)
    view = opened(widget)
    slider = view.page.get_by_label("Context, tokens of each sequence", exact=True)
    slider.focus()
    for _ in range(4):
        view.page.keyboard.press("ArrowRight")
    assert len(view.sent("choose")) == 1
    view.settle()
    assert widget.footprint.tokens == 1024 and len(view.sent("choose")) == 2, "the first, and then the newest"


def test_a_wrong_number_is_refused_with_a_word_and_the_rest_stays(opened):
    widget = WhatIf()
    view = opened(widget)
    number = view.page.get_by_label("Context, tokens of each sequence, exactly")
    number.fill("999999")
    number.press("Enter")
    view.settle()
    assert "context of 163,840" in view.page.get_by_role("alert").inner_text()
    assert widget.footprint.tokens == 131_072
