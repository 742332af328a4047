"""The browser half of the routing scope and the token strip: what they draw and select, and that text stays text.

The kernel half is the real one: what it tells is carried into the page, and what the page says back to it. The routing
is random, for layout only.
"""

import base64

import numpy as np
import pytest

from workbench.widgets.geometry import Geometry
from workbench.widgets.scope import RoutingScope
from workbench.widgets.tokens import TokenStrip
from workbench.widgets.view import View

pytestmark = pytest.mark.browser

SIZES = {
    "pocket": Geometry(tuple(range(1, 6)), 32, 4, 8, 3),
    "v2-lite": Geometry(tuple(range(1, 27)), 64, 6),
    "v2": Geometry(tuple(range(1, 60)), 160, 6, 8, 3),
}
TRAITS = ("token", "layer", "expert", "mode", "by", "colour_by", "slot")

OPEN = """async ([source, style, state]) => {
  document.head.innerHTML = "";
  document.body.innerHTML = "";
  document.head.append(Object.assign(document.createElement("style"), { textContent: style }));
  const widget = (await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))).default;
  const listeners = {};
  const fire = (name, ...what) => (listeners[name] ?? []).forEach((listener) => listener(...what));
  window.sent = [];
  window.listeners = listeners;
  window.model = {
    get: (name) => state[name],
    set: (name, value) => {
      if (state[name] === value) return;
      state[name] = value;
      window.sent.push({ kind: "set", name, value });
      fire(`change:${name}`);
    },
    save_changes: () => {},
    on: (name, listener) => (listeners[name] ??= new Set()).add(listener),
    off: (name, listener) => listeners[name]?.delete(listener),
    send: (message) => window.sent.push(message),
  };
  window.update = (name, value) => {
    state[name] = value;
    fire(`change:${name}`);
  };
  const view = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  window.tell = (message, buffers) => fire("msg:custom", message, buffers.map(view));
  window.open_view = () => {
    const el = document.body.appendChild(document.createElement("div"));
    return widget.render({ model: window.model, el });
  };
  window.close_view = window.open_view();
}"""


class Shown:
    """A widget in a page. `carry()` takes messages over in both directions until there are no more."""

    def __init__(self, page, widget):
        self.page, self.widget, self.told, self.asked = page, widget, [], []
        widget._tell = lambda message, buffers=(): self.told.append((message, list(buffers)))
        widget.observe(
            lambda change: page.evaluate(
                "([name, value]) => window.update(name, value)", [change["name"], change["new"]]
            ),
            [name for name in TRAITS if widget.has_trait(name)],
        )
        state = {name: getattr(widget, name) for name in TRAITS if widget.has_trait(name)}
        page.goto("about:blank")
        page.evaluate(OPEN, [widget._esm, widget._css, state])
        self.carry()

    def carry(self, wait=0):
        self.page.wait_for_timeout(wait)
        for _ in range(5):
            for message in self.page.evaluate("() => { const sent = window.sent; window.sent = []; return sent; }"):
                self.asked.append(message)
                if message["kind"] == "set":
                    setattr(self.widget, message["name"], message["value"])
                else:
                    self.widget._hear(self.widget, message, [])
            told, self.told[:] = list(self.told), []
            for message, buffers in told:
                packed = [base64.b64encode(buffer).decode() for buffer in buffers]
                self.page.evaluate("([message, buffers]) => window.tell(message, buffers)", [message, packed])
            self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def heard(self, kind):
        return [message for message in self.asked if message["kind"] == kind]

    @property
    def readout(self):
        return self.page.locator(".wbr-readout").inner_text()

    @property
    def grid(self):
        return self.page.locator(".wbr-grid")

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
            self.carry()


