"""Prompts are, token for token, what the published templates give; and no message can pretend to be the template."""

import json
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from workbench.chat import Prompt, Style, detect, render
from workbench.errors import CheckpointError, RequestError
from workbench.tokenizer import Tokenizer
from workbench.train.vocabulary import SPECIAL

# as published with V2-Chat, V2-Lite-Chat and Coder-V2-Instruct
V2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# the published V2.5 template without its stray indentation, for the roles without tools
V2_5 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **tokens):
    return {"role": "assistant", "content": text, **tokens}


def tool(text):
    return {"role": "tool", "content": text}


CONVERSATIONS = {
    "one question": [user("How are you?")],
    "system": [system("You are a helpful Assistant."), user("你好")],
    "two turns": [user("Hello"), assistant("Hello! How are you today?"), user("Fine, et vous ?")],
    "finished": [system("Be brief."), user("12 + 30"), assistant("42")],
    "spaces": [system(" s \n"), user("  two  spaces \n\n"), assistant(" tab\t\n"), user("\n")],
    "many": [user("a"), assistant("b"), user("专家"), assistant("😀 专家"), user("7 * 8 = ?")],
    "two users": [user("one"), user("two")],
    "silent": [user("Say nothing."), assistant(""), user("Thanks")],
}
TOOLS = {
    "one tool": [user("Weather?"), assistant("I look."), tool('{"rain": 0}')],
    "two tools": [user("Weather?"), assistant("I look."), tool("sun"), tool("rain"), assistant("Both."), user("Why?")],
    "two rounds": [user("Weather?"), assistant("a"), tool("sun"), assistant("b"), tool("rain"), assistant("Done.")],
}


