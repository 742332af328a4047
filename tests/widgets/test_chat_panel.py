"""Every control of the panel has a twin in Python, and the wire carries only what is new."""

import json
import re
import threading
import time
from contextvars import ContextVar

import ipywidgets
import pytest

from workbench.config import Config
from workbench.errors import RequestError
from workbench.sampling import Sampling
from workbench.widgets import chat as module
from workbench.widgets.chat import ChatPanel, chat
from workbench.widgets.status import cache_factor

SECONDS = 10


@pytest.fixture
def panel(fake_bench):
    panel = chat(fake_bench)
    yield panel
    panel.close()


@pytest.fixture
def wire(panel, monkeypatch):
    """What the kernel sends to the views of the panel, as JSON gives it back."""
    sent = []
    monkeypatch.setattr(panel._view, "send", lambda content, buffers=None: sent.append(json.loads(json.dumps(content))))
    return sent


def press(panel, kind, **content):
    """As the browser does it."""
    panel._view._handle_custom_msg({"kind": kind} | content, [])


def texts(panel):
    return [turn.text for turn in panel.history]


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class View:
    """What a view knows after the messages it was sent; the rules of chat.js in ten lines."""

    def __init__(self, messages):
        self.turns, self.path, self.answering = {}, [], None
        for message in messages:
            if message["kind"] == "path":
                if message["fresh"]:
                    self.turns = {}
                for turn in message["turns"]:
                    self.turns[turn["key"]] = turn.get("text") or [step[1] for step in turn["steps"]]
                self.path, self.answering = [place[0] for place in message["path"]], message["answering"]
            elif message["kind"] == "steps":
                assert message["from"] == len(self.turns[message["turn"]]), "no step is lost or repeated"
                self.turns[message["turn"]] += [step[1] for step in message["steps"]]
            elif message["kind"] == "done":
                self.answering = None

    @property
    def texts(self):
        return ["".join(self.turns[key]) for key in self.path]


def test_methods_do_what_the_buttons_do(panel):
    engine = panel.conversation.bench.engine
    engine.says = ["one", "two", "three", "xyz"]
    panel.send("hi")
    panel.wait(SECONDS)
    assert [(turn.role, turn.text) for turn in panel.history] == [("user", "hi"), ("assistant", "one")]
    panel.regenerate()
    panel.wait(SECONDS)
    assert texts(panel) == ["hi", "two"]
    panel.edit(0, "hello")
    panel.wait(SECONDS)
    assert texts(panel) == ["hello", "three"]
    panel.branch(-1, 1, ord("X"))
    panel.wait(SECONDS)
    assert texts(panel) == ["hello", "tXxyz"]
    panel.select(panel.history[0].versions[0])
    assert texts(panel) == ["hi", "two"]
    panel.clear()
    assert panel.history == []


def test_buttons_do_what_the_methods_do(panel):
    engine = panel.conversation.bench.engine
    engine.says = ["one", "two", "three", "xyz", "!"]
    press(panel, "send", text="hi")
    panel.wait(SECONDS)
    first = panel.history[1]
    press(panel, "regenerate", turn=first.key)
    panel.wait(SECONDS)
    press(panel, "edit", turn=panel.history[0].key, text="hello")
    panel.wait(SECONDS)
    panel.sampling = Sampling(max_tokens=2)
    press(panel, "branch", turn=panel.history[1].key, index=1, token=ord("X"))
    panel.wait(SECONDS)
    assert texts(panel) == ["hello", "tXxy"]
    press(panel, "continue", turn=panel.history[1].key)
    panel.wait(SECONDS)
    assert texts(panel) == ["hello", "tXxy!"]
    press(panel, "select", turn=first.key)
    assert texts(panel) == ["hi", "one"]
    press(panel, "clear")
    assert panel.history == []