def routing(geometry, tokens, seed=0):
    """Random experts, gates, margins [tokens, layers, k], with the limit on groups."""
    rng = np.random.default_rng(seed)
    shape = tokens, len(geometry.layers), geometry.k
    scores = rng.dirichlet(np.full(geometry.n_experts, 0.3), shape[:2]).astype(np.float32)
    if geometry.topk_group:
        groups = scores.reshape(*shape[:2], geometry.n_group, -1)
        best = groups.max(-1)
        groups *= (best >= np.sort(best, -1)[..., -geometry.topk_group, None])[..., None]
    order = np.argsort(-scores, -1, kind="stable")
    chosen = order[..., : geometry.k]
    gates = np.take_along_axis(scores, chosen, -1)
    left_out = np.take_along_axis(scores, order[..., geometry.k : geometry.k + 1], -1)
    return chosen.astype(np.int16), gates, gates - left_out


def scope(page, name="pocket", tokens=12, pieces=None):
    widget = RoutingScope(geometry=SIZES[name], label=name)
    widget.push(0, pieces or [f" w{n}" for n in range(tokens)], *routing(SIZES[name], tokens))
    return Shown(page, widget)


def colours(shown):
    """How many different colours the canvas shows."""
    return shown.page.locator("canvas").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )


def cell(shown, row, expert):
    """The middle of a cell on the page, as the grid itself lays cells out."""
    geometry = shown.widget.geometry
    frame = shown.page.locator("canvas").bounding_box()
    size, gap = geometry.n_experts / geometry.n_group, 6 if geometry.n_group > 1 else 0
    side = min(26, int((frame["width"] - 62 - 104 - gap * (geometry.n_group - 1)) / geometry.n_experts))
    x = 62 + expert * side + int(expert // size) * gap + side / 2
    y = 34 + row * (min(24, max(9, side)) + (4 if len(geometry.layers) <= 12 else 0)) + 8
    return frame["x"] + x, frame["y"] + y


# The scope


def test_a_view_asks_until_it_is_told_and_then_no_more(page):
    widget = RoutingScope(geometry=SIZES["pocket"])
    shown = Shown(page, widget)
    widget._snapshot = lambda view=None: None  # a kernel that does not answer
    page.evaluate("() => { window.close_view(); window.close_view = window.open_view(); }")
    page.wait_for_function("window.sent.filter((message) => message.kind === 'ready').length >= 2")
    del widget._snapshot
    shown.carry()
    page.wait_for_timeout(2500)
    assert not page.evaluate("window.sent.some((message) => message.kind === 'ready')")
    assert "waiting" not in page.locator(".wbr-note").first.inner_text()


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_drawn_and_fits_or_scrolls(page, name):
    shown = scope(page, name)
    assert colours(shown) > 20
    for width in (1200, 460):
        page.set_viewport_size({"width": width, "height": 800})
        shown.carry(100)
        inside = shown.grid.evaluate("(grid) => grid.scrollWidth - grid.clientWidth")
        canvas, frame = page.locator("canvas").bounding_box(), page.locator(".wbr").bounding_box()
        assert canvas["width"] <= frame["width"] <= width and colours(shown) > 20
        assert (inside > 0) == (width == 460 and name == "v2")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_the_readout_has_the_exact_numbers_of_the_shown_token(page):
    shown = scope(page)
    shown.carry(300)
    assert shown.heard("exact")[-1]["token"] == 11
    table = shown.widget.table(11).query("layer == 1")
    for expert, gate in zip(table["expert"], table["gate"]):
        if gate >= 0.1:
            assert f"{expert} ({gate:.3f})" in shown.readout
    assert shown.readout.startswith("token 11 '␣w11': layer 1 chose ")


def test_arrows_go_through_tokens_and_layers_and_enter_selects(page):
    shown = scope(page)
    shown.grid.focus()
    shown.press("ArrowLeft", "ArrowLeft", "ArrowDown", "ArrowDown")
    assert shown.widget.selection.token == 9 and shown.widget.selection.layer == -1
    assert "layer 3 chose" in shown.readout
    chosen = shown.widget.table(9).query("layer == 3")["expert"].tolist()
    shown.press("Enter")
    assert (shown.widget.selection.layer, shown.widget.selection.expert) == (3, chosen[0])
    shown.press("Enter")
    assert shown.widget.selection.expert == chosen[1]
    shown.press("Home")
    assert shown.widget.selection.token == 0
    shown.press("End", "Escape")
    assert (shown.widget.selection.token, shown.widget.selection.layer, shown.widget.selection.expert) == (11, -1, -1)


def test_in_the_whole_answer_arrows_go_through_experts(page):
    shown = scope(page)
    page.get_by_role("button", name="Whole answer").click()
    shown.carry()
    assert shown.widget.mode == "answer"
    shown.grid.focus()
    shown.press("ArrowDown", "ArrowRight", "ArrowRight", "Enter")
    assert (shown.widget.selection.layer, shown.widget.selection.expert) == (2, 2)
    counts = shown.widget.heat().loc[2]
    assert f"{counts.idxmax()} ({counts.max():.0f} token" in shown.readout
    assert f"{(counts == 0).sum()} of 32 never chosen" in shown.readout
    page.get_by_role("button", name="by gate").click()
    shown.carry()
    assert shown.widget.by == "gate"


def test_a_click_selects_a_cell_and_a_second_one_lets_it_go(page):
    shown = scope(page)
    page.mouse.click(*cell(shown, 2, 17))
    shown.carry()
    assert (shown.widget.selection.layer, shown.widget.selection.expert) == (3, 17)
    page.mouse.click(*cell(shown, 2, 17))
    shown.carry()
    assert (shown.widget.selection.layer, shown.widget.selection.expert) == (-1, -1)


def test_hovering_says_gate_rank_and_count(page):
    shown = scope(page)
    shown.carry(300)
    best = shown.widget.table(11).query("layer == 2").iloc[0]
    page.mouse.move(*cell(shown, 1, int(best["expert"])))
    shown.carry()
    tip = page.locator(".wbr-tip").inner_text()
    count = int(shown.widget.heat().loc[2, best["expert"]])
    assert f"layer 2, expert {best['expert']:.0f}, group" in tip and f"rank 1, gate {best['gate']:.3f}" in tip
    assert f"chosen by {count} token" in tip and "of 12" in tip


def test_live_follows_the_newest_token_until_the_reader_goes_back(page):
    shown = scope(page, tokens=4)
    live = page.get_by_role("button", name="Live")
    experts, gates, margins = routing(SIZES["pocket"], 3, seed=1)
    shown.widget.push(4, [" new"], experts[:1], gates[:1], margins[:1])
    shown.carry()
    assert shown.readout.startswith("token 4 '␣new'") and live.get_attribute("aria-pressed") == "true"
    page.get_by_label("Token", exact=True).press("ArrowLeft")
    shown.carry()
    shown.widget.push(5, [" more", " still"], experts[1:], gates[1:], margins[1:])
    shown.carry()
    assert shown.readout.startswith("token 3 ") and live.get_attribute("aria-pressed") == "false"
    assert page.locator(".wbr-place").inner_text() == "token 3 of 7"
    live.click()
    shown.carry()
    assert shown.readout.startswith("token 6 '␣still'") and shown.widget.selection.token == -1


def test_a_gap_is_asked_for_in_full_and_what_was_taken_back_is_gone(page):
    shown = scope(page, tokens=4)
    experts, gates, margins = routing(SIZES["pocket"], 6, seed=1)
    shown.widget.push(4, [" lost"], experts[:1], gates[:1], margins[:1])
    shown.told.clear()
    shown.widget.push(5, [" x"], experts[1:2], gates[1:2], margins[1:2])
    shown.carry()
    assert len(shown.heard("ready")) == 2 and page.locator(".wbr-place").inner_text() == "token 5 of 6"
    shown.widget.push(1, [" other"], experts[2:3], gates[2:3], margins[2:3])
    shown.widget.mode = "answer"
    shown.carry()
    assert page.locator(".wbr-place").inner_text() == "token 1 of 2"
    counts = shown.widget.heat().loc[1]
    assert f"{(counts == 0).sum()} of 32 never chosen" in shown.readout


def test_markup_in_tokens_and_names_stays_text(page):
    shown = scope(page, tokens=2, pieces=["<img src=x onerror=alert(1)>", "<b>bold</b>\n"])
    shown.widget.label = "owner/<i>model"
    shown.widget._snapshot()
    shown.carry()
    assert page.locator(".wbr img, .wbr .wbr-text b b, .wbr .wbr-title i").count() == 0
    assert "<b>bold</b>↵" in page.locator(".wbr-now").inner_text()
    assert page.locator(".wbr-title").inner_text() == "Routing of <i>model"


def test_the_scope_can_be_heard(page):
    shown = scope(page)
    assert page.get_by_role("application").get_attribute("aria-label").startswith("Experts; left and right")
    label = page.get_by_role("img").get_attribute("aria-label")
    assert label.startswith("5 layers by 32 experts") and "layer 1 chose" in label
    assert page.locator(".wbr-readout").get_attribute("aria-live") == "off"  # a stream
    shown.widget.selection.token = 3
    shown.carry()
    assert page.locator(".wbr-readout").get_attribute("aria-live") == "polite"


def test_keys_are_no_shortcuts_of_the_notebook_and_a_closed_view_stops_listening(page):
    shown = scope(page)
    page.evaluate("() => { window.leaked = 0; document.addEventListener('keydown', () => window.leaked++); }")
    shown.grid.focus()
    shown.press("ArrowLeft", "d", "Enter")
    assert page.evaluate("window.leaked") == 0
    page.evaluate("() => window.close_view()")
    assert page.evaluate("Object.values(window.listeners).every((each) => each.size === 0)")


def test_a_dark_page_is_drawn_in_other_colours(page):
    shown = scope(page)
    light = page.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    page.evaluate(
        """() => {
          document.body.style.setProperty("--jp-layout-color1", "#111");
          document.body.style.setProperty("--jp-content-font-color1", "#fff");
          document.body.dataset.jpThemeLight = "false";
        }"""
    )
    shown.carry(50)
    assert page.locator("canvas").evaluate("(canvas) => canvas.toDataURL()") != light


def test_what_an_edit_forced_is_called_so_and_keeps_no_group(page):
    geometry = Geometry((1,), 8, 2, 4, 2)
    widget = RoutingScope(geometry=geometry)
    widget.push(0, ["x"], [[[0, 7]]], [[[0.5, 0.25]]], [[[0.4, -0.125]]])
    shown = Shown(page, widget)
    shown.carry(300)
    assert shown.readout == "token 0 'x': layer 1 chose 0 (0.500), 7 (0.250, forced); the last one was forced"
    # a canvas has no elements: two cells that were not chosen, one beside the chosen, one beside the forced expert
    kept, dropped = page.locator("canvas").evaluate(
        """(canvas) => {
          const ratio = devicePixelRatio;
          const pen = canvas.getContext("2d");
          const opacity = (x) => pen.getImageData(x * ratio, 46 * ratio, 1, 1).data[3];
          return [opacity(62 + 26 + 12), opacity(62 + 6 * 26 + 3 * 6 + 12)];
        }"""
    )
    assert kept > dropped > 0


# The strip


def strip(page, count=6, **columns):
    widget = TokenStrip(geometry=SIZES["pocket"])
    texts = columns.pop("text", [f" t{n}" for n in range(count)])
    widget.push(0, {"text": texts} | columns, *routing(SIZES["pocket"], len(texts)))
    return Shown(page, widget)


def test_tokens_are_tinted_by_the_number_that_is_chosen_and_hatched_without(page):
    shown = strip(page, 3, logprob=[float("nan"), 0.0, -20.0], ms=[1.0, 2.0, float("nan")])
    tokens = page.locator(".wbr-token")

    def look():
        tint = "t.classList.contains('wbr-unmeasured') ? null : Number(t.style.getPropertyValue('--tint'))"
        return tokens.evaluate_all(f"(all) => all.map((t) => {tint})")

    assert look() == [None, 0, 1] and "not measured" in page.locator(".wbr-legend").inner_text()
    page.get_by_label("colour by").select_option("ms")
    shown.carry()
    assert shown.widget.colour_by == "ms" and look()[2] is None and look()[1] == 1
    assert "ms" in page.locator(".wbr-legend").inner_text()
    shown.widget.colour_by = "entropy"
    shown.carry()
    assert look() == [None] * 3


def test_a_click_or_the_keyboard_selects_a_token(page):
    shown = strip(page)
    page.locator(".wbr-token", has_text="t4").click()
    shown.carry()
    assert shown.widget.selection.token == 4 and shown.readout.startswith("token 4 '␣t4'")
    shown.press("ArrowLeft")
    assert shown.widget.selection.token == 3
    body = page.get_by_role("listbox")
    assert body.get_attribute("aria-activedescendant") == page.locator(".wbr-selected").get_attribute("id")
    shown.press("End", "Home", "Escape")
    assert shown.widget.selection.token == -1 and page.locator(".wbr-selected").count() == 0


def test_experts_have_the_colour_of_their_group_and_a_number_on_demand(page):
    shown = strip(page)
    shown.widget.colour_by = "expert"
    shown.carry()
    page.get_by_role("button", name="ids").click()
    page.get_by_label("layer").select_option("2")
    shown.carry()
    assert shown.widget.selection.layer == 2
    ids = page.locator(".wbr-token").evaluate_all("(all) => all.map((token) => Number(token.dataset.expert))")
    assert ids == shown.widget.values("expert").tolist()
    hues = page.locator(".wbr-token").evaluate_all("(all) => all.map((t) => t.style.getPropertyValue('--hue'))")
    for a, hue_a in zip(ids, hues):
        for b, hue_b in zip(ids, hues):
            assert (hue_a == hue_b) == (a // 4 == b // 4)
    assert page.locator(".wbr-band").count() == 8


def test_tokens_that_the_selected_expert_read_are_underlined(page):
    shown = strip(page, 12)
    expert = int(shown.widget.values("expert")[5])
    shown.widget.selection.layer, shown.widget.selection.expert = 1, expert
    shown.carry()
    read = page.locator(".wbr-token.wbr-read").evaluate_all("(all) => all.map((t) => Number(t.dataset.token))")
    assert 5 in read and len(read) == (routing(SIZES["pocket"], 12)[0][:, 0] == expert).any(-1).sum()
    assert f"read by expert {expert} of layer 1" in page.locator(".wbr-legend").inner_text()


def test_prompt_and_answer_stand_apart_and_markup_stays_text(page):
    texts = ["<｜User｜>", "hi", "<b>x</b>\n", "<img src=x>"]
    strip(page, text=texts, phase=["prefill", "prefill", "decode", "decode"])
    assert page.locator(".wbr-prompt .wbr-token").all_text_contents() == ["<｜User｜>", "hi"]
    assert page.locator(".wbr-block:not(.wbr-prompt) .wbr-token").all_text_contents() == ["<b>x</b>↵\n", "<img src=x>"]
    assert page.locator(".wbr-special").all_text_contents() == ["<｜User｜>"]
    assert page.locator(".wbr-strip b, .wbr-strip img").count() == 0


def test_a_strip_grows_and_takes_back(page):
    shown = strip(page, 3)
    shown.widget.push(3, {"text": [" four", " five"]})
    shown.carry()
    assert page.locator(".wbr-token").all_text_contents() == [" t0", " t1", " t2", " four", " five"]
    shown.widget.push(1, {"text": [" other"]})
    shown.carry()
    assert page.locator(".wbr-token").all_text_contents() == [" t0", " other"]


def test_the_parts_of_a_view_are_small():
    for widget in (RoutingScope, TokenStrip):
        assert len(widget._esm) < 60_000 and "http" not in widget._esm.replace("http://www.w3.org", "")
    assert issubclass(RoutingScope, View)
