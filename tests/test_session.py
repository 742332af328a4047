"""A conversation keeps everything that was said, whatever is stopped, refused or fails."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
from texts import TEXTS

from workbench.checkpoint import Random
from workbench.config import Config, Yarn
from workbench.engine import Engine
from workbench.errors import RequestError
from workbench.model import Model
from workbench.sampling import Sampling
from workbench.session import Conversation
from workbench.tokenizer import Tokenizer
from workbench.train.vocabulary import train_tokenizer, write

SECONDS = 10


@pytest.fixture
def conversation(fake_bench):
    conversation = Conversation(fake_bench)
    yield conversation
    conversation.close()


def said(conversation):
    return [(turn.role, turn.content) for turn in conversation.path]


def ask(conversation, text="hi"):
    reply = conversation.send(text)
    conversation.wait(SECONDS)
    return reply


def hold(conversation, tokens=0):
    """From now on a reply stands still after so many tokens; releases of the gate let it go on."""
    conversation.bench.engine.gate = threading.Semaphore(tokens)
    return conversation.bench.engine.gate


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_reply_is_the_text_of_its_tokens(conversation):
    reply = ask(conversation)
    assert said(conversation) == [("user", "hi"), ("assistant", "Hello there.")]
    assert reply.finish == "eos"
    assert bytes(reply.tokens[:-1]).decode() == reply.content
    assert reply.stats["prefill_seconds"] == 0.25
    assert reply.stats["cache_bytes"] == 4096


def test_the_next_prompt_carries_the_exact_tokens_of_the_last_reply(conversation):
    reply = ask(conversation)
    ask(conversation, "and?")
    messages = conversation.bench.engine.asked[1].messages
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["tokens"] == reply.tokens[:-1], "the end-of-turn token belongs to the prompt format"


def test_the_system_prompt_leads_and_counts_from_the_next_reply(fake_bench):
    conversation = Conversation(fake_bench, system="Be brief.")
    ask(conversation)
    conversation.system = ""
    ask(conversation)
    first, second = fake_bench.engine.asked
    assert first.messages[0] == {"role": "system", "content": "Be brief."}
    assert second.messages[0]["role"] == "user"
    conversation.close()


def test_stop_keeps_what_was_said(conversation):
    hold(conversation, 5)
    reply = conversation.send("hi")
    until(lambda: len(reply.steps) == 5)
    conversation.stop()
    conversation.wait(SECONDS)
    assert (reply.content, reply.finish) == ("Hello", "stopped")
    assert conversation.answering is None


def test_stop_keeps_text_that_was_held_back(conversation):
    conversation.bench.engine.holds = True
    hold(conversation, 5)
    reply = conversation.send("hi")
    until(lambda: len(reply.steps) == 5)
    assert reply.content == "Hell"
    conversation.stop()
    conversation.wait(SECONDS)
    assert (reply.content, reply.steps[4].text) == ("Hello", "o")


def test_stop_before_the_first_token_leaves_an_empty_reply_that_can_be_continued(conversation):
    hold(conversation)
    reply = conversation.send("hi")
    conversation.stop()
    conversation.wait(SECONDS)
    assert (reply.content, reply.finish) == ("", "stopped")
    conversation.bench.engine.gate = None
    assert conversation.continue_() is reply
    conversation.wait(SECONDS)
    assert said(conversation) == [("user", "hi"), ("assistant", "Hello there.")]
    assert not conversation.bench.engine.asked[1].open_last


def test_an_empty_reply_is_left_out_of_the_next_prompt(conversation):
    hold(conversation)
    conversation.send("hi")
    conversation.stop()
    conversation.wait(SECONDS)
    conversation.bench.engine.gate = None
    ask(conversation, "hello?")
    assert [m["content"] for m in conversation.bench.engine.asked[1].messages] == ["hi", "hello?"]


def test_a_reply_cut_by_its_limit_is_continued_in_place(conversation):
    conversation.sampling = Sampling(max_tokens=5)
    reply = ask(conversation)
    assert (reply.content, reply.finish) == ("Hello", "length")
    conversation.bench.engine.says = [" you."]
    conversation.sampling = Sampling(max_tokens=50)
    conversation.continue_()
    conversation.wait(SECONDS)
    asked = conversation.bench.engine.asked[1]
    assert asked.open_last and asked.messages[-1]["tokens"] == list(b"Hello")
    assert said(conversation) == [("user", "hi"), ("assistant", "Hello you.")]


def test_a_reply_that_ended_by_itself_is_not_continued(conversation):
    ask(conversation)
    with pytest.raises(RequestError, match="regenerate"):
        conversation.continue_()


def test_regenerate_adds_a_version_and_keeps_the_first(conversation):
    conversation.bench.engine.says = ["one", "two"]
    first = ask(conversation)
    second = conversation.regenerate()
    conversation.wait(SECONDS)
    assert said(conversation) == [("user", "hi"), ("assistant", "two")]
    assert second.versions == [first, second]
    conversation.select(first)
    assert said(conversation) == [("user", "hi"), ("assistant", "one")]


def test_edit_adds_a_version_with_its_own_reply(conversation):
    conversation.bench.engine.says = ["one", "two", "three"]
    ask(conversation)
    question = conversation.path[0]
    ask(conversation, "more")
    conversation.edit(question, "hello")
    conversation.wait(SECONDS)
    assert said(conversation) == [("user", "hello"), ("assistant", "three")]
    conversation.select(question)
    assert [text for _, text in said(conversation)] == ["hi", "one", "more", "two"]


def test_a_branch_keeps_the_tokens_before_it(conversation):
    first = ask(conversation)
    conversation.bench.engine.says = ["yz"]
    branch = conversation.branch(first, 4, ord("X"))
    conversation.wait(SECONDS)
    assert branch.content == "HellXyz"
    assert branch.versions == [first, branch]
    asked = conversation.bench.engine.asked[1]
    assert asked.open_last and asked.messages[-1]["tokens"] == list(b"HellX")
    chosen = branch.steps[4]
    assert chosen.by_hand and chosen.probability == 0.2 and chosen.logprob == pytest.approx(-1.386, abs=1e-3)
    assert not branch.steps[3].by_hand


def test_a_branch_inside_a_character_keeps_the_text_whole(conversation):
    conversation.bench.engine.says = ["专家"]
    first = ask(conversation)
    assert [record.text for record in first.steps] == ["", "", "专", "", "", "家", ""]
    conversation.bench.engine.says = ["!"]
    branch = conversation.branch(first, 2, "丒".encode()[2])
    conversation.wait(SECONDS)
    assert branch.content == "丒!"


def test_a_character_cut_by_the_limit_is_completed_when_the_reply_goes_on(conversation):
    engine = conversation.bench.engine
    conversation.sampling = Sampling(max_tokens=4)
    engine.says = ["专家"]
    reply = ask(conversation)
    assert reply.content == "专\ufffd"
    engine.says = ["家".encode()[1:].decode("utf-8", "surrogateescape")]
    conversation.continue_()
    conversation.wait(SECONDS)
    assert reply.content == "专家"


def test_branching_to_the_end_of_turn_ends_the_reply(conversation):
    first = ask(conversation)
    branch = conversation.branch(first, 5, conversation.bench.tokenizer.eos)
    conversation.wait(SECONDS)
    assert (branch.content, branch.finish) == ("Hello", "eos")
    assert len(conversation.bench.engine.asked) == 1


@pytest.mark.parametrize(("index", "token"), [(-1, 88), (99, 88), (0, -1), (0, 259)])
def test_a_branch_that_cannot_be_is_refused(conversation, index, token):
    first = ask(conversation)
    with pytest.raises(RequestError, match="token"):
        conversation.branch(first, index, token)
    assert len(first.versions) == 1


def test_two_sends_at_once_the_second_is_refused_and_nothing_is_lost(conversation):
    gate = hold(conversation)
    conversation.send("first")
    for verb in (lambda: conversation.send("second"), conversation.regenerate, conversation.clear):
        with pytest.raises(RequestError, match="still answering"):
            verb()
    gate.release(100)
    conversation.wait(SECONDS)
    assert said(conversation) == [("user", "first"), ("assistant", "Hello there.")]


def test_of_many_threads_that_send_one_wins(conversation):
    gate = hold(conversation)
    outcomes = []

    def send():
        try:
            conversation.send("me")
            outcomes.append("sent")
        except RequestError:
            outcomes.append("refused")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.release(100)
    conversation.wait(SECONDS)
    assert sorted(outcomes) == ["refused"] * 7 + ["sent"]
    assert len(conversation.path) == 2


def test_an_engine_error_keeps_the_text_and_is_raised_by_wait(conversation):
    engine = conversation.bench.engine
    engine.fails_at, engine.error = 0, RequestError("the prompt has 3000 tokens, the context 2048")
    reply = conversation.send("a long question")
    with pytest.raises(RequestError, match="3000 tokens") as caught:
        conversation.wait(SECONDS)
    assert "__iter__" in [entry.name for entry in caught.traceback], "where it happened is part of the error"
    assert (reply.finish, reply.error) == ("error", "the prompt has 3000 tokens, the context 2048")
    assert said(conversation) == [("user", "a long question"), ("assistant", "")]
    engine.fails_at = None
    conversation.edit(conversation.path[0], "short")
    conversation.wait(SECONDS)
    assert said(conversation) == [("user", "short"), ("assistant", "Hello there.")]


def test_an_unexpected_error_in_mid_reply_names_itself_and_the_reply_can_be_continued(conversation):
    engine = conversation.bench.engine
    engine.fails_at, engine.error = 5, MemoryError("no room")
    reply = conversation.send("hi")
    with pytest.raises(MemoryError):
        conversation.wait(SECONDS)
    assert (reply.content, reply.error) == ("Hello", "MemoryError: no room")
    engine.fails_at, engine.says = None, ["!"]
    conversation.continue_()
    conversation.wait(SECONDS)
    assert (reply.content, reply.error, reply.finish) == ("Hello!", None, "eos")


def test_wait_says_what_to_do_when_it_takes_too_long(conversation):
    hold(conversation)
    conversation.send("hi")
    with pytest.raises(TimeoutError, match=r"wait longer, or stop\(\)"):
        conversation.wait(0.01)
    conversation.stop()
    conversation.wait(SECONDS)


@pytest.fixture
def interruptible():
    """A shell may start what it runs deaf to an interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_the_wait_stops_the_reply(conversation):
    hold(conversation)
    reply = conversation.send("hi")
    main = threading.main_thread().ident
    threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        conversation.wait(SECONDS)
    conversation.wait(SECONDS)
    assert reply.finish == "stopped"


