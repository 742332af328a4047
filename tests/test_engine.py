"""Streams and batches: the same text either way, prefixes reused, stops obeyed, bad requests refused without loss."""

import threading
from dataclasses import replace

import pytest
import torch

from workbench.chat import render
from workbench.checkpoint import Random
from workbench.config import Config, Yarn
from workbench.engine import CHUNK, Engine
from workbench.errors import RequestError
from workbench.model import Model
from workbench.sampling import Sampling

HELLO = [{"role": "user", "content": "Hello, how are you?"}]
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def small(tokenizer):
    config = replace(
        Config.preset("pocket"),
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=2,
        max_position_embeddings=1400,
        rope_scaling=Yarn(factor=4, original_max_position_embeddings=350, mscale=0.707, mscale_all_dim=0.707),
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
    )
    return Model(config, Random(config, seed=1, std=0.15))


@pytest.fixture
def engine(small, tokenizer):
    return Engine(small, tokenizer, "fp32")


def text_of(stream):
    return "".join(step.text for step in stream) + stream.stats.tail


def test_a_stream_is_what_the_model_says_one_token_after_the_other(engine, small):
    stream = engine.stream(HELLO, GREEDY)
    tokens = list(stream.prompt.tokens)
    for step in stream:
        logits = small(torch.tensor([tokens]))[0, -1]
        assert step.token == logits.argmax()
        assert step.choice.logprob == pytest.approx(logits.log_softmax(-1)[step.token].item(), abs=1e-4)
        assert step.position == len(tokens)
        tokens.append(step.token)
    assert step.finish == stream.stats.finish == "length"
    assert stream.stats.tokens == GREEDY.max_tokens


def test_text_of_the_steps_is_the_text_of_the_tokens(engine, tokenizer):
    done = engine.generate(HELLO, Sampling(temperature=1.5, top_p=1, max_tokens=60, seed=3))
    assert done.text == tokenizer.decode(done.tokens, special=False)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine):
    hot = Sampling(temperature=1.2, top_p=1, max_tokens=20, seed=5)
    first, again, other = (engine.generate(HELLO, one) for one in (hot, hot, replace(hot, seed=6)))
    assert first.tokens == again.tokens != other.tokens
    assert first.stats.seed == 5
    unseeded = engine.generate(HELLO, replace(hot, seed=None))
    assert engine.generate(HELLO, replace(hot, seed=unseeded.stats.seed)).tokens == unseeded.tokens


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_batch_gives_each_prompt_the_answer_it_gets_alone(engine, slots):
    prompts = ["Hello", HELLO, "The cache remembers one short latent vector. " * 9, [engine.tokenizer.bos], "你好！"]
    settings = [
        # few candidates: among the many unlikely ones, ties to the last digit would let rounding choose
        Sampling(temperature=1, top_p=1, top_k=8, max_tokens=n, seed=n, stop=("e",) * (n == 9))
        for n in (3, 9, 14, 1, 30)
    ]
    together = engine.batch(prompts, settings, slots=slots)
    for prompt, one, done in zip(prompts, settings, together, strict=True):
        alone = engine.generate(prompt, one)
        assert (done.tokens, done.text, done.stats.finish) == (alone.tokens, alone.text, alone.stats.finish)
        assert [s.choice.logprob for s in done.steps] == pytest.approx(
            [s.choice.logprob for s in alone.steps], abs=1e-4
        )
        assert done.prompt_tokens == alone.prompt_tokens


def test_the_next_turn_reads_only_what_is_new(engine, tokenizer):
    first = engine.generate(HELLO, GREEDY)
    turns = [*HELLO, {"role": "assistant", "content": first.text, "tokens": first.tokens}]
    turns.append({"role": "user", "content": "And the cache?"})
    second = engine.stream(turns, GREEDY)
    answer = text_of(second)
    shared = first.prompt_tokens + len(first.tokens) - 1  # the last token was sampled, never read
    assert second.stats.reused_tokens == shared
    assert second.stats.prefilled_tokens == len(second.prompt.tokens) - shared
    assert Engine(engine.model, tokenizer, "fp32").generate(turns, GREEDY).text == answer


def test_asking_the_same_again_reads_one_token(engine):
    first = engine.generate(HELLO, GREEDY)
    again = engine.generate(HELLO, GREEDY)
    assert again.stats.prefilled_tokens == 1
    assert again.text == first.text


def test_a_prompt_in_chunks_is_the_prompt_at_once(engine, small):
    tokens = torch.randint(0, 580, (2 * CHUNK + 77,), generator=torch.Generator().manual_seed(2)).tolist()
    step = next(iter(engine.stream(tokens, GREEDY)))
    logits = small(torch.tensor([tokens]))[0, -1]
    assert step.choice.logprob == pytest.approx(logits.log_softmax(-1)[step.token].item(), abs=1e-4)


def test_stop_between_tokens_computes_no_further_one_and_keeps_the_cache(engine):
    stop = threading.Event()
    stream = engine.stream(HELLO, Sampling(temperature=0, max_tokens=50), stop=stop)
    said = [next(stream) for _ in range(3)]
    stop.set()
    assert list(stream) == []
    assert stream.stats.finish == "stopped"
    assert stream.stats.tokens == len(said)
    assert engine.generate(HELLO, GREEDY).stats.reused_tokens == len(stream.prompt.tokens) - 1