def test_stop_is_obeyed_while_generating(panel):
    gate = panel.conversation.bench.engine.gate = threading.Semaphore(5)
    press(panel, "send", text="hi")
    until(lambda: len(panel.history) == 2 and len(panel.history[1].steps) == 5)
    press(panel, "stop")
    panel.wait(SECONDS)
    gate.release(100)
    assert texts(panel) == ["hi", "Hello"]


def test_wait_raises_what_went_wrong_and_the_view_shows_it(panel, wire):
    engine = panel.conversation.bench.engine
    engine.fails_at, engine.error = 0, RequestError("the prompt has 3000 tokens")
    panel.send("hi")
    with pytest.raises(RequestError, match="3000 tokens"):
        panel.wait(SECONDS)
    done = wire[-1]
    assert (done["kind"], done["finish"], done["error"]) == ("done", "error", "the prompt has 3000 tokens")


def test_a_refused_send_gives_the_text_back(panel, wire):
    gate = panel.conversation.bench.engine.gate = threading.Semaphore(0)
    press(panel, "send", text="first")
    press(panel, "send", text="second")
    notice = next(message for message in wire if message["kind"] == "notice")
    assert notice["draft"] == "second" and "still answering" in notice["text"]
    gate.release(100)
    panel.wait(SECONDS)
    assert texts(panel) == ["first", "Hello there."]


def test_the_wire_carries_every_step_once(panel, wire):
    panel.conversation.bench.engine.says = ["a longer reply, 专家 included, with many tokens in it"]
    press(panel, "ready", view="v")
    panel.send("hi")
    panel.wait(SECONDS)
    panel.regenerate()
    panel.wait(SECONDS)
    view = View(wire)
    assert view.texts == texts(panel)
    assert view.answering is None


def test_a_view_opened_in_mid_reply_sees_all_of_it(panel, wire):
    gate = panel.conversation.bench.engine.gate = threading.Semaphore(5)
    panel.send("hi")
    until(lambda: len(panel.history[1].steps) == 5)
    del wire[:]
    press(panel, "ready", view="new")
    gate.release(100)
    panel.wait(SECONDS)
    assert wire[0]["fresh"] and wire[0]["view"] == "new" and wire[0]["answering"] == panel.history[1].key
    assert View(wire).texts == texts(panel)


def test_fast_steps_share_messages_and_silence_sends_none(panel, wire):
    panel.conversation.bench.engine.says = ["x" * 2000]
    panel.sampling = Sampling(max_tokens=3000)
    started = time.monotonic()
    panel.send("hi")
    panel.wait(SECONDS)
    seconds = time.monotonic() - started
    steps = [message for message in wire if message["kind"] == "steps"]
    assert sum(len(message["steps"]) for message in steps) == 2001
    assert len(steps) <= 3 + 15 * seconds
    assert sum(len(json.dumps(message)) for message in steps) < 300 * 2001
    before = len(wire)
    time.sleep(0.15)
    assert len(wire) == before


def test_after_the_first_message_only_news_travel(panel, wire):
    panel.send("hi")
    panel.wait(SECONDS)
    del wire[:]
    panel.send("again")
    panel.wait(SECONDS)
    path = next(message for message in wire if message["kind"] == "path")
    assert len(path["path"]) == 4
    assert [turn["role"] for turn in path["turns"]] == ["user", "assistant"]


def test_the_saved_state_of_the_widget_holds_no_history(panel):
    panel.send("a secret")
    panel.wait(SECONDS)
    assert "a secret" not in json.dumps(panel._view.get_state(), default=str)


