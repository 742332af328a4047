"""The browser half of the chat, alone in a page: what it draws, what it tells the kernel, and that text stays text."""

from base64 import b64encode

import numpy as np
import pytest

from workbench.config import Config
from workbench.widgets.chat import HERE, ChatView
from workbench.widgets.tint import tint_facts

pytestmark = pytest.mark.browser

OPEN = """async ([source, style]) => {
  document.head.innerHTML = "";
  document.body.innerHTML = "";
  document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const widget = (await import(url)).default;
  const listeners = new Set();
  window.sent = [];
  window.listeners = listeners;
  window.tell = (message) => listeners.forEach((listener) => listener(message));
  const model = {
    on: (_, listener) => listeners.add(listener),
    off: (_, listener) => listeners.delete(listener),
    send: (message) => window.sent.push(message),
  };
  window.open_view = () => {
    const el = document.body.appendChild(document.createElement("div"));
    return widget.render({ model, el });
  };
  window.close_view = window.open_view();
}"""

FACTS = {"model": "pocket", "context": 2048, "cache_factor": 6.4} | tint_facts(Config.preset("pocket"))


@pytest.fixture
def view(page):
    page.goto("about:blank")
    page.evaluate(OPEN, [ChatView._esm, (HERE / "chat.css").read_text(encoding="utf-8")])
    return View(page)


class View:
    def __init__(self, page):
        self.page = page

    def tell(self, **message):
        self.page.evaluate("message => window.tell(message)", message)
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def sent(self, kind):
        return [message for message in self.page.evaluate("window.sent") if message["kind"] == kind]

    def reply(self, text, pieces=None, finish="eos", answering=None, changes=(), **stats):
        """A question and a reply, each piece of it a token, with `changes` to the numbers of one or the other."""
        steps = [
            step(number, piece, **dict(changes).get(number, {}))
            for number, piece in enumerate([text] if pieces is None else pieces)
        ]
        turns = [
            {"key": 1, "role": "user", "text": "question"},
            {"key": 2, "role": "assistant", "steps": steps, "finish": finish, "error": None, "stats": stats},
        ]
        self.tell(
            kind="path", view=None, fresh=True, facts=FACTS, turns=turns, answering=answering,
            path=[[1, 0, 1, None, None], [2, 1, 3, 7, 8]],
        )  # fmt: skip

    def tokens(self, *, by=None):
        """The token view, coloured by one of its numbers: its tokens, the end of the reply left out."""
        toggle = self.page.get_by_role("button", name="Tokens")
        if toggle.get_attribute("aria-pressed") == "false":
            toggle.click()
        if by:
            self.page.get_by_label("colour by").select_option(label=by)
        return self.page.locator(".wbc-token:not(.wbc-end)")

    def tints(self):
        """For each token of the token view its share of full tint; None where it was not measured."""
        read = """(tokens) => tokens.map((token) => token.classList.contains("wbc-unmeasured") ? null
                    : Number(token.style.getPropertyValue("--tint")))"""
        return self.page.locator(".wbc-token:not(.wbc-end)").evaluate_all(read)

    @property
    def legend(self):
        return self.page.locator(".wbc-ends").inner_text().split("\n")

    @property
    def body(self):
        return self.page.locator(".wbc-reply .wbc-body")


def step(token, text, **changes):
    chosen = {"model": 0.5, "sampled": 0.8, "entropy": 1.25, "by_hand": 0, "ms": 20.0, "cache": 2048} | changes
    alternatives = [[token, text, 0.5, 0.8], [900, " other", 0.25, 0.2], [901, " never", 0.1, 0.0]]
    return [
        token, text, chosen["model"], chosen["sampled"], chosen["entropy"], alternatives, chosen["by_hand"],
        chosen["ms"], chosen["cache"],
    ]  # fmt: skip


