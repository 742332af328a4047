"""A person opens the notebook in JupyterLab, talks, stops, tries again, branches; nothing asks another machine.

With WORKBENCH_SCREENSHOTS=folder the pictures are kept there.
"""

import ast
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser.lab import ROOT, browsing, command, notebook, open_notebook, serving

from workbench.lab import FIRST
from workbench.lab import command as lab_command

pytestmark = pytest.mark.browser

POCKET = (ROOT / "workbench" / "pocket" / "config.json").exists()
BENCH = "wb.load('pocket')" if POCKET else "slow_bench()"
SLOWLY = "bench.model.fuse = False" if POCKET else "pass"  # or a reply is over before it can be stopped
HURRY = "pass" if POCKET else "panel.conversation.bench.engine.gate.seconds = 0.001"
# so hot that pocket rambles on and there is something to stop
SETUP = f"""import workbench as wb
from browser.slow_bench import slow_bench
bench = {BENCH}
{SLOWLY}
panel = wb.chat(bench, sampling=wb.Sampling(temperature=50.0, top_p=1.0, max_tokens=1800))
panel"""
CALM = f"panel.sampling = wb.Sampling(max_tokens=600, seed=1); panel.clear(); {HURRY}"

WATCH = """() => {
  window.grown = [];
  let before = document.querySelectorAll(".wbc-reply .wbc-token:not(.wbc-end)").length;
  const look = () => {
    const now = document.querySelectorAll(".wbc-reply .wbc-token:not(.wbc-end)").length;
    if (now > before) window.grown.push([performance.now(), now]);
    before = now;
  };
  window.watch?.disconnect();
  window.watch = new MutationObserver(look);
  window.watch.observe(document.querySelector(".wbc-log"), { childList: true, subtree: true });
  const stop = document.querySelector(".wbc-go");
  stop.addEventListener("click", () => (window.clicked = performance.now()), { capture: true });
}"""


class Desk(NamedTuple):
    """A page of JupyterLab with the notebook run, what it asked of other machines, and what broke in it."""

    page: Any
    outside: list[str]
    failures: list[str]
    reopen: Callable[[], None]
    folder: Path


@pytest.fixture(scope="module")
def desk(playwright, tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="needs jupyterlab: pip install 'deepseek-workbench[notebooks]'")
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / FIRST).write_text(notebook(SETUP, "1 + 1"), encoding="utf-8")
    arguments = lab_command(folder / "notebooks", [])
    with serving(folder, arguments) as (address, token), browsing(playwright, folder) as (page, outside):
        failures = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        desk = Desk(page, outside, failures, lambda: open_notebook(page, address, token, f"notebooks/{FIRST}"), folder)
        desk.reopen()
        command(page, "notebook:run-all-cells")
        page.locator(".wbc").wait_for(timeout=40_000)
        yield desk


@pytest.fixture
def page(desk):
    return desk.page


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def send(page, text):
    box = page.locator(".wbc-bar-input textarea")
    box.click()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def send_until_long(page):
    """Asks until a reply is on its way that is long enough to be stopped; returns in the middle of it."""
    for _ in range(10):
        page.evaluate(WATCH)
        send(page, "Tell me everything.")
        page.wait_for_function("window.grown.length >= 4 || document.querySelector('.wbc-go').textContent === 'Send'")
        if page.evaluate("window.grown.length") >= 4:
            return
    pytest.fail("every reply was short")


def ended(page):
    page.locator(".wbc-go", has_text="Send").wait_for(timeout=30_000)


def python(page, code, value="None"):
    """Runs code in the notebook's kernel, beside its cells; the literal that `value` then is."""
    answer = page.evaluate(
        """async ([code, value]) => {
          const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
          return (await kernel.requestExecute({ code, user_expressions: { value } }).done).content;
        }""",
        [code, value],
    )
    assert answer["status"] == "ok", answer
    return ast.literal_eval(answer["user_expressions"]["value"]["data"]["text/plain"])


def test_stop_ends_the_stream_within_half_a_second(page):
    send_until_long(page)
    page.get_by_role("button", name="Stop").click()
    ended(page)
    time.sleep(1.0)
    grown, clicked = page.evaluate("[window.grown, window.clicked]")
    late = grown[-1][0] - clicked
    print(f"last new token {late:+.0f} ms after the click on Stop")
    assert late <= 500
    assert grown[0][1] < grown[-1][1], "it came in pieces"
    assert page.locator(".wbc-reply .wbc-token:not(.wbc-end)").count() == grown[-1][1], "and all of it was kept"
    assert "stopped by you" in page.locator(".wbc-reply .wbc-figures").last.inner_text()


def test_a_conversation_with_versions_and_branches(page, shots):
    python(page, CALM)
    page.locator(".wbc-empty").wait_for()
    send(page, "What is a mixture of experts?")
    ended(page)
    first = page.locator(".wbc-reply .wbc-body").inner_text()
    assert first
    python(page, "panel.sampling = wb.Sampling(max_tokens=600, seed=2)")
    page.get_by_role("button", name="Regenerate").click()
    page.locator(".wbc-reply .wbc-versions", has_text="2/2").wait_for()
    ended(page)
    page.locator(".wbc-reply .wbc-token").nth(3).hover()
    card = page.get_by_role("dialog")
    card.wait_for()
    page.screenshot(path=shots / "light.png")
    kept = page.locator(".wbc-reply .wbc-token").first.inner_text()
    chosen = card.locator(".wbc-row:enabled code").first.inner_text()
    card.locator(".wbc-row:enabled").first.click()
    page.locator(".wbc-reply .wbc-versions", has_text="3/3").wait_for()
    ended(page)
    by_hand = page.locator(".wbc-reply .wbc-by-hand")
    assert by_hand.first.text_content().strip() == chosen.strip("␣").strip()
    assert page.locator(".wbc-reply .wbc-token").first.inner_text() == kept
    for _ in range(2):
        page.locator(".wbc-reply").get_by_role("button", name="Previous").click()
    page.locator(".wbc-reply .wbc-versions", has_text="1/3").wait_for()
    assert page.locator(".wbc-reply .wbc-body").inner_text() == first


