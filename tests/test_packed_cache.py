"""A cache in every format: what it holds, what attention makes of it, and what changing it costs a conversation."""

import gc
import random
from dataclasses import replace
from itertools import permutations
from threading import Thread

import pytest
import torch
from caches import CONFIG, read, rows, write
from torch.utils._python_dispatch import TorchDispatchMode

import workbench as wb
import workbench.model
from workbench import ops
from workbench.cache import BLOCK, LatentCache, Pool
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.engine import CHUNK, Engine
from workbench.errors import RequestError
from workbench.formats import CACHE_FORMATS, Packed, Row, cache_format
from workbench.model import Model
from workbench.opening import open_model
from workbench.sampling import Sampling

ROW = Row(CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim)
LAYERS = CONFIG.num_hidden_layers
WINDOWS = ["q6+64", "int4+5", "fp8+1"]
PACKED = [name for name, format in CACHE_FORMATS.items() if isinstance(format, Packed)]
EVERY = [*CACHE_FORMATS, *WINDOWS]
NAMES = ["lite", "v2", "released_widths"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def garbage():
    """Memory that nobody has written holds NaN and the largest numbers there are."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stored(name, x, row=ROW):
    """What comes back of rows that are packed, in fp32."""
    format = cache_format(name)
    return format.unpack(format.pack(x, row), row, torch.float32).clone()


def tensors_alive():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


def storages(tensors):
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


# bytes


def test_bytes_are_what_is_allocated():
    before = tensors_alive()  # held, so that no address is used twice
    total, families = 0, []
    for name in EVERY:
        cache = LatentCache(CONFIG, batch=2, format=name)
        write(cache, rows(cache, 100))
        write(cache.only(1), rows(cache.only(1), 30))
        fork = cache.fork()
        write(fork, rows(fork, 1))
        blocks = 2 + 3 + 2  # and a copy of the last one of each, for the fork
        windows = 4 * cache_format(name).recent * ROW.width * 2 * LAYERS
        assert cache.blocks == blocks
        assert cache.nbytes == fork.nbytes == blocks * BLOCK * LAYERS * cache_format(name).nbytes(ROW) + windows
        total += cache.nbytes
        families.append((cache, fork))
    new = storages(tensors_alive())
    for address in storages(before):
        new.pop(address, None)
    places = [sequence.where for family in families for each in family for sequence in each.sequences]
    for address in storages(each for each in places if isinstance(each, torch.Tensor)):
        del new[address]  # numbers of rows, where blocks are no neighbours
    assert sum(new.values()) == total


@pytest.mark.parametrize(("name", "taken"), [("bf16", 69120), ("fp8", 39360), ("int8", 34800), ("q6", 26160)])
def test_a_token_of_v2_takes_what_the_arithmetic_says(name, taken):
    cache = LatentCache(Config.preset("v2"), format=name)
    cache.reserve(128)
    assert cache.nbytes == 128 * taken


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_goes_with_its_sequence(name):
    cache = LatentCache(CONFIG, format=name)
    write(cache, rows(cache, 70))
    held, size = cache.nbytes, cache_format(name).recent * ROW.width * 2 * LAYERS
    forks = [cache.fork(), cache.fork()]
    assert cache.nbytes == held + 2 * size
    forks.pop()
    assert cache.nbytes == held + size
    forks.append(forks)  # only the garbage collector ends it
    del forks
    gc.collect()
    assert cache.nbytes == held


def test_a_window_is_not_longer_than_the_context():
    wide = LatentCache(CONFIG, format="q6+1000000000")
    new = rows(wide, 320)
    write(wide, new)
    assert torch.equal(read(wide), new[:, 0].bfloat16().float())
    assert wide.nbytes == 320 * LAYERS * (cache_format("q6").nbytes(ROW) + 2 * ROW.width)


# rows, against a list


class Naive:
    """One sequence as lists: `packed` of all tokens, `wide` of the last ones by position. A row is [layers, W]."""

    def __init__(self, name, packed=(), wide=()):
        self.name, self.packed, self.wide = name, list(packed), dict(wide)

    def copy(self):
        return Naive(self.name, self.packed, self.wide)

    def write(self, new):
        for row, packed in zip(new, stored(self.name, new)):  # [T, layers, W]
            self._pass(len(self.packed), row)
            self.packed.append(packed)

    def interrupt(self, new):
        """A pass that wrote something and did not end."""
        for position, row in enumerate(new, len(self.packed)):
            self._pass(position, row)
        self.truncate(len(self.packed))

    def _pass(self, position, row):
        if recent := cache_format(self.name).recent:
            self.wide[position] = row.bfloat16().float()
            self.wide.pop(position - recent, None)

    def truncate(self, length):
        del self.packed[length:]
        self.wide = {position: row for position, row in self.wide.items() if position < length}

    def convert(self, name):
        self.packed = [*stored(name, torch.stack(self.packed))] if self.packed else []
        self.name = name

    def rows(self):
        """[layers, S, W]"""
        each = [self.wide.get(position, row) for position, row in enumerate(self.packed)]
        return torch.stack(each, 1) if each else torch.empty(LAYERS, 0, ROW.width)


def assert_same(cache, naive):
    assert cache.lengths == [len(each.packed) for each in naive]
    for sequence, each in enumerate(naive):
        assert torch.equal(read(cache, sequence), each.rows())


def assert_chunks_are_rows(cache, dtype=torch.float32):
    for sequence in range(cache.batch):
        whole = cache.rows(1, sequence, dtype)
        for size in (1, 7, 64, 1000):
            chunks = list(cache.chunks(1, sequence, dtype, size))
            assert torch.equal(torch.cat([whole[:0], *chunks]), whole)
            assert all(len(chunk) > 0 for chunk in chunks)
            assert len(chunks) <= 1 or max(map(len, chunks)) <= size


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", EVERY)
def test_whatever_happens_to_a_cache_happens_to_a_list(name, seed, garbage):
    """Appends of any size, cuts, forks of forks, some that are dropped, passes that are interrupted, conversions."""
    dice = random.Random(f"{name} {seed}")
    family = [(LatentCache(CONFIG, batch=2, format=name), [Naive(name), Naive(name)])]
    for number in range(30):
        cache, naive = family[place := dice.randrange(len(family))]
        room = 320 - max(cache.lengths)
        count = min(room, dice.choice([1, 1, 3, 4, 5, 6, 20, 63, 64, 65, 130]))
        new = rows(cache, count, seed=number)
        match dice.choice(["write"] * 4 + ["one", "interrupt", "truncate", "cut one", "fork", "drop", "convert"]):
            case "write" if count:
                write(cache, new)
                for sequence, each in enumerate(naive):
                    each.write(new[:, sequence].transpose(0, 1))
            case "one" if count:
                sequence = dice.randrange(2)
                write(cache.only(sequence), new[:, sequence : sequence + 1])
                naive[sequence].write(new[:, sequence].transpose(0, 1))
            case "interrupt" if count:
                cache.reserve(count)
                layers = dice.randrange(LAYERS)
                for layer in range(layers):
                    cache.append(layer, new[layer])
                for sequence, each in enumerate(naive):
                    each.interrupt(new[:, sequence].transpose(0, 1) if layers else ())
            case "truncate":
                length = dice.randint(0, min(cache.lengths))
                cache.truncate(length)
                for each in naive:
                    each.truncate(length)
            case "cut one":
                sequence = dice.randrange(2)
                length = dice.randint(0, cache.lengths[sequence])
                cache.truncate(length, sequence)
                naive[sequence].truncate(length)
            case "fork" if len(family) < 4:
                family.append((cache.fork(), [each.copy() for each in naive]))
            case "drop" if len(family) > 1:
                del cache, naive, family[place]
            case "convert" if name in CACHE_FORMATS:
                other = dice.choice(list(CACHE_FORMATS))
                if other != cache.format:
                    cache.convert(other)
                    for each in (each for _, naive in family for each in naive):
                        each.convert(other)
        for cache, naive in family:
            assert_same(cache, naive)
        format, blocks = cache.pool.format, cache.blocks
        used = {block for cache, _ in family for sequence in cache.sequences for block in sequence.table}
        assert blocks == max(used, default=-1) + 1
        used = sum(sequence.window is not None for cache, _ in family for sequence in cache.sequences)
        assert used >= sum(length > 0 for cache, _ in family for length in cache.lengths) or not format.recent
        windows = used * format.recent * ROW.width * 2 * LAYERS
        assert cache.nbytes == blocks * BLOCK * LAYERS * format.nbytes(ROW) + windows
    for cache, _ in family:
        for sequence in cache.sequences:
            sequence.locate(sequence.length, cache.pool.device)
        assert_chunks_are_rows(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_chunks_in_the_order_of_positions_are_the_rows(name, dtype):
    cache = LatentCache(CONFIG, batch=2, format=name)
    assert list(cache.chunks(0, 0, dtype, 64)) == []
    for count in (70, 80, 9):  # blocks of both sequences take turns
        write(cache, rows(cache, count, seed=count))
        assert_chunks_are_rows(cache, dtype)
    assert cache.rows(0, 0, dtype).dtype == dtype


@pytest.mark.parametrize("name", EVERY)
def test_rows_do_not_depend_on_the_size_of_a_pass(name):
    together, apart = (LatentCache(CONFIG, format=name) for _ in range(2))
    new = rows(together, 200)
    write(together, new)
    for part in new.split([1, 63, 64, 2, 69, 1], 2):
        write(apart, part)
    assert torch.equal(read(together), read(apart))


@pytest.mark.parametrize("tokens", [3, 64, 200])
def test_an_interrupted_pass_does_not_cost_the_next_one_its_window(tokens):
    cache = LatentCache(CONFIG, format="q6+64")
    write(cache, rows(cache, 100))
    cache.reserve(tokens)
    cache.append(0, rows(cache, tokens, seed=1)[0])
    new = rows(cache, 10, seed=2)
    write(cache, new)
    assert torch.equal(read(cache)[:, 100:], new[:, 0].bfloat16().float())


@pytest.mark.parametrize("name", ["fp32", "q6", "int4+5"])
def test_a_fork_or_a_cut_can_be_read_at_once(name):
    cache = LatentCache(CONFIG, format=name)
    write(cache, rows(cache, 150))
    whole = cache.rows(0, 0, torch.float32).clone()
    fork = cache.fork()
    assert torch.equal(fork.rows(0, 0, torch.float32), whole)
    cache.truncate(70)
    assert torch.equal(cache.rows(0, 0, torch.float32)[:64], stored(name, rows(cache, 150)[0, 0, :64]))
    assert len(cache.rows(0, 0, torch.float32)) == 70
    assert torch.equal(fork.rows(0, 0, torch.float32), whole)


# conversion


def relative(after, before):
    return (after - before).double().norm().item() / before.double().norm().item()


@pytest.mark.parametrize(("old", "new"), [*permutations(CACHE_FORMATS, 2)])
def test_converting_packs_what_was_unpacked_and_says_what_that_cost(old, new, garbage):
    cache = LatentCache(CONFIG, batch=2, format=old)
    write(cache, rows(cache, 100))
    fork = cache.fork()
    write(fork, 3 * rows(fork, 50, seed=1))
    cache.truncate(80)
    cache.reserve(3)  # by a pass that was interrupted
    before = [read(fork, 0), read(fork, 1), read(cache, 0), read(cache, 1)]
    errors = cache.convert(new)

    assert cache.format == fork.format == new
    assert cache.nbytes == cache.blocks * BLOCK * LAYERS * CACHE_FORMATS[new].nbytes(ROW)
    after = [read(fork, 0), read(fork, 1), read(cache, 0), read(cache, 1)]
    assert all(torch.equal(a, stored(new, b)) for a, b in zip(after, before))
    # a row that both share counts once; the block that the fork wrote to is its own, all of it
    own = [each[:, 64:] for each in before[2:]]
    every = torch.cat([*before[:2], *own], 1)
    for layer, found in enumerate(errors):
        wanted = [relative(stored(new, every)[layer][:, at], every[layer][:, at]) for at in (slice(24), slice(24, 32))]
        assert found == pytest.approx(wanted, rel=1e-5)
    assert all(error == 0 for each in errors for error in each) == (new == "fp32")

    write(cache, rows(cache, 5, seed=2))
    assert torch.equal(read(cache)[:, :80], after[2])
    assert torch.equal(read(cache)[:, 80:], stored(new, rows(cache, 5, seed=2)[:, 0]))
    assert torch.equal(read(fork), after[0])


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_converting_to_the_same_changes_nothing(name):
    cache = LatentCache(CONFIG, format=name)
    write(cache, rows(cache, 70))
    before = read(cache)
    assert cache.convert(name) == [(0, 0)] * LAYERS
    assert torch.equal(read(cache), before)


def test_an_empty_cache_is_converted_for_what_comes():
    cache = LatentCache(CONFIG, format="fp32")
    assert cache.convert("q6") == [(0, 0)] * LAYERS
    write(cache, rows(cache, 70))
    assert torch.equal(read(cache), stored("q6", rows(cache, 70)[:, 0]))


@pytest.mark.parametrize(("old", "new"), [("q6", "q6+64"), ("q6+64", "q6"), ("q6+64", "q6+5"), ("bf16", "int4+5")])
def test_windows_are_not_converted(old, new):
    cache = LatentCache(CONFIG, format=old)
    write(cache, rows(cache, 70))
    before = read(cache)
    with pytest.raises(RequestError, match="made anew"):
        cache.convert(new)
    assert cache.format == old and torch.equal(read(cache), before)


def test_an_interrupted_conversion_leaves_the_cache_as_it_was(monkeypatch):
    cache = LatentCache(CONFIG, format="fp32")
    new = rows(cache, 70)
    write(cache, new)
    pack, calls = Packed.pack, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(Packed, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.convert("q6")
    assert cache.format == "fp32" and torch.equal(read(cache), new[:, 0])


# attention


def attention(query, key, value, scale):
    """In float64, one head of one query after the other."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    past = key.shape[1] - query.shape[1]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        own = h if key.shape[2] > 1 else 0
        weights = (key[b, : past + t + 1, own] @ query[b, t, h] * scale).softmax(0)
        out[b, t, h] = weights @ value[b, : past + t + 1, own]
    return out


@pytest.mark.parametrize("shared", [True, False], ids=["one key", "a key a head"])
@pytest.mark.parametrize("seed", range(12))
def test_attention_in_parts_is_attention(seed, shared):
    dice = random.Random(seed)
    batch, new, heads, width, values = (dice.randint(1, n) for n in (3, 20, 4, 24, 24))
    length = new + dice.choice([0, 0, 1, 17, 40])
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, new, heads, width, generator=draw) * dice.choice([1, 1, 30])  # 30: all but one are 0
    key = torch.randn(batch, length, 1 if shared else heads, width, generator=draw)
    value = torch.randn(batch, length, 1 if shared else heads, values, generator=draw)
    wanted = attention(query, key, value, 0.4)
    assert torch.allclose(ops.attend(query, key, value, 0.4).double(), wanted, atol=1e-5)
    for size in (1, 3, dice.randint(2, 9), length - 1, length, length + 5):
        parts = zip(key.split(max(1, size), 1), value.split(max(1, size), 1))
        found = ops.attend_in_parts(query, parts, length, 0.4)
        assert found.dtype == query.dtype and torch.allclose(found.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("rising", [1, -1])
def test_parts_with_ever_larger_scores_do_not_overflow(rising):
    key = torch.arange(-300.0, 300.0)[None, :, None, None] * rising
    value, query = torch.randn(1, 600, 1, 3), torch.full((1, 2, 1, 1), 5.0)
    found = ops.attend_in_parts(query, zip(key.split(7, 1), value.split(7, 1)), 600, 1.0)
    assert torch.allclose(found.double(), attention(query, key, value, 1.0), atol=1e-5)


def test_attention_in_parts_keeps_the_type_of_the_query():
    query, key, value = (torch.randn(1, n, 2, 8).bfloat16() for n in (3, 50, 50))
    found = ops.attend_in_parts(query, zip(key.split(9, 1), value.split(9, 1)), 50, 0.3)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), attention(query, key, value, 0.3), atol=0.02)