def readings(start, experts, margins, turn=2):
    """As tint.py packs them: experts [tokens, 5 layers of pocket], the narrowest margin in layer 3."""
    arrays = [np.array(experts, "<u1"), np.array(margins, "<f4"), np.full(len(margins), 2, "<u1")]
    packed = [b64encode(array.tobytes()).decode() for array in arrays]
    return {"turn": turn, "from": start} | dict(zip(("experts", "margins", "rows"), packed))


def test_a_new_view_asks_for_everything_until_it_comes(view):
    assert len(view.sent("ready")) == 1
    view.page.wait_for_function("window.sent.length >= 2")
    view.reply("", ["there"])
    asked = len(view.sent("ready"))
    view.page.wait_for_timeout(2500)
    assert len(view.sent("ready")) == asked


def test_news_about_a_path_that_is_not_known_are_asked_for_in_full(view):
    view.reply("", ["there"])
    view.tell(kind="path", view=None, fresh=False, facts=FACTS, turns=[], answering=None, path=[[9, 0, 1, None, None]])
    assert len(view.sent("ready")) == 2
    assert view.body.text_content() == "thereend"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain\nlines", "<p>plain\nlines</p>"),
        ("# Head\ntext", "<h1>Head</h1><p>text</p>"),
        ("**bold** and *it* and `a*b`", "<p><strong>bold</strong> and <em>it</em> and <code>a*b</code></p>"),
        ("2*3*4 = 24 and a_b_c", "<p>2*3*4 = 24 and a_b_c</p>"),
        ("open **bold", "<p>open **bold</p>"),
        ("- one\n- two\n  - deep\n- three", "<ul><li>one</li><li>two<ul><li>deep</li></ul></li><li>three</li></ul>"),
        ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("> said\n> twice", "<blockquote>said\ntwice</blockquote>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        (
            "|a|b|\n|-|-|\n|1|**2**|",
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><strong>2</strong></td></tr></table>",
        ),
        ("```py\nx < 1\n```", "<pre><code>x &lt; 1</code></pre>"),
        ("```\nnever closed", "<pre><code>never closed</code></pre>"),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("**<b>x</b>**", "<p><strong>&lt;b&gt;x&lt;/b&gt;</strong></p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
    ],
)
def test_markdown_is_drawn_and_html_is_not(view, text, html):
    view.reply(text)
    drawn = view.body.evaluate(
        """(body) => {
          const copy = body.cloneNode(true);
          copy.querySelectorAll(".wbc-tail, .wbc-blank, .wbc-code-bar").forEach((each) => each.remove());
          const frames = copy.querySelectorAll(".wbc-token, .wbc-code, .wbc-table");
          frames.forEach((each) => each.replaceWith(...each.childNodes));
          return copy.innerHTML;
        }"""
    )
    assert drawn == html


def test_a_growing_text_ends_up_as_if_drawn_at_once(view):
    text = "# T\n\npara *one*\nmore\n\n- a\n- **b**\n\n```\ncode\n\nmore\n```\n\n|a|b|\n|-|-|\n|1|2|\n\nend 专家"
    view.reply(text, list(text))
    whole = view.body.inner_html()
    view.reply("", [], finish=None, answering=2)
    for start in range(0, len(text), 3):
        steps = [step(start + n, piece) for n, piece in enumerate(text[start : start + 3])]
        view.tell(kind="steps", turn=2, **{"from": start}, steps=steps, stats={})
    view.tell(kind="done", turn=2, finish="eos", error=None, stats={})
    assert view.body.inner_html() == whole


def test_overlapping_steps_are_taken_once_and_a_gap_asks_again(view):
    view.reply("", ["a", "b"], finish=None, answering=2)
    view.tell(kind="steps", turn=2, **{"from": 1}, steps=[step(1, "b"), step(2, "c")], stats={})
    assert view.body.text_content() == "abc"
    view.tell(kind="steps", turn=2, **{"from": 9}, steps=[step(9, "z")], stats={})
    assert view.body.text_content() == "abc"
    assert len(view.sent("ready")) == 2