def test_the_browser_code_is_small_and_asks_for_nothing_from_outside():
    source = module.ChatView._esm
    assert len(source.encode()) < 60_000
    assert not re.search(
        r"^import\b|\bimport\(|\bfetch\(|XMLHttpRequest|WebSocket|innerHTML|insertAdjacentHTML", source, re.M
    )
    assert set(re.findall(r"https?://[^\s\"']+", source)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in (module.HERE / "chat.css").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 0.05),
        ("top_p", 1.0),
        ("top_k", 0),
        ("top_k", 40),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("repetition_penalty", 1.0),
        ("repetition_penalty", 2.0),
        ("max_tokens", 1),
        ("max_tokens", 4096),
    ],
)
def test_each_control_sets_its_setting(panel, name, value):
    panel._controls.fields[name].value = value
    assert getattr(panel.sampling, name) == value
    panel.send("hi")
    panel.wait(SECONDS)
    assert getattr(panel.conversation.bench.engine.asked[-1].sampling, name) == value


def test_the_seed_field_takes_a_number_or_nothing(panel, wire):
    panel._controls.seed.value = "17"
    assert panel.sampling.seed == 17
    panel._controls.seed.value = "seventeen"
    assert panel.sampling.seed == 17
    assert "whole number" in wire[-1]["text"]
    panel._controls.seed.value = ""
    assert panel.sampling.seed is None


def test_settings_made_in_python_are_shown_and_kept_where_a_slider_cannot_reach(panel):
    panel.sampling = Sampling(temperature=5.0, top_k=7, stop=("\n",))
    assert panel._controls.fields["top_k"].value == 7
    assert panel.sampling.temperature == 5.0
    panel._controls.fields["top_k"].value = 8
    assert panel.sampling == Sampling(temperature=5.0, top_k=8, stop=("\n",))


def test_the_system_prompt_is_one_thing_in_both_worlds(panel):
    panel.system = "Be brief."
    assert panel._controls.system.value == "Be brief."
    panel._controls.system.value = "Be long."
    assert panel.system == "Be long."


def test_export_and_load_bring_the_whole_tree_back(panel, tmp_path):
    panel.conversation.bench.engine.says = ["one", "two"]
    panel.system = "Be brief."
    panel.send("hi")
    panel.wait(SECONDS)
    panel.regenerate()
    panel.wait(SECONDS)
    panel.export(tmp_path / "chat.json")
    panel.system = ""
    panel.clear()
    panel.load(tmp_path / "chat.json")
    assert (texts(panel), panel.system) == (["hi", "two"], "Be brief.")
    assert [turn.text for turn in panel.history[1].versions] == ["one", "two"]
    panel.send("more")
    panel.wait(SECONDS)
    assert len(panel.history) == 4


def test_the_export_button_gives_a_file_that_the_import_button_reads(panel, wire):
    panel.send("hi")
    panel.wait(SECONDS)
    press(panel, "export")
    exported = wire[-1]
    assert exported["name"] == "conversation-fake.json"
    press(panel, "clear")
    press(panel, "import", text=exported["text"])
    assert texts(panel) == ["hi", "Hello there."]
    assert wire[-1]["kind"] == "path" and wire[-1]["fresh"]


@pytest.mark.parametrize("content", ["no JSON", "{}", '{"format": "workbench conversation", "version": 9}'])
def test_a_bad_file_is_refused_and_the_conversation_stays(panel, wire, tmp_path, content):
    panel.send("hi")
    panel.wait(SECONDS)
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(RequestError):
        panel.load(tmp_path / "bad.json")
    with pytest.raises(RequestError, match="cannot be read"):
        panel.load(tmp_path / "missing.json")
    press(panel, "import", text=content)
    assert wire[-1]["kind"] == "notice"
    assert texts(panel) == ["hi", "Hello there."]


def test_the_prompt_view_shows_the_exact_tokens_with_special_ones_apart(panel, wire):
    panel.conversation.bench.engine.says = ["<eos> is text here"]
    panel.send("hi")
    panel.wait(SECONDS)
    press(panel, "prompt")
    parts = wire[-1]["parts"]
    assert [text for _, text, special in parts if special] == ["<bos>", "<eos>"]
    assert ["user", "hi", False] in parts
    assert ["assistant", "<eos> is text here", False] in parts
    assert wire[-1]["tokens"] == len(panel.conversation.prompt().tokens)