def filled(layer, name, lengths, seed=0):
    """A cache of that many tokens, of the sizes that the model's own rows have; `layer` alone is written."""
    cache = LatentCache(layer.config, batch=len(lengths), format=name)
    for sequence, length in enumerate(lengths):
        one = cache.only(sequence)
        new = torch.randn(1, length, layer.config.latent_width, generator=torch.Generator().manual_seed(seed + length))
        one.reserve(length)
        one.append(layer.layer, new)
        one.advance(length)
    return cache


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("new", [1, 75])
@pytest.mark.parametrize("case", NAMES)
def test_recall_is_attention_on_the_unpacked_rows(case, new, form, model, monkeypatch):
    layer = model(case).blocks[1].attention
    config, forms = layer.config, {"absorbed": layer.absorbed, "expanded": layer.expanded}
    monkeypatch.setattr(ops, "PART", 64)
    monkeypatch.setattr(workbench.model, "absorbing_is_cheaper", lambda *_: form == "absorbed")
    draw = torch.Generator().manual_seed(new)
    content = torch.randn(2, new, config.num_attention_heads, config.qk_nope_head_dim, generator=draw)
    position = torch.randn(2, new, config.num_attention_heads, config.qk_rope_head_dim, generator=draw)
    for name in EVERY:
        cache = filled(layer, name, (300, 131))
        for sequence in range(2):
            mine = content[sequence : sequence + 1], position[sequence : sequence + 1]
            unpacked = cache.rows(layer.layer, sequence, torch.float32)[None]
            found = layer.recall(*mine, cache, sequence)
            for made in forms.values():
                wanted = made(*mine, unpacked)
                assert torch.allclose(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_in_bf16_reads_any_format(name, checkpoint, monkeypatch):
    layer = open_model(checkpoint("lite").path, dtype=torch.bfloat16).blocks[0].attention
    monkeypatch.setattr(ops, "PART", 64)
    cache = filled(layer, name, (200,))
    content, position = torch.randn(1, 5, 4, 16).bfloat16(), torch.randn(1, 5, 4, 16).bfloat16()
    wanted = layer.float().expanded(content.float(), position.float(), cache.rows(0, 0, torch.float32)[None])
    found = layer.bfloat16().recall(content, position, cache, 0)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.03 * wanted.norm()


class Largest(TorchDispatchMode):
    """The most bytes that an operation allocated at once."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in self._tensors(args)}
        for each in self._tensors([out]):
            if each.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return out

    def _tensors(self, values):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from self._tensors(value)


CONTEXT = 1100  # of the 1280 that lite has


def largest_of_a_pass(model, name, new, part, monkeypatch, cut=False):
    """Bytes of the largest tensor made while `new` tokens read those before them."""
    monkeypatch.setattr(ops, "PART", part)
    config = model.config
    cache = LatentCache(config, batch=1 + cut, format=name)
    tokens = torch.arange(CONTEXT)[None].expand(1 + cut, -1) % config.vocab_size
    if cut:
        model(tokens[:, :64], cache)  # then blocks take turns, so that rows do not lie side by side
    model(tokens[:, cache.lengths[0] : -new], cache)
    cache = cache.only(0)
    cache.reserve(new)  # growing is not what is looked at
    with Largest() as largest:
        model(tokens[:1, -new:], cache)
    return largest.nbytes


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("name", [*PACKED, "q6+64", "bf16"])
@pytest.mark.usefixtures("by_operation")
def test_packed_rows_are_never_unpacked_all_at_once(name, new, form, model, monkeypatch):
    """bf16 beside them: a model in fp32 has to convert it."""
    monkeypatch.setattr(workbench.model, "absorbing_is_cheaper", lambda *_: form == "absorbed")
    unpacked = CONTEXT * model("lite").config.latent_width * 4
    assert largest_of_a_pass(model("lite"), name, new, 64, monkeypatch) < unpacked / 2
    if name == "q6":
        assert largest_of_a_pass(model("lite"), name, new, 2048, monkeypatch) >= unpacked  # so this would be noticed


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.usefixtures("by_operation")
def test_a_row_that_needs_no_unpacking_is_not_copied(name, checkpoint, monkeypatch):
    dtype = CACHE_FORMATS[name].dtype
    narrow = open_model(checkpoint("lite").path, dtype=dtype)
    size = CONTEXT * narrow.config.latent_width * dtype.itemsize
    assert largest_of_a_pass(narrow, name, 1, 64, monkeypatch) < size / 4
    assert largest_of_a_pass(narrow, name, 1, 2048, monkeypatch, cut=True) >= size  # so this would be noticed


# a conversation

HELLO = [{"role": "user", "content": "Hello, how are you?"}]
LONG = "The cache remembers one short latent vector. " * 9
GREEDY = Sampling(temperature=0, max_tokens=12)
# what a format may change a log-probability by, on this model
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03, "fp8": 0.3, "int8": 0.1, "q6": 0.9, "int6": 0.5, "int4": 0.9, "q6+64": 0.9}


@pytest.fixture(scope="module")
def small(tokenizer):
    config = replace(
        Config.preset("pocket"),
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=2,
        max_position_embeddings=1400,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
    )
    return Model(config, Random(config, seed=1, std=0.15))


@pytest.fixture
def engine(small, tokenizer):
    return Engine(small, tokenizer, "fp32")


def following(first):
    answer = {"role": "assistant", "content": first.text, "tokens": first.tokens}
    return [*HELLO, answer, {"role": "user", "content": "And the cache?"}]


def logprobs(answer):
    return [step.choice.logprob for step in answer.steps]


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_a_conversation_goes_on_in_another_format(name, engine, small):
    first = engine.generate(HELLO, GREEDY)
    errors = engine.convert_cache(name)
    second = engine.generate(following(first), GREEDY)

    shared = first.prompt_tokens + len(first.tokens) - 1  # the last token was sampled, never read
    assert second.stats.reused_tokens == shared
    assert second.stats.prefilled_tokens == second.prompt_tokens - shared
    assert engine.cache_format == engine.new_cache().format == name
    blocks = -(-second.steps[-1].position // BLOCK)
    row = Row(small.config.kv_lora_rank, small.config.qk_rope_head_dim)
    assert second.steps[-1].cache_bytes == blocks * BLOCK * 2 * CACHE_FORMATS[name].nbytes(row)

    # the same by hand: the first turn in fp32, converted, the rest read and said in the new format
    prompt = second.watched.reply.tokens
    cache = LatentCache(small.config, format="fp32")
    small(torch.tensor([prompt[: first.prompt_tokens]]), cache)
    for token in prompt[first.prompt_tokens : shared]:
        small(torch.tensor([[token]]), cache)
    if name == "fp32":
        assert errors == []
    else:
        assert sum(cache.convert(name), ()) == pytest.approx(sum(errors, ()), rel=1e-3)
    logits = small(torch.tensor([prompt[shared : second.prompt_tokens]]), cache)[0, -1]
    for step in second.steps:
        assert step.choice.logprob == pytest.approx(logits.log_softmax(-1)[step.token].item(), abs=1e-3)
        logits = small(torch.tensor([[step.token]]), cache)[0, -1]

    # and near to what no cache would have said
    exact = small(torch.tensor([prompt]))[0].log_softmax(-1)
    for step in second.steps:
        assert step.choice.logprob == pytest.approx(exact[step.position - 1, step.token].item(), abs=TOLERANCE[name])
    trace = second.trace
    assert len(trace) == second.prompt_tokens + len(second.steps)
    assert (trace.experts[:shared] == first.trace.experts[:shared]).all()
    assert (trace.experts[shared:-1] >= 0).all()


def test_nothing_cached_costs_nothing(engine):
    assert engine.convert_cache("q6") == []
    assert engine.generate(HELLO, GREEDY).stats.reused_tokens == 0
    assert engine.new_cache().format == "q6"


def test_an_unknown_format_changes_nothing(engine):
    first = engine.generate(HELLO, GREEDY)
    with pytest.raises(RequestError, match="q6"):
        engine.convert_cache("q9")
    assert engine.cache_format == "fp32"
    assert engine.generate(following(first), GREEDY).stats.reused_tokens > 0


def test_a_stream_that_is_running_goes_on_as_it_was(engine):
    alone = engine.generate(HELLO, GREEDY)
    other = Engine(engine.model, engine.tokenizer, "int4").generate(HELLO, GREEDY)
    engine = Engine(engine.model, engine.tokenizer, "fp32")  # with nothing cached
    stream = engine.stream(HELLO, GREEDY)
    said = [next(stream) for _ in range(3)]
    assert engine.convert_cache("int4") == []
    said += stream
    assert [step.token for step in said] == alone.tokens
    assert [step.choice.logprob for step in said] == logprobs(alone)
    after = engine.generate(HELLO, GREEDY)
    assert logprobs(after) == logprobs(other) != logprobs(alone)


def test_a_stream_begun_during_a_conversion_waits_for_it(engine, monkeypatch):
    first = engine.generate(HELLO, GREEDY)
    convert, answers = Pool.convert, []
    talking = Thread(target=lambda: answers.append(engine.generate(following(first), GREEDY)))

    def slow(pool, format):
        talking.start()
        talking.join(0.3)
        assert not answers
        return convert(pool, format)

    monkeypatch.setattr(Pool, "convert", slow)
    engine.convert_cache("q6")
    talking.join()
    [second] = answers
    assert second.stats.reused_tokens == first.prompt_tokens + len(first.tokens) - 1


@pytest.mark.parametrize(("old", "new"), [("fp32", "q6+64"), ("q6+64", "q6"), ("q6+64", "q6+5")])
def test_to_and_from_windows_the_text_is_read_again(old, new, small, tokenizer):
    engine = Engine(small, tokenizer, old)
    first = engine.generate(HELLO, GREEDY)
    assert engine.convert_cache(new) == []
    second = engine.generate(following(first), GREEDY)
    assert second.stats.reused_tokens == 0
    fresh = Engine(small, tokenizer, new).generate(following(first), GREEDY)
    assert (second.tokens, logprobs(second)) == (fresh.tokens, logprobs(fresh))
    assert engine.generate(following(first), GREEDY).stats.prefilled_tokens == 1


@pytest.mark.parametrize("name", [*PACKED, "q6+64"])
def test_a_batch_gives_each_prompt_the_answer_it_gets_alone_in_any_format(name, small, tokenizer):
    prompts = ["Hello", HELLO, LONG, [tokenizer.bos], "你好！"]
    for prompt, done in zip(prompts, Engine(small, tokenizer, name).batch(prompts, GREEDY, slots=3)):
        alone = Engine(small, tokenizer, name).generate(prompt, GREEDY)
        assert done.tokens == alone.tokens
        assert logprobs(done) == pytest.approx(logprobs(alone), abs=1e-3)


@pytest.mark.parametrize("name", [*CACHE_FORMATS, "q6+64"])
def test_a_prompt_in_chunks_is_the_prompt_at_once_in_any_format(name, small, tokenizer):
    tokens = torch.randint(0, 580, (CHUNK + 77,), generator=torch.Generator().manual_seed(2)).tolist()
    chunked = next(Engine(small, tokenizer, name).stream(tokens, GREEDY)).choice
    whole = small(torch.tensor([tokens]), LatentCache(small.config, format=name))[0, -1].log_softmax(-1)
    exact = small(torch.tensor([tokens]))[0, -1].log_softmax(-1)
    same = 0.01 if "+" in name else 1e-4  # which rows are wide depends on where a chunk ends
    assert chunked.logprob == pytest.approx(whole[chunked.token].item(), abs=same)
    assert chunked.logprob == pytest.approx(exact[chunked.token].item(), abs=TOLERANCE[name])


def test_pocket_talks_with_a_cache_of_six_bits():
    wide, bench = (wb.load("pocket", device="cpu", cache=name) for name in ("fp32", "q6"))
    assert bench.new_cache().format == "q6"
    done = bench.generate("Hello", Sampling(temperature=0, max_tokens=5))
    row = Row(bench.config.kv_lora_rank, bench.config.qk_rope_head_dim)
    assert done.steps[-1].cache_bytes == BLOCK * bench.config.num_hidden_layers * CACHE_FORMATS["q6"].nbytes(row)
    assert done.tokens == wide.generate("Hello", Sampling(temperature=0, max_tokens=5)).tokens