def test_enter_sends_shift_enter_does_not_and_stop_takes_the_place_of_send_at_once(view):
    box, button = view.page.locator(".wbc textarea"), view.page.locator(".wbc-go")
    assert button.is_disabled()
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert not view.sent("send")
    box.press("Enter")
    assert view.sent("send") == [{"kind": "send", "text": "one\ntwo"}]
    assert button.inner_text() == "Stop"
    box.press("Escape")
    assert len(view.sent("stop")) == 1


def test_enter_that_ends_a_composition_does_not_send(view):
    box = view.page.locator(".wbc textarea")
    box.fill("zhuanjia")
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    assert not view.sent("send")


def test_a_refused_message_comes_back_into_the_box(view):
    box = view.page.locator(".wbc textarea")
    box.fill("keep me")
    box.press("Enter")
    assert box.input_value() == ""
    view.tell(kind="notice", text="still answering", draft="keep me")
    assert box.input_value() == "keep me"
    assert view.page.get_by_role("alert").filter(has_text="still answering").is_visible()
    assert view.page.locator(".wbc-go").inner_text() == "Send"


def test_a_token_shows_its_alternatives_and_a_click_on_one_branches(view):
    view.reply("", ["The", " answer", "."])
    view.page.locator(".wbc-token", has_text="answer").hover()
    card = view.page.get_by_role("dialog", name="Alternatives")
    card.wait_for()
    assert "entropy 1.25 nats" in card.inner_text()
    rows = card.locator("button.wbc-row").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["␣answer", "✓", "50", "%", "80", "%"], ["␣other", "25", "%", "20", "%"], ["␣never", "10", "%", "cut"],
    ]  # fmt: skip
    card.get_by_role("button", name="never").click()
    assert view.sent("branch") == [{"kind": "branch", "turn": 2, "index": 1, "token": 901}]


def test_a_token_can_be_looked_into(view):
    view.reply("", ["The", " answer", "."])
    view.page.locator(".wbc-token", has_text="answer").hover()
    view.page.get_by_role("dialog").get_by_role("button", name="Look inside").click()
    assert view.sent("look") == [{"kind": "look", "turn": 2, "index": 1}]


def test_the_explorer_is_a_toggle_that_python_moves_too(view):
    view.reply("", ["The"])
    toggle = view.page.get_by_role("button", name="Experts")
    toggle.click()
    assert view.sent("explore") == [{"kind": "explore", "on": True}]
    view.tell(kind="exploring", on=False)
    assert toggle.get_attribute("aria-pressed") == "false"


def test_tokens_can_be_gone_through_with_the_keyboard(view):
    view.reply("", ["The", " answer", "."])
    view.body.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter", "ArrowDown", "Enter"):
        view.page.keyboard.press(key)
    assert view.sent("branch") == [{"kind": "branch", "turn": 2, "index": 1, "token": 901}]


def test_tokens_that_make_one_character_are_shown_together(view):
    view.reply("", ["", "", "专", "家"])
    view.page.locator(".wbc-token", has_text="专").hover()
    card = view.page.get_by_role("dialog")
    card.wait_for()
    assert "3 tokens make this text" in card.inner_text()
    assert card.locator("section").count() == 3


def test_no_branch_while_a_reply_is_generated(view):
    view.reply("", ["The", " answer"], finish=None, answering=2)
    view.page.locator(".wbc-token", has_text="answer").hover()
    view.page.get_by_role("dialog").wait_for()
    assert view.page.locator(".wbc-row:enabled").count() == 0


def test_the_token_view_shows_every_token_as_it_is_tinted_by_surprise(view):
    view.reply("", ["**a", "**", "\n\n", "<b>"], changes={1: {"model": 1.0}, 2: {"model": 0.0}})
    assert view.tokens().all_text_contents() == ["**a", "**", "\n\n", "<b>"]
    assert view.tints() == [0.5, 0, 1, 0.5]
    assert view.legend == ["1", "0", "under the model, before sampling"]