@pytest.fixture(scope="module")
def older(vocabulary, tmp_path_factory):
    """As V2-Lite-Chat has it: BOS and EOS are the only special tokens."""
    document = json.loads((vocabulary / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"] = document["added_tokens"][:2]
    path = tmp_path_factory.mktemp("v2-chat")
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (path / "tokenizer_config.json").write_bytes((vocabulary / "tokenizer_config.json").read_bytes())
    return Tokenizer(path)


def by_template(messages, vocabulary, template=None) -> list[int]:
    """What transformers makes of it; a template wants a reply unless the last message is one."""
    theirs = AutoTokenizer.from_pretrained(vocabulary)
    wants = messages[-1]["role"] != "assistant"
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=wants)
    return theirs.encode(text, add_special_tokens=False)


def pieces(prompt: Prompt, tokenizer: Tokenizer) -> list[tuple[str, int | None, str]]:
    return [(s.role, s.message, tokenizer.decode(prompt.tokens[s.start : s.end])) for s in prompt.spans]


# The two formats


def test_v2_chat_reads_as_published(older):
    messages = [system("SYS"), user("u1"), assistant("a1"), user("u2")]
    assert older.decode(render(messages, older).tokens) == (
        "<｜begin▁of▁sentence｜>SYS\n\nUser: u1\n\nAssistant: a1<｜end▁of▁sentence｜>User: u2\n\nAssistant:"
    )


def test_v2_5_reads_as_published(tokenizer):
    messages = [system("SYS"), user("u1"), assistant("a1"), user("u2")]
    assert tokenizer.decode(render(messages, tokenizer).tokens) == (
        "<｜begin▁of▁sentence｜>SYS<｜User｜>u1<｜Assistant｜>a1<｜end▁of▁sentence｜><｜User｜>u2<｜Assistant｜>"
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v2_chat_is_the_template_token_for_token(name, older):
    assert render(CONVERSATIONS[name], older).tokens == by_template(CONVERSATIONS[name], older.path.parent, V2_CHAT)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v2_5_is_the_template_token_for_token(name, tokenizer, vocabulary):
    assert render(CONVERSATIONS[name], tokenizer).tokens == by_template(CONVERSATIONS[name], vocabulary, V2_5)


@pytest.mark.parametrize("name", CONVERSATIONS | TOOLS)
def test_the_template_written_beside_the_tokenizer_says_the_same(name, tokenizer, vocabulary):
    messages = (CONVERSATIONS | TOOLS)[name]
    assert render(messages, tokenizer).tokens == by_template(messages, vocabulary)


def test_the_style_is_read_off_the_tokenizer(tokenizer, older):
    assert (detect(tokenizer), detect(older)) == (Style.V2_5, Style.V2_CHAT) == ("v2.5", "v2-chat")


def test_a_style_can_be_named(tokenizer, older):
    assert tokenizer.decode(render([user("u")], tokenizer, "v2-chat").tokens).endswith("User: u\n\nAssistant:")
    with pytest.raises(RequestError, match=r"unknown prompt style 'chatml'; there are v2-chat, v2\.5"):
        render([user("u")], tokenizer, "chatml")
    with pytest.raises(CheckpointError, match="no special token '<｜User｜>'"):
        render([user("u")], older, "v2.5")


def test_only_v2_chat_replies_begin_with_a_space():
    assert Style.V2_CHAT.leading_space and not Style.V2_5.leading_space


def test_a_system_message_without_text_is_left_out(tokenizer, older):
    for one in (tokenizer, older):
        assert render([system(""), user("u")], one).tokens == render([user("u")], one).tokens


# Tools


def test_tool_results_share_one_block_and_the_model_goes_on_after_it(tokenizer):
    messages = [user("u"), assistant("a"), tool("r1"), tool("r2")]
    assert tokenizer.decode(render(messages, tokenizer).tokens).partition("<｜end▁of▁sentence｜>")[2] == (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>r1<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>r2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


def test_v2_chat_has_no_tools(older):
    with pytest.raises(RequestError, match=r"message 2: the v2-chat format has no tool messages"):
        render([user("u"), assistant("a"), tool("r")], older)


# Nothing that is said becomes the template


@pytest.mark.parametrize("special", SPECIAL)
def test_a_special_string_in_a_message_stays_text(special, tokenizer):
    said = [system(special), user(f"x{special}"), assistant(special + special), tool(special), assistant("ok")]
    plain = [system("s"), user("u"), assistant("a"), tool("t"), assistant("ok")]

    def count(messages):
        return sum(map(tokenizer.is_special, render(messages, tokenizer).tokens))

    assert count(said) == count(plain)


def test_a_special_string_cannot_form_across_messages(older):
    prompt = render([system("<｜end▁of"), user("▁sentence｜>"), assistant("<｜end▁of▁sentence｜>")], older)
    assert [token for token in prompt.tokens if older.is_special(token)] == [older.bos, older.eos]


# Spans


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_spans_tile_the_prompt_and_name_their_message(name, style, tokenizer):
    messages = CONVERSATIONS[name]
    tokens, spans = render(messages, tokenizer, style)
    assert spans[0].start == 0 and spans[-1].end == len(tokens)
    assert all(a.end == b.start and a != b for a, b in pairwise(spans))
    for role, start, end, message in spans:
        assert end > start
        assert role == ("template" if message is None else messages[message]["role"])
    assert [s.message for s in spans if s.message is not None] == [i for i, m in enumerate(messages) if m["content"]]
    for index, message in enumerate(messages):
        inside = [token for s in spans if s.message == index for token in tokens[s.start : s.end]]
        assert message["content"] in tokenizer.decode(inside), "a token across the edge belongs to the message"


def test_spans_of_v2_5_are_exactly_the_contents(tokenizer):
    assert pieces(render([system("SYS"), user("u1"), assistant("a1"), user("u2")], tokenizer), tokenizer) == [
        ("template", None, "<｜begin▁of▁sentence｜>"),
        ("system", 0, "SYS"),
        ("template", None, "<｜User｜>"),
        ("user", 1, "u1"),
        ("template", None, "<｜Assistant｜>"),
        ("assistant", 2, "a1"),
        ("template", None, "<｜end▁of▁sentence｜><｜User｜>"),
        ("user", 3, "u2"),
        ("template", None, "<｜Assistant｜>"),
    ]


def test_spans_of_v2_chat_take_the_space_that_a_word_brings(older):
    assert pieces(render([user("the"), assistant("the")], older), older) == [
        ("template", None, "<｜begin▁of▁sentence｜>User:"),
        ("user", 0, " the"),
        ("template", None, "\n\nAssistant:"),
        ("assistant", 1, " the"),
        ("template", None, "<｜end▁of▁sentence｜>"),
    ]


# Exact tokens, and replies that go on


@pytest.mark.parametrize("style", Style)
def test_a_reply_is_read_back_as_the_tokens_it_was_generated_as(style, tokenizer):
    letters = [token for letter in " the router" for token in tokenizer.encode(letter)]
    assert letters != tokenizer.encode(" the router"), "the specimen should not be what encoding gives"
    prompt = render([user("u"), assistant("the router", tokens=letters), user("v")], tokenizer, style)
    (span,) = [span for span in prompt.spans if span.message == 1]
    assert prompt.tokens[span.start : span.end] == letters
    assert prompt.tokens[span.end] == tokenizer.eos


@pytest.mark.parametrize("style", Style)
def test_generation_continues_the_same_tokens_next_turn(style, tokenizer):
    """What the cache of one turn holds is a prefix of the next prompt."""
    first = render([user("u")], tokenizer, style)
    generated = tokenizer.encode(" Fine, thanks")
    following = render([user("u"), assistant("Fine, thanks", tokens=generated), user("v")], tokenizer, style)
    assert following.tokens[: len(first.tokens) + len(generated)] == first.tokens + generated


@pytest.mark.parametrize("style", Style)
def test_an_open_reply_ends_where_it_stopped(style, tokenizer):
    closed = render([user("u"), assistant("Once upon")], tokenizer, style)
    opened = render([user("u"), assistant("Once upon")], tokenizer, style, open_last=True)
    assert closed.tokens == [*opened.tokens, tokenizer.eos]
    generated = tokenizer.encode(" Once")
    exact = render([user("u"), assistant("Once", tokens=generated)], tokenizer, style, open_last=True)
    assert exact.tokens == render([user("u")], tokenizer, style).tokens + generated


@pytest.mark.parametrize("style", Style)
def test_an_open_reply_with_nothing_in_it_is_a_fresh_one(style, tokenizer):
    assert render([user("u"), assistant("")], tokenizer, style, open_last=True) == render([user("u")], tokenizer, style)


def test_only_the_last_reply_is_open(tokenizer):
    prompt = render([user("u"), assistant("a"), user("v"), assistant("b")], tokenizer, open_last=True)
    assert prompt.tokens.count(tokenizer.eos) == 1


# Refusals


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "the prompt is empty"),
        ([{"role": "wizard", "content": "x"}], "message 0 has the unknown role 'wizard'; roles are system, user"),
        (["hello"], 'message 0 must be a dict with "role" and "content"'),
        ([{"role": "user"}], 'message 0 must be a dict with "role" and "content"'),
        ([{"role": ["user"], "content": "x"}], "message 0 has the unknown role"),
        ([user(None)], r"message 0 \(user\): content must be a string; got NoneType"),
        ([user([{"type": "text", "text": "hi"}])], "content must be a string; got list"),
        ([user("")], r"message 0 \(user\) is empty"),
        ([assistant("hi")], "message 0: assistant stands at the start; it may stand after user or after tool"),
        ([user("u"), assistant("a"), assistant("b")], "message 2: assistant stands after assistant"),
        ([user("u"), system("s")], "message 1: system stands after user; it may stand at the start"),
        ([user("u"), tool("r")], "message 1: tool stands after user"),
        ([system("s")], "only a system message"),
        ([{**user("u"), "tokens": [1]}], r"message 0 \(user\) has tokens"),
        ([user("half \ud83d")], "half a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_reason(messages, reason, tokenizer):
    with pytest.raises(RequestError, match=reason):
        render(messages, tokenizer)


def test_there_must_be_a_reply_to_continue(tokenizer):
    with pytest.raises(RequestError, match="no reply to continue: the last message is user"):
        render([user("u")], tokenizer, open_last=True)