def test_the_prompt_view_of_nothing_is_empty(panel, wire):
    press(panel, "prompt")
    assert wire[-1] == {"kind": "prompt", "parts": [], "tokens": 0}


def test_a_new_panel_on_the_same_bench_ends_the_old_one(panel, wire, fake_bench):
    fake_bench.engine.gate = threading.Semaphore(5)
    panel.send("hi")
    until(lambda: len(panel.history[1].steps) == 5)
    worker = panel.conversation._worker.thread
    newer = chat(fake_bench)
    assert not worker.is_alive()
    assert wire[-1]["kind"] == "closed" and "newer" in wire[-1]["text"]
    assert texts(panel) == ["hi", "Hello"]
    with pytest.raises(RequestError, match="closed"):
        panel.send("more")
    fake_bench.engine.gate = None
    newer.send("hi")
    newer.wait(SECONDS)
    newer.close()


def test_the_same_cell_run_again_ends_the_panel_it_made_before(fake_bench, monkeypatch):
    other = type(fake_bench)()
    monkeypatch.setattr(module, "_cell", lambda: ("cell", "run 1"))
    first, beside = chat(fake_bench), chat(other)
    assert first.conversation.bench is fake_bench, "two panels of one run live side by side"
    monkeypatch.setattr(module, "_cell", lambda: ("cell", "run 2"))
    second = chat(type(fake_bench)())
    assert first.conversation.bench is None and beside.conversation.bench is None
    for each in (first, beside, second):
        each.close()


def test_the_worker_speaks_in_the_name_of_the_cell_that_made_the_panel(fake_bench, monkeypatch):
    """The kernel answers a view through whoever wrote to it last, and a page that was closed cannot pass it on."""
    cell = ContextVar("cell", default="none")
    cell.set("the cell")
    panel, heard = chat(fake_bench), []
    monkeypatch.setattr(panel._view, "send", lambda content, buffers=None: heard.append(cell.get()))
    cell.set("a later one")
    panel.send("hi")
    panel.wait(SECONDS)
    press(panel, "ready", view="v")
    assert set(heard) == {"the cell"}
    panel.close()


def test_a_closed_panel_says_so_to_a_view_that_opens_later(panel, wire):
    panel.retire()
    press(panel, "ready", view="v")
    assert [message["kind"] for message in wire[-2:]] == ["path", "closed"]


def test_a_saved_notebook_shows_the_transcript_with_everything_escaped(panel):
    panel.conversation.bench.engine.says = ["<script>alert('专家')</script>"]
    panel.send("1 < 2 & 3")
    panel.wait(SECONDS)
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "&lt;script&gt;alert(&#x27;专家&#x27;)&lt;/script&gt;" in bundle["text/html"]
    assert "1 &lt; 2 &amp; 3" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]
    assert bundle["text/plain"] == "Chat with fake\nYou: 1 < 2 & 3\nfake: <script>alert('专家')</script>"


def test_messages_the_browser_would_never_send_change_nothing(panel, wire):
    press(panel, "send", text="hi")
    panel.wait(SECONDS)
    before = len(wire)
    for content in (
        {"kind": "explode"},
        {"kind": "branch"},
        {"kind": "select", "turn": "1"},
        {"kind": "send", "text": 3},
    ):
        panel._view._handle_custom_msg(content, [])
    assert len(wire) == before
    press(panel, "select", turn=99)
    assert "no turn 99" in wire[-1]["text"]


def test_the_saving_against_multi_head_attention_is_the_papers(fake_bench):
    assert cache_factor(Config.preset("v2")) == 2 * 128 * 128 / 576
    assert round(100 * (1 - 1 / cache_factor(fake_bench.config))) == 84


def test_the_panel_can_be_part_of_other_widgets(panel):
    assert isinstance(panel, ChatPanel)
    assert ipywidgets.HBox([panel]).children == (panel,)