@pytest.mark.parametrize(
    ("by", "name", "values", "tints", "legend"),
    [
        ("entropy", "entropy", [0.0, 1.0, 2.0], [0, 0.5, 1], ["0 nats", "≥ 2 nats", "of the model's distribution"]),
        ("latency", "ms", [10.0, 25.0, 50.0], [0.2, 0.5, 1], ["0 ms", "≥ 50 ms", "of its step"]),
        ("cache", "cache", [1024, 2048, 3072], [0.333, 0.667, 1], ["0 B", "≥ 3.0 KiB", "held after it"]),
    ],
)
def test_tokens_are_tinted_by_the_number_that_is_chosen(view, by, name, values, tints, legend):
    pieces = [f" t{n}" for n in range(60)]
    view.reply("", pieces, changes={n: {name: value} for n, value in enumerate((values + 18 * [values[2]]) * 3)})
    view.tokens(by=by)
    assert view.tints()[:3] == tints
    assert view.legend == legend
    assert not view.sent("readings")


def test_what_was_not_measured_is_hatched_and_never_a_zero(view):
    by_hand = {"model": None, "ms": None, "cache": None, "entropy": None, "by_hand": 1}
    view.reply("", ["a", "b", "c"], changes={1: by_hand})
    view.tokens()
    for by in ("probability", "entropy", "latency", "cache"):
        view.tokens(by=by)
        shares = view.tints()
        assert shares[1] is None and None not in (shares[0], shares[2])
        assert view.legend[-1] == "not measured"
    view.page.locator(".wbc-token").nth(1).hover()
    card = view.page.get_by_role("dialog")
    card.wait_for()
    assert "put here by you" in card.inner_text() and "cache: not measured" in card.inner_text()


def test_a_reply_without_numbers_is_hatched_whole(view):
    nothing = {"ms": None, "cache": None}
    view.reply("", ["a", "b"], changes={0: nothing, 1: nothing})
    view.tokens(by="latency")
    assert view.tints() == [None, None]


def test_experts_have_the_hue_of_their_group_once_the_kernel_said_who_read_the_tokens(view):
    view.reply("", ["a", "b", "c"], finish=None, answering=2)
    tokens = view.tokens(by="expert, layer 3")
    (asked,) = view.sent("readings")
    assert asked["on"] and asked["view"] == view.sent("ready")[0]["view"]
    assert view.tints() == [None, None, None]
    view.tell(kind="readings", readings=[readings(0, [[0, 0, 5, 0, 0], [0, 0, 30, 0, 0]], [0.1, 0.2])])
    hues = tokens.evaluate_all("(tokens) => tokens.map((token) => token.style.getPropertyValue('--hue'))")
    assert hues == ["#e69f00", "#999999", ""] and view.tints()[2] is None
    news = [readings(2, [[0, 0, 31, 0, 0]], [0.3])]
    view.tell(kind="steps", turn=2, **{"from": 3}, steps=[step(3, "d")], stats={}, readings=news)
    hues = tokens.evaluate_all("(tokens) => tokens.map((token) => token.style.getPropertyValue('--hue'))")
    assert hues == ["#e69f00", "#999999", "#999999", ""], "a token is read by the pass after it"
    assert view.legend[:2] == ["0–3", "4–7"] and view.legend[-1] == "not measured"
    tokens.nth(1).hover()
    card = view.page.get_by_role("dialog")
    card.wait_for()
    assert "layer 3: expert 30, of group 7" in card.inner_text()
    assert "latency 20 ms · cache 2.0 KiB" in card.inner_text()