def test_stop_during_the_prompt_ends_at_the_next_chunk(engine, monkeypatch):
    stop = threading.Event()
    forward = engine._forward

    def stopping(tokens, cache, probe):
        stop.set()
        return forward(tokens, cache, probe)

    monkeypatch.setattr(engine, "_forward", stopping)
    stream = engine.stream("Hello " * 300, GREEDY, stop=stop)
    assert len(stream.prompt.tokens) > CHUNK
    assert list(stream) == []
    assert (stream.stats.finish, stream.stats.prefilled_tokens) == ("stopped", CHUNK)
    monkeypatch.undo()
    assert engine.generate("Hello " * 300, GREEDY).stats.reused_tokens == CHUNK


def test_what_was_held_back_for_a_stop_string_is_not_lost(engine, tokenizer):
    free = engine.generate(HELLO, Sampling(temperature=0, max_tokens=8))
    stop = threading.Event()
    watched = Sampling(temperature=0, max_tokens=8, stop=(free.text + "never",))
    stream = engine.stream(HELLO, watched, stop=stop)
    shown = "".join(next(stream).text for _ in range(5))
    stop.set()
    list(stream)
    assert shown == ""
    assert stream.stats.tail == tokenizer.decode(free.tokens[:5], special=False)


def test_a_stop_string_ends_the_text_before_it(engine):
    free = engine.generate(HELLO, Sampling(temperature=0, max_tokens=30))
    mark = free.text[4:7]
    done = engine.generate(HELLO, Sampling(temperature=0, max_tokens=30, stop=(mark,)))
    assert done.stats.finish == "stop"
    assert done.text == free.text[: free.text.index(mark)]


def test_the_end_mark_ends_the_answer_and_is_not_shown(engine, tokenizer, monkeypatch):
    forward = engine._forward

    def ending(tokens, cache, probe):
        logits = forward(tokens, cache, probe).clone()
        if cache.lengths[0] > 20:
            logits[:, tokenizer.eos] = 99
        return logits

    monkeypatch.setattr(engine, "_forward", ending)
    done = engine.generate(HELLO, Sampling(temperature=0, max_tokens=50))
    assert done.stats.finish == "eos"
    assert done.steps[-1].token == tokenizer.eos not in done.tokens
    assert done.text == tokenizer.decode(done.tokens)


def test_the_window_ends_the_answer(engine):
    tokens = [engine.tokenizer.bos] + [7] * (engine.context - 4)
    done = engine.generate(tokens, Sampling(temperature=0, max_tokens=50))
    assert (done.stats.finish, len(done.tokens)) == ("context", 3)


def test_an_open_reply_is_continued_where_it_was(engine, tokenizer):
    whole = engine.generate(HELLO, Sampling(temperature=0, max_tokens=16))
    half = whole.tokens[:7]
    turns = [*HELLO, {"role": "assistant", "content": tokenizer.decode(half), "tokens": half}]
    rest = engine.generate(turns, Sampling(temperature=0, max_tokens=9), open_last=True)
    assert half + rest.tokens == whole.tokens


def test_a_reply_cut_inside_a_character_is_completed(engine, tokenizer, monkeypatch):
    tokens = tokenizer.encode("🐼!")
    assert len(tokens) > 4
    forward, position = engine._forward, iter(tokens[2:])

    def saying(*args):
        logits = forward(*args).clone()
        logits[:, next(position)] = 99
        return logits

    monkeypatch.setattr(engine, "_forward", saying)
    turns = [*HELLO, {"role": "assistant", "content": "", "tokens": tokens[:2]}]
    rest = engine.generate(turns, Sampling(temperature=0, max_tokens=len(tokens) - 2), open_last=True)
    assert rest.text == "🐼!"


def test_two_streams_at_once_do_not_disturb_each_other(engine):
    alone = engine.generate(HELLO, GREEDY).tokens
    other = engine.generate("你好", GREEDY).tokens
    a, b = engine.stream(HELLO, GREEDY), engine.stream("你好", GREEDY)
    pairs = list(zip(a, b, strict=True))
    assert [x.token for x, _ in pairs] == alone
    assert [y.token for _, y in pairs] == other


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([{"role": "user", "content": ""}], "empty"),
        ([{"role": "wizard", "content": "hi"}], "wizard"),
        ([599, 600], "600"),
        ("word " * 2000, "context"),
        ([*HELLO, {"role": "assistant", "content": "Well"}], "open_last"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_cache_is_kept(engine, prompt, words):
    engine.generate(HELLO, GREEDY)
    with pytest.raises(RequestError, match=words):
        engine.stream(prompt, GREEDY)
    with pytest.raises(RequestError, match=f"prompt 1: .*{words}"):
        engine.batch([HELLO, prompt])
    assert engine.generate(HELLO, GREEDY).stats.prefilled_tokens == 1


def test_bytes_in_the_steps_are_the_bytes_held(engine):
    config = engine.model.config
    for step in engine.stream([engine.tokenizer.bos] * 60, Sampling(temperature=0, max_tokens=10)):
        blocks = -(-step.position // 64)
        assert step.cache_bytes == blocks * 64 * config.latent_width * 4 * config.num_hidden_layers


def test_an_error_in_the_middle_leaves_the_engine_usable(engine, monkeypatch):
    wanted = engine.generate(HELLO, GREEDY).tokens
    forward, calls = engine._forward, []

    def failing(tokens, cache, probe):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return forward(tokens, cache, probe)

    monkeypatch.setattr(engine, "_forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate("Another text", GREEDY)
    monkeypatch.undo()
    assert engine.generate(HELLO, GREEDY).tokens == wanted


def test_role_spans_come_with_the_stream(engine, tokenizer):
    assert engine.stream(HELLO, GREEDY).prompt == render(HELLO, tokenizer)