def test_python_ends_at_once_in_mid_reply():
    code = (
        "import threading; from fake_bench import FakeBench; from workbench.session import Conversation\n"
        "bench = FakeBench(); bench.engine.gate = threading.Semaphore(3); Conversation(bench).send('hi')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_refused(conversation, text):
    with pytest.raises(RequestError, match="empty"):
        conversation.send(text)
    assert conversation.path == []


def test_listeners_hear_a_reply_from_start_to_end(conversation):
    heard = []
    unsubscribe = conversation.subscribe(lambda event: heard.append(event.kind))
    conversation.bench.engine.says = ["ab"]
    ask(conversation)
    assert heard == ["changed", "started", "prefill", "step", "step", "step", "finished"]
    unsubscribe()
    ask(conversation)
    assert len(heard) == 7


def test_a_listener_that_fails_does_not_break_the_reply(conversation):
    def fail(event):
        if event.kind == "step":
            raise ValueError("a view broke")

    conversation.subscribe(fail)
    reply = conversation.send("hi")
    with pytest.raises(ValueError, match="a view broke"):
        conversation.wait(SECONDS)
    assert (reply.content, reply.finish) == ("Hello there.", "eos")
    conversation.wait(SECONDS)


def test_clear_keeps_the_system_prompt(fake_bench):
    conversation = Conversation(fake_bench, system="Be brief.")
    old = ask(conversation)
    conversation.clear()
    assert (conversation.path, conversation.system) == ([], "Be brief.")
    with pytest.raises(RequestError, match="not part of the conversation"):
        conversation.select(old)
    with pytest.raises(RequestError, match="no reply yet"):
        conversation.regenerate()
    conversation.close()


def test_what_is_exported_comes_back_whole(fake_bench):
    conversation = Conversation(fake_bench, system="Sei kurz.", sampling=Sampling(temperature=0.7, stop=("\n\n",)))
    fake_bench.engine.says = ["MoE 专家", "two", "three"]
    first = ask(conversation)
    conversation.regenerate()
    conversation.wait(SECONDS)
    conversation.branch(first, 1, ord("X"))
    conversation.wait(SECONDS)
    conversation.select(first)
    text = json.dumps(conversation.export(), allow_nan=False)
    again = Conversation.load(fake_bench, json.loads(text))
    assert json.dumps(again.export()) == text
    assert said(again) == said(conversation)
    assert again.sampling == conversation.sampling
    assert len(again.path[1].versions) == 3
    ask(again, "go on")
    for each in (conversation, again):
        each.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="something else"), "not a conversation"),
        (lambda d: d.update(version=99), "version 99.*update the workbench"),
        (lambda d: d.update(vocab_size=102400, model="v2"), "held with 'v2'"),
        (lambda d: d.update(sampling={"heat": 1}), "sampling"),
        (lambda d: d.update(sampling={"temperature": -1}), "temperature"),
        (lambda d: d.update(turns=[]), "turns"),
        (lambda d: d["turns"].pop(1), "turn 1"),
        (lambda d: d["turns"].pop(), "no reply"),
        (lambda d: d["turns"][1].update(role="wizard"), "wizard"),
        (lambda d: d["turns"][1].update(parent=7), "parent"),
        (lambda d: d["turns"][2].update(parent=0), "cannot follow"),
        (lambda d: d["turns"][0].update(chosen=3), "chosen"),
        (lambda d: d["turns"][2].update(content="other"), "do not spell"),
        (lambda d: d["turns"][2].update(settings="warm"), "settings"),
        (lambda d: d["turns"][2]["steps"].pop("token"), "columns"),
        (lambda d: d["turns"][2]["steps"]["token"].pop(), "length"),
        (lambda d: d["turns"][2]["steps"]["token"].__setitem__(0, 10**6), "not a token"),
        (lambda d: d["turns"][2]["steps"]["logprob"].__setitem__(0, "low"), "not a token"),
    ],
)
def test_a_foreign_newer_or_corrupt_file_is_refused(conversation, change, message):
    ask(conversation)
    data = json.loads(json.dumps(conversation.export()))
    change(data)
    with pytest.raises(RequestError, match=message):
        Conversation.load(conversation.bench, data)