def test_margins_are_the_narrowest_and_what_was_forced_is_tinted_in_full(view):
    view.reply("", [f" t{n}" for n in range(21)])
    view.tokens(by="margin")
    view.tell(kind="readings", readings=[readings(0, [[0] * 5] * 20, [0.03, 0.0075, -0.5] + 17 * [0.03])])
    assert view.tints() == [0, pytest.approx(0.5, abs=0.01), 1] + 17 * [0] + [None]
    assert view.legend == ["≥ 0.03", "0", "narrowest of 5 layers, square root", "not measured"]
    view.page.locator(".wbc-token").nth(1).hover()
    view.page.get_by_role("dialog").wait_for()
    assert "margin 0.007 in layer 3, the narrowest" in view.page.get_by_role("dialog").inner_text()


def test_the_kernel_is_asked_for_readings_only_while_they_are_shown(view):
    view.reply("", ["a", "b"])
    view.tokens(by="margin")
    view.tokens(by="expert, layer 1")
    view.tokens(by="entropy")
    view.tokens(by="margin")
    view.page.get_by_role("button", name="Tokens").click()
    assert [message["on"] for message in view.sent("readings")] == [True, False, True, False]


def test_readings_that_leave_a_gap_or_were_forgotten_are_asked_for_again(view):
    view.reply("", ["a", "b"])
    view.tokens(by="margin")
    view.tell(kind="readings", readings=[readings(1, [[0] * 5], [0.1])])
    assert len(view.sent("readings")) == 2 and view.tints() == [None, None]
    view.reply("", ["a", "b"])
    assert [message["on"] for message in view.sent("readings")] == [True, True, True]


def test_a_model_without_experts_offers_no_colours_of_them(view):
    view.tell(
        kind="path", view=None, fresh=True, facts=FACTS | {"layers": [], "experts": 0}, turns=[], answering=None,
        path=[], readings=[],
    )  # fmt: skip
    options = view.page.get_by_label("colour by").locator("option").all_text_contents()
    assert options == ["probability", "entropy", "latency", "cache"]


def test_with_the_explorer_open_a_click_or_enter_on_a_token_moves_it(view):
    view.reply("", ["The", " answer", "."])
    view.tell(kind="exploring", on=True)
    token = view.page.locator(".wbc-token", has_text="answer")
    token.click()
    assert view.sent("look") == [{"kind": "look", "turn": 2, "index": 1}]
    assert token.get_attribute("aria-current") == "true"
    view.page.get_by_role("dialog").wait_for()
    view.body.focus()
    view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("Enter")
    assert view.sent("look")[1:] == [{"kind": "look", "turn": 2, "index": 2}]
    view.page.keyboard.press("Enter")
    assert len(view.sent("look")) == 2, "entered once more, its alternatives are opened"
    assert view.page.evaluate("document.activeElement.closest('.wbc-card') !== null")


def test_with_the_explorer_closed_a_click_opens_the_card_alone(view):
    view.reply("", ["The", " answer", "."])
    view.page.locator(".wbc-token", has_text="answer").click()
    view.page.get_by_role("dialog").wait_for()
    assert not view.sent("look")


def test_the_token_that_the_explorer_looks_at_is_marked_in_text_and_tokens(view):
    view.reply("", ["The", " answer", "."], finish=None, answering=2)
    marked = view.page.locator(".wbc-looked")
    view.tell(kind="looked", turn=2, index=1)
    assert marked.all_text_contents() == [" answer"]
    view.tell(kind="steps", turn=2, **{"from": 3}, steps=[step(3, " More")], stats={}, readings=[])
    assert marked.all_text_contents() == [" answer"]
    view.tokens()
    assert marked.all_text_contents() == [" answer"]
    view.tell(kind="done", turn=2, finish="eos", error=None, stats={})
    view.tell(kind="looked", turn=2, index=3)
    assert marked.all_text_contents() == [" More"] and marked.get_attribute("aria-current") == "true"
    view.tell(kind="looked", turn=None, index=None)
    assert marked.count() == 0 and view.page.locator("[aria-current]").count() == 0


