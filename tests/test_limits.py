"""The limits of an engine: what its caches hold, how much it reads at once, how long a conversation may be."""

import random
from dataclasses import replace

import offload
import pytest
import torch

from workbench.cache import BLOCK, LatentCache, Pool
from workbench.engine import Engine
from workbench.errors import BudgetError, RequestError
from workbench.footprint import Footprint
from workbench.sampling import Sampling
from workbench.window import Window

FORMATS = ["fp32", "bf16", "fp8", "q6", "q6+32", "int4+100"]
GREEDY = Sampling(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model():
    return offload.resident()


@pytest.fixture(autouse=True)
def endless(tokenizer, monkeypatch):
    """No answer here ends before its time, whatever a random model says."""
    monkeypatch.setattr(tokenizer, "eos", -1)


@pytest.fixture
def watch(monkeypatch):
    """watch(engine): from now on no cache grows beyond its budget, whoever makes it grow. Gives the most bytes held."""
    watched, most = [], [0]

    def look(after):
        def then(*args, **options):
            result = after(*args, **options)
            for engine in watched:
                most[0] = max(most[0], held(engine))
                assert held(engine) <= engine.cache_bytes, "the caches outgrew their budget"
            return result

        return then

    monkeypatch.setattr(Pool, "_resize", look(Pool._resize))
    monkeypatch.setattr(Pool, "convert", look(Pool.convert))
    monkeypatch.setattr(Window, "copy", look(Window.copy))
    monkeypatch.setattr(LatentCache, "reserve", look(LatentCache.reserve))
    monkeypatch.setattr(Engine, "new_cache", look(Engine.new_cache))

    def begin(engine):
        watched.append(engine)
        return most

    return begin


def held(engine):
    return sum(pool.nbytes for pool in list(engine.alive) if isinstance(pool, Pool))


def room(engine, tokens, format=None):
    """Bytes of a cache of so many tokens, as the plan counts them."""
    return sum(Footprint(engine.model.config, tokens, 1, format or engine.cache_format).cache.values())


def limited(model, tokenizer, tokens, format="fp32", **options):
    """An engine whose caches have room for so many tokens."""
    engine = Engine(model, tokenizer, format, **options)
    engine.cache_bytes = room(engine, tokens)
    return engine


def some(tokenizer, count):
    return [tokenizer.bos, *(random.randrange(600) for _ in range(count - 1))]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("context", [64, 129])
def test_a_budget_for_the_context_is_enough_for_the_context(context, format, model, tokenizer, watch):
    engine = limited(model, tokenizer, context, format, context=context, chunk=50)
    most = watch(engine)
    for prompt in (some(tokenizer, context - 3), some(tokenizer, context - 20), some(tokenizer, context - 1)):
        done = engine.generate(prompt, Sampling(temperature=1, max_tokens=1000, seed=1))
        assert done.stats.finish in ("context", "eos") and len(prompt) + len(done.tokens) <= context
    assert most[0] == room(engine, context - 1), "the last token is never read"


def test_what_would_outgrow_the_budget_is_refused_and_the_rest_goes_on(model, tokenizer, watch):
    engine, free = limited(model, tokenizer, 128), Engine(model, tokenizer, "fp32")
    watch(engine)
    start = some(tokenizer, 60)
    first = engine.generate(start, GREEDY)
    longer = [*start, *first.tokens, *some(tokenizer, 90)]
    with pytest.raises(BudgetError, match=r"[\d,]+ bytes .* context=.* budget .* cache=") as error:
        engine.generate(longer, GREEDY)
    assert f"{engine.cache_bytes:,}" in str(error.value)
    again = [*start, *first.tokens, *some(tokenizer, 20)]
    done = engine.generate(again, GREEDY)
    assert done.tokens == free.generate(again, GREEDY).tokens
    assert done.stats.reused_tokens >= 60, "the conversation before is still there"
    # in the middle of an answer
    steps = engine.stream(some(tokenizer, 120), replace(GREEDY, max_tokens=100))
    with pytest.raises(BudgetError):
        for _ in steps:
            pass
    assert engine.cache.lengths == [128]
    assert engine.generate(start, GREEDY).tokens == first.tokens


def test_caches_of_ones_own_count_and_give_their_room_back(model, tokenizer, watch):
    engine = limited(model, tokenizer, 256)
    watch(engine)
    own = engine.new_cache(batch=2)
    with torch.inference_mode():
        model(torch.randint(600, (2, 64)), own)
        model(torch.randint(600, (1, 64)), own.only(0))
        with pytest.raises(BudgetError):
            model(torch.randint(600, (2, 65)), own)
    assert own.lengths == [128, 64], "a refused pass changes nothing"
    with pytest.raises(BudgetError):
        engine.generate(some(tokenizer, 70), GREEDY)
    other = own.fork()
    with torch.inference_mode():
        model(torch.randint(600, (1, 64)), other.only(1))
    with pytest.raises(BudgetError):
        engine.generate(some(tokenizer, 5), GREEDY)
    del own, other
    assert len(engine.generate(some(tokenizer, 240), GREEDY).tokens) == 8


# what is lost in a packed cache depends on the last digit, and so on how many are computed together
@pytest.mark.parametrize("format, slots", [("fp32", 1), ("fp32", 3), ("fp32", 8), ("q6", 1)])
def test_a_batch_under_a_small_budget_says_what_it_says_without(format, slots, model, tokenizer, watch):
    lengths = [3, 130, 64, 1, 100, 63, 128]
    prompts = [some(tokenizer, length) for length in lengths]
    each = [Sampling(temperature=0, max_tokens=random.choice([1, 3, 20])) for _ in prompts]
    free = Engine(model, tokenizer, format)
    wanted = [one.tokens for one in free.batch(prompts, each, slots=slots)]
    assert wanted == [Engine(model, tokenizer, format).generate(*both).tokens for both in zip(prompts, each)]
    for tokens in (192, 400):
        engine = limited(model, tokenizer, tokens, format, context=192)
        most = watch(engine)
        engine.generate(prompts[1], GREEDY)  # its room is taken back
        assert [one.tokens for one in engine.batch(prompts, each, slots=slots)] == wanted
        assert 0 < most[0] <= engine.cache_bytes


def test_two_of_a_batch_run_together_where_both_fit(model, tokenizer, monkeypatch):
    engine = limited(model, tokenizer, 128, context=128)
    widths = []
    forward = engine._forward

    def seen(inputs, cache, *rest):
        widths.append((len(inputs), max(map(len, inputs))))
        return forward(inputs, cache, *rest)

    monkeypatch.setattr(engine, "_forward", seen)
    engine.batch([some(tokenizer, 40) for _ in range(4)], Sampling(temperature=0, max_tokens=24), slots=4)
    assert max(rows for rows, width in widths if width == 1) == 2
    widths.clear()
    engine.batch([some(tokenizer, 40) for _ in range(3)], Sampling(temperature=0, max_tokens=25), slots=4)
    assert {rows for rows, _ in widths} == {1}, "each may come to 65 tokens, two blocks"


def test_a_batch_beside_a_stream_that_holds_the_room(model, tokenizer, watch):
    engine = limited(model, tokenizer, 128)
    watch(engine)
    stream = engine.stream(some(tokenizer, 50), replace(GREEDY, max_tokens=14))
    begun = [next(stream).token]
    with pytest.raises(BudgetError):
        engine.batch([some(tokenizer, 60), some(tokenizer, 70)], GREEDY)
    begun += [step.token for step in stream]
    free = Engine(model, tokenizer, "fp32")
    assert begun == free.generate(stream.prompt.tokens, replace(GREEDY, max_tokens=14)).tokens
    del stream
    prompts = [some(tokenizer, 60), some(tokenizer, 70)]
    assert [one.tokens for one in engine.batch(prompts, GREEDY)] == [one.tokens for one in free.batch(prompts, GREEDY)]


def test_a_batch_goes_on_in_its_format(model, tokenizer, watch):
    engine = limited(model, tokenizer, 128, context=128)
    watch(engine)
    prompts = [some(tokenizer, length) for length in (20, 90, 70, 100)]
    answers = engine.answers(prompts, [replace(GREEDY, max_tokens=count) for count in (2, 20, 30, 20)], slots=3)
    done = [next(answers)]
    engine.convert_cache("int4")
    done += answers
    assert sorted(number for number, _ in done) == [0, 1, 2, 3]


def test_windows_of_a_batch_count(model, tokenizer, watch):
    engine = limited(model, tokenizer, 128, "q6+100", context=128)
    watch(engine)
    prompts = [some(tokenizer, length) for length in (20, 90, 5)]
    wanted = [one.tokens for one in Engine(model, tokenizer, "q6+100").batch(prompts, GREEDY)]
    assert [one.tokens for one in engine.batch(prompts, GREEDY)] == wanted


# another format under a budget


@pytest.mark.parametrize("tokens", [128, 200, 256, 400])
@pytest.mark.parametrize("old, new", [("fp32", "q6"), ("fp32", "bf16"), ("bf16", "int4"), ("q6+32", "q6")])
def test_a_smaller_format(old, new, tokens, model, tokenizer, watch):
    engine, free = limited(model, tokenizer, tokens, old, context=128), Engine(model, tokenizer, old)
    watch(engine)
    start = some(tokenizer, 100)
    first = engine.generate(start, GREEDY)
    assert first.tokens == free.generate(start, GREEDY).tokens
    errors = engine.convert_cache(new)
    assert engine.cache_format == new and held(engine) <= engine.cache_bytes
    again = [*start, *first.tokens, *some(tokenizer, 9)]
    if errors:
        free.convert_cache(new)
    else:  # no room for both: the prompt is read again
        free = Engine(model, tokenizer, new)
    done = engine.generate(again, GREEDY)
    assert (done.stats.reused_tokens > 0) == bool(errors)
    assert done.tokens == free.generate(again, GREEDY).tokens


@pytest.mark.parametrize("tokens", [128, 192, 256, 640])
def test_a_larger_format(tokens, model, tokenizer, watch):
    engine = limited(model, tokenizer, tokens, "q6", context=192)
    watch(engine)
    start = some(tokenizer, 60)
    first = engine.generate(start, replace(GREEDY, max_tokens=4))
    engine.convert_cache("fp32")
    assert held(engine) <= engine.cache_bytes
    assert engine.cache_format == "fp32" and len(first.tokens) == 4


# how much at once, and how long


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_a_chunk_bounds_every_pass(chunk, model, tokenizer, monkeypatch):
    widths = []
    shelf = offload.Shelf(model)
    other = offload.offloaded(model, shelf, slots=9)
    engine = Engine(other, tokenizer, "fp32", chunk=chunk)
    forward = other.forward
    monkeypatch.setattr(
        other, "forward", lambda tokens, *a, **k: widths.append(tokens.shape[1]) or forward(tokens, *a, **k)
    )
    prompt = some(tokenizer, 100)
    done = engine.generate(prompt, GREEDY)
    assert max(widths) == min(chunk, 100) and sum(widths) == 100 + len(done.tokens) - 1
    assert done.stats.prefilled_tokens == 100
    assert done.tokens == Engine(model, tokenizer, "fp32", chunk=chunk).generate(prompt, GREEDY).tokens
    engine.batch([prompt, prompt[:50]], GREEDY)
    assert max(widths) == min(chunk, 100)


def test_a_context_ends_prompts_and_answers(model, tokenizer):
    engine = Engine(model, tokenizer, "fp32", context=70)
    for prompt in (some(tokenizer, 70), some(tokenizer, 200)):
        with pytest.raises(RequestError, match="context holds 70"):
            engine.generate(prompt, GREEDY)
        with pytest.raises(RequestError, match="prompt 1"):
            engine.batch([[1], prompt], GREEDY)
    prompt = some(tokenizer, 66)
    alone = engine.generate(prompt, replace(GREEDY, max_tokens=500))
    assert len(alone.tokens) == 4 and alone.stats.finish == "context"
    assert engine.batch([prompt], replace(GREEDY, max_tokens=500))[0].tokens == alone.tokens
    assert Engine(model, tokenizer, "fp32", context=10**6).context == model.config.max_position_embeddings


def test_blocks_are_counted_whole(model, tokenizer):
    engine = Engine(model, tokenizer, "fp32")
    one = room(engine, BLOCK)
    for tokens, budget, fits in ((64, one, True), (65, one, False), (65, 2 * one - 1, False), (65, 2 * one, True)):
        engine.cache_bytes = budget
        cache = engine.new_cache()
        try:
            cache.reserve(tokens)
            assert fits and cache.nbytes <= budget
        except BudgetError:
            assert not fits
        del cache