def test_keys_pressed_in_the_panel_are_no_commands_of_the_notebook(page):
    page.locator(".wbc-reply .wbc-body").focus()
    for key in ("ArrowRight", "d", "d", "b", "Escape"):
        page.keyboard.press(key)
    assert page.locator(".jp-Notebook .jp-Cell").count() == 2


def test_running_the_cell_again_ends_the_old_panel(page):
    python(page, "old = panel")
    command(page, "notebook:run-all-cells")
    page.locator(".wbc-empty").wait_for(timeout=20_000)
    python(page, "assert old.conversation.bench is None and panel.conversation.bench is not None")
    assert page.locator(".wbc").count() == 1


def test_a_notebook_closed_in_mid_reply_shows_all_of_it_when_opened_again(desk, page):
    command(page, "docmanager:save")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    send_until_long(page)
    desk.reopen()
    page.locator(".wbc-reply").first.wait_for(timeout=30_000)
    said = python(
        page, "panel.stop(); panel.wait(20)", "''.join(t.text for t in panel.history if t.role == 'assistant')"
    )
    ended(page)
    page.get_by_role("button", name="Tokens").click()
    assert "".join(page.locator(".wbc-reply .wbc-token:not(.wbc-end)").all_text_contents()) == said


def test_it_is_legible_in_the_dark(page, shots):
    python(page, CALM)
    command(page, "apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    send(page, "What is a mixture of experts?")
    ended(page)
    page.locator(".wbc-head").scroll_into_view_if_needed()
    page.screenshot(path=shots / "dark.png")
    colours = page.locator(".wbc-reply .wbc-body").evaluate(
        "(body) => [getComputedStyle(body).color, getComputedStyle(body.closest('.wbc')).backgroundColor]"
    )
    ink, paper = ([int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]] for colour in colours)
    assert sum(ink) - sum(paper) > 3 * 100


@pytest.mark.skipif(not POCKET, reason="the slow bench has no experts")
def test_a_token_is_opened_its_top_expert_ablated_and_both_replies_compared(desk, page, shots):
    python(page, CALM)
    page.locator(".wbc-empty").wait_for()
    page.get_by_role("button", name="Experts").click()
    send(page, "What is a mixture of experts?")
    ended(page)
    page.locator(".wbr-readout", has_text="layer 1 chose").first.wait_for()
    page.locator(".wbc-reply .wbc-token").nth(4).click()
    page.get_by_role("button", name="Look inside").first.click()
    inspector = page.get_by_role("region", name="Token inspector")
    inspector.get_by_role("button", name="Ablate").first.wait_for()
    page.screenshot(path=shots / "explorer-dark.png")
    top = python(page, "pass", "panel.explorer.inspector.inspection.layers[0].experts[0]")
    inspector.get_by_role("button", name="Ablate").first.click()
    page.locator(".wbc-reply .wbc-versions", has_text="2/2").wait_for()
    ended(page)
    page.get_by_role("region", name="Side by side").get_by_text(f"without expert {top} in layer 1").wait_for()
    page.screenshot(path=shots / "compare-dark.png")
    command(page, "apputils:change-theme", theme="JupyterLab Light")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")
    page.locator(".wbr-head").first.scroll_into_view_if_needed()
    page.screenshot(path=shots / "explorer-light.png")


@pytest.mark.skipif(not POCKET, reason="the slow bench has no cache")
def test_the_cache_is_switched_in_mid_conversation_and_its_bytes_drop(desk, page, shots):
    python(page, f"{CALM}; panel.exploring = False; panel.cache_format = 'bf16'")
    page.locator(".wbc-empty").wait_for()
    page.get_by_role("button", name="Memory").click()
    meter = page.get_by_role("region", name="Cache meter")
    send(page, "What is a mixture of experts?")
    ended(page)
    held = "panel.conversation.bench.engine.cache.nbytes"
    before = python(page, "pass", held)
    meter.get_by_text(f"{before:,} B").first.wait_for()
    meter.get_by_role("button", name="Switch the cache to q6").click()
    cost = page.get_by_role("region", name="What the last switch did")
    cost.wait_for()
    after = python(page, "pass", held)
    assert after == before * 68 // 160 and f"{before:,} B → {after:,} B" in cost.inner_text()
    page.locator(".wbc-cache", has_text="in q6").wait_for()
    send(page, "Tell me more.")
    ended(page)
    assert python(page, "pass", "panel.history[-1].stats['reused_tokens'] > 0 and panel.cache_format == 'q6'")
    page.locator(".wbc-head").scroll_into_view_if_needed()
    page.screenshot(path=shots / "memory-light.png")
    page.get_by_role("button", name="Memory").click()
    meter.wait_for(state="hidden")


def test_the_saved_notebook_is_small_and_still_says_something(desk, page):
    python(page, "from IPython.display import display; display(panel.explorer.scope) if panel.explorer.turn else None")
    command(page, "docmanager:save")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    saved = (desk.folder / "notebooks" / FIRST).read_bytes()
    assert len(saved) < 300_000
    assert b"Chat with" in saved


def test_no_request_left_the_machine_and_nothing_broke(desk):
    assert desk.outside == []
    assert desk.failures == []