def test_a_token_out_of_sight_is_scrolled_to_in_the_conversation(view):
    view.reply("", [f"line {n}\n\n" for n in range(60)])
    view.tell(kind="looked", turn=2, index=2)
    log, token = view.page.locator(".wbc-log").bounding_box(), view.page.locator(".wbc-looked").bounding_box()
    assert log["y"] <= token["y"] <= log["y"] + log["height"]


def test_figures_say_speed_prefill_cache_context_and_why_it_ended(view):
    stats = {
        "prompt_tokens": 120, "reused_tokens": 96, "prefill_seconds": 0.04, "tokens": 41, "tokens_per_second": 38.2,
        "cache_bytes": 34816, "seed": 7,
    }  # fmt: skip
    view.reply("", ["x"], finish="length", **stats)
    figures = view.page.locator(".wbc-figures").inner_text()
    assert figures == (
        "41 tokens · 38.2 tokens/s · prompt of 120 tokens, 96 of them from the cache, read in 0.04 s"
        " · reached the token limit · seed 7"
    )
    status = view.page.locator(".wbc-status").inner_text()
    assert "context 161 of 2,048 tokens" in status
    assert "cache 34.0 KiB, 84 % less than MHA with the same heads" in status
    assert "218 KiB" in view.page.locator(".wbc-cache").get_attribute("title")


def test_a_cache_that_was_converted_since_is_told_as_it_is_now(view):
    converted = FACTS | {"cache_format": "q6", "cache_factor": 15.06, "cache_held": [161, 14586]}
    view.reply("", ["x"], prompt_tokens=120, tokens=41, cache_bytes=34816)
    view.tell(kind="path", view=None, fresh=False, facts=converted, turns=[], answering=None,
              path=[[1, 0, 1, None, None], [2, 1, 3, 7, 8]])  # fmt: skip
    status = view.page.locator(".wbc-cache")
    assert status.inner_text() == "cache 14.2 KiB in q6, 93 % less than MHA with the same heads"
    assert "in bf16" in status.get_attribute("title")
    view.reply("", ["x"], prompt_tokens=120, tokens=60, cache_bytes=20000)
    assert status.inner_text().startswith("cache 19.5 KiB in q6"), "the figures of a later reply count again"


def test_experts_and_memory_open_by_themselves(view):
    buttons = [view.page.get_by_role("button", name=name, exact=True) for name in ("Experts", "Memory")]
    buttons[1].click()
    assert view.sent("explore") == [{"kind": "explore", "of": "memory", "on": True}]
    view.tell(kind="exploring", on=True)
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["true", "true"]
    view.tell(kind="exploring", of="memory", on=False)
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["true", "false"]


def test_versions_have_arrows_that_work_unless_a_reply_is_generated(view):
    view.reply("", ["x"])
    versions = view.page.locator(".wbc-reply .wbc-versions")
    assert versions.inner_text() == "2/3"
    versions.get_by_role("button", name="Previous").click()
    versions.get_by_role("button", name="Next").click()
    assert [message["turn"] for message in view.sent("select")] == [7, 8]
    view.reply("", ["x"], finish=None, answering=2)
    assert versions.get_by_role("button", name="Previous").is_disabled()


def test_buttons_of_a_message_tell_the_kernel(view):
    view.reply("", ["x"], finish="stopped")
    view.page.get_by_role("button", name="Regenerate").click()
    view.page.get_by_role("button", name="Continue").click()
    assert view.sent("regenerate") == [{"kind": "regenerate", "turn": 2}]
    assert view.sent("continue") == [{"kind": "continue", "turn": 2}]
    view.page.get_by_role("button", name="Edit").click()
    area = view.page.get_by_label("Edit your message")
    assert area.input_value() == "question"
    area.fill("better question")
    area.press("Enter")
    assert view.sent("edit") == [{"kind": "edit", "turn": 1, "text": "better question"}]
    assert not view.sent("send")


def test_a_reply_that_failed_says_why(view):
    view.reply("", ["x"], finish=None, answering=2)
    view.tell(kind="done", turn=2, finish="error", error="the prompt has 3000 tokens", stats={})
    assert view.page.get_by_role("alert").filter(has_text="3000 tokens").is_visible()
    assert view.page.get_by_role("button", name="Continue").is_visible()