@pytest.mark.parametrize("data", [None, [], "text", 3, {}])
def test_what_is_not_an_export_at_all_is_refused(fake_bench, data):
    with pytest.raises(RequestError, match="not a conversation"):
        Conversation.load(fake_bench, data)


def test_a_reply_exported_while_it_was_generated_can_be_continued(conversation):
    hold(conversation, 5)
    reply = conversation.send("hi")
    until(lambda: len(reply.steps) == 5)
    again = Conversation.load(conversation.bench, json.loads(json.dumps(conversation.export())))
    assert (again.path[1].content, again.path[1].finish) == ("Hello", "stopped")
    conversation.stop()
    conversation.wait(SECONDS)


def test_close_ends_the_worker_and_keeps_the_turns_readable(fake_bench):
    conversation = Conversation(fake_bench)
    hold(conversation, 5)
    reply = conversation.send("hi")
    until(lambda: len(reply.steps) == 5)
    worker = conversation._worker.thread
    conversation.close()
    assert not worker.is_alive()
    assert said(conversation) == [("user", "hi"), ("assistant", "Hello")]
    with pytest.raises(RequestError, match="closed"):
        conversation.send("more")


def test_a_conversation_nobody_holds_is_collected_with_its_worker(fake_bench):
    conversation = Conversation(fake_bench)
    ask(conversation)
    worker, ref = conversation._worker.thread, weakref.ref(conversation)
    del conversation
    until(lambda: gc.collect() is not None and ref() is None)
    worker.join(SECONDS)
    assert not worker.is_alive()