def test_scrolling_up_is_not_undone_by_new_text(view):
    view.reply("", [f"line {n}\n\n" for n in range(60)], finish=None, answering=2)
    log = view.page.locator(".wbc-log")
    assert log.evaluate("(log) => log.scrollTop + log.clientHeight > log.scrollHeight - 5")
    log.evaluate("(log) => { log.scrollTop = 100; }")
    view.page.get_by_role("button", name="latest").wait_for()
    view.tell(kind="steps", turn=2, **{"from": 60}, steps=[step(60, "more\n\n")], stats={})
    assert log.evaluate("(log) => log.scrollTop") == 100
    view.page.get_by_role("button", name="latest").click()
    assert log.evaluate("(log) => log.scrollTop + log.clientHeight > log.scrollHeight - 5")


def test_the_log_is_announced_when_a_reply_is_complete(view):
    view.reply("", ["x"], finish=None, answering=2)
    log = view.page.get_by_role("log")
    assert (log.get_attribute("aria-live"), log.get_attribute("aria-busy")) == ("polite", "true")
    view.tell(kind="done", turn=2, finish="eos", error=None, stats={})
    assert log.get_attribute("aria-busy") == "false"
    unnamed = (
        "(root) => [...root.querySelectorAll('button')].filter((b) => !(b.ariaLabel || b.textContent).trim()).length"
    )
    assert view.page.locator(".wbc").evaluate(unnamed) == 0


def test_two_views_of_one_panel_show_the_same_and_a_closed_one_stops_listening(view):
    view.page.evaluate("() => { window.close_second = window.open_view(); }")
    view.reply("", ["shared"])
    assert view.page.locator(".wbc-reply .wbc-body").all_text_contents() == ["sharedend", "sharedend"]
    view.page.evaluate("() => { window.close_second(); }")
    assert view.page.evaluate("window.listeners.size") == 1


def test_a_superseded_panel_can_be_read_but_not_used(view):
    view.reply("", ["kept"])
    view.tell(kind="closed", text="This panel was closed, because a newer one took its place.")
    assert "kept" in view.body.text_content()
    assert view.page.get_by_role("alert").filter(has_text="newer one").is_visible()
    assert view.page.locator(".wbc textarea").is_disabled()
    assert view.page.get_by_role("button", name="Regenerate").is_disabled()


def test_the_prompt_view_shows_special_tokens_and_roles(view):
    view.reply("", ["x"])
    view.page.get_by_role("button", name="Prompt").click()
    assert len(view.sent("prompt")) == 1
    parts = [["template", "<bos>", True], ["user", "<i>hi</i>", False], ["template", "<eos>", True]]
    view.tell(kind="prompt", parts=parts, tokens=9)
    region = view.page.get_by_role("region", name="Prompt")
    assert region.locator("pre").inner_text() == "<bos><i>hi</i><eos>"
    assert region.locator("pre .wbc-special").all_inner_texts() == ["<bos>", "<eos>"]


def test_export_becomes_a_download(view):
    view.reply("", ["x"])
    view.page.get_by_role("button", name="Export").click()
    assert len(view.sent("export")) == 1
    with view.page.expect_download() as download:
        view.tell(kind="export", name="conversation-pocket.json", text='{"a": 1}')
    assert download.value.suggested_filename == "conversation-pocket.json"
    assert download.value.path().read_text() == '{"a": 1}'


def test_import_sends_the_text_of_the_file(view, tmp_path):
    (tmp_path / "chat.json").write_text('{"专": 1}', encoding="utf-8")
    view.page.locator("input[type=file]").set_input_files(tmp_path / "chat.json")
    view.page.wait_for_function("window.sent.some((message) => message.kind === 'import')")
    assert view.sent("import") == [{"kind": "import", "text": '{"专": 1}'}]