@pytest.fixture(scope="module")
def real_bench(tmp_path_factory):
    """A small model with random weights, which rarely ends by itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write(train_tokenizer(TEXTS, 320), folder)
    tokenizer = Tokenizer(folder)
    yarn = Yarn(factor=4, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
    config = replace(
        Config.preset("pocket"), vocab_size=320, hidden_size=48, num_hidden_layers=2, max_position_embeddings=256,
        rope_scaling=yarn, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
    )  # fmt: skip
    engine = Engine(Model(config, Random(config, seed=1, std=0.15)), tokenizer, "fp32")
    return SimpleNamespace(name="small", config=config, tokenizer=tokenizer, engine=engine, context=engine.context)


@pytest.fixture
def talk(real_bench):
    conversation = Conversation(real_bench, sampling=Sampling(temperature=1.0, max_tokens=12, seed=3))
    yield conversation
    conversation.close()


def test_the_next_turn_finds_the_whole_last_one_in_the_cache(talk):
    first = ask(talk, "Hello! How are you?")
    second = ask(talk, "And now?")
    known = first.stats["prompt_tokens"] + first.stats["tokens"]
    assert second.stats["reused_tokens"] >= known - 1


def test_a_branch_finds_what_it_keeps_in_the_cache(talk):
    first = ask(talk, "Hello! How are you?")
    other = next(a.token for a in first.steps[6].alternatives if a.token != first.steps[6].token)
    branch = talk.branch(first, 6, other)
    talk.wait(SECONDS)
    assert branch.tokens[:7] == [*first.tokens[:6], other]
    assert branch.stats["reused_tokens"] == first.stats["prompt_tokens"] + 6


def test_with_a_seed_a_reply_repeats_and_without_one_it_varies(talk):
    first = ask(talk, "Hello!")
    second = talk.regenerate()
    talk.wait(SECONDS)
    talk.sampling = Sampling(temperature=1.0, max_tokens=12)
    third = talk.regenerate()
    talk.wait(SECONDS)
    assert first.tokens == second.tokens != third.tokens


def test_a_prompt_over_the_context_is_refused_with_its_text_kept(talk):
    with pytest.raises(RequestError, match="context holds 256"):
        ask(talk, "Hello! " * 200)
    assert talk.path[0].content == "Hello! " * 200
    assert talk.path[1].finish == "error"
    talk.edit(talk.path[0], "Hello!")
    talk.wait(SECONDS)
    assert talk.path[1].steps


def test_a_continued_reply_is_one_reply_for_the_model(talk):
    talk.sampling = Sampling(temperature=0, max_tokens=6)
    whole = Sampling(temperature=0, max_tokens=12)
    reply = ask(talk, "Hello!")
    assert reply.finish == "length"
    talk.continue_()
    talk.wait(SECONDS)
    talk.sampling = whole
    assert ask_again(talk).tokens == reply.tokens


def ask_again(conversation):
    reply = conversation.regenerate()
    conversation.wait(SECONDS)
    return reply
