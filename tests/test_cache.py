"""LatentCache: one latent row per token and layer, in blocks of 64, given back when nobody needs them."""

import gc

import pytest
import torch
from caches import CONFIG, read, rows, write
from torch.utils._python_dispatch import TorchDispatchMode

import workbench.model
from workbench.cache import BLOCK, LatentCache
from workbench.config import Config
from workbench.errors import RequestError

SIZES = {"fp32": 4, "bf16": 2}


def blocks_for(*lengths):
    return sum(-(-length // BLOCK) for length in lengths)


def assert_bytes(cache):
    config = cache.config
    assert cache.nbytes == cache.blocks * 64 * config.latent_width * SIZES[cache.format] * config.num_hidden_layers


@pytest.mark.parametrize("format", SIZES)
def test_bytes_are_blocks_times_64_rows_of_the_latent_in_every_layer(format):
    cache = LatentCache(CONFIG, batch=2, format=format)
    assert cache.nbytes == 0 and cache.blocks == 0 and cache.lengths == [0, 0]
    for tokens, blocks in ((1, 2), (63, 2), (1, 4), (100, 6)):
        write(cache, rows(cache, tokens))
        assert cache.blocks == blocks
        assert_bytes(cache)
    assert cache.lengths == [165, 165]


def test_a_v2_token_takes_1152_bytes_a_layer():
    config = Config.preset("v2")
    cache = LatentCache.for_model(config, format="bf16")
    cache.reserve(128)
    assert cache.nbytes == 128 * 60 * 576 * 2


def test_what_was_written_is_read_back_in_order():
    cache = LatentCache(CONFIG, batch=2, format="fp32")
    first, second = rows(cache, 70, seed=1), rows(cache, 90, seed=2)
    write(cache, first)
    write(cache, second)
    for sequence in range(2):
        assert torch.equal(read(cache, sequence), torch.cat([first, second], 2)[:, sequence])


def test_bf16_rows_are_rounded_once_and_nothing_else():
    cache = LatentCache(CONFIG, format="bf16")
    new = rows(cache, 70)
    write(cache, new)
    assert torch.equal(read(cache), new[:, 0].bfloat16().float())


def test_sequences_of_different_lengths_keep_apart():
    cache = LatentCache(CONFIG, batch=3, format="fp32")
    news = [rows(cache.only(0), length, seed=length) for length in (5, 64, 130)]
    for sequence, new in enumerate(news):
        write(cache.only(sequence), new)
    assert cache.lengths == [5, 64, 130]
    assert cache.blocks == blocks_for(5, 64, 130)
    more = rows(cache, 70)
    write(cache, more)
    for sequence, new in enumerate(news):
        assert torch.equal(read(cache, sequence), torch.cat([new[:, 0], more[:, sequence]], 1))
    assert_bytes(cache)


def test_truncate_gives_blocks_back_and_what_comes_next_follows_the_cut():
    cache = LatentCache(CONFIG, format="fp32")
    first, second = rows(cache, 200, seed=1), rows(cache, 10, seed=2)
    write(cache, first)
    cache.truncate(70)
    assert cache.lengths == [70] and cache.blocks == blocks_for(70)
    assert_bytes(cache)
    write(cache, second)
    assert torch.equal(read(cache), torch.cat([first[:, 0, :70], second[:, 0]], 1))
    cache.truncate(0)
    assert cache.nbytes == 0


def test_truncating_one_sequence_leaves_the_others():
    cache = LatentCache(CONFIG, batch=2, format="fp32")
    new = rows(cache, 130)
    write(cache, new)
    cache.truncate(1, sequence=0)
    assert cache.lengths == [1, 130]
    assert torch.equal(read(cache, 1), new[:, 1])
    # the hole is used before the pool grows
    held = cache.blocks
    write(cache.only(0), rows(cache.only(0), 129))
    assert cache.blocks <= max(held, blocks_for(130, 130))


@pytest.mark.parametrize("length", [-1, 11])
def test_truncating_to_what_is_not_there_is_refused(length):
    cache = LatentCache(CONFIG, format="fp32")
    write(cache, rows(cache, 10))
    with pytest.raises(RequestError, match=r"10"):
        cache.truncate(length)
    assert cache.lengths == [10]


def test_a_fork_costs_nothing_until_somebody_writes_and_then_one_block():
    cache = LatentCache(CONFIG, format="fp32")
    first = rows(cache, 150, seed=1)
    write(cache, first)
    held = cache.nbytes
    fork = cache.fork()
    assert fork.nbytes == cache.nbytes == held and fork.lengths == [150]

    ours, theirs = rows(cache, 3, seed=2), rows(cache, 40, seed=3)
    write(fork, theirs)
    assert cache.lengths == [150] and fork.lengths == [190]
    assert cache.blocks == blocks_for(150) + 1  # the half-full third block, copied for whoever wrote first
    write(cache, ours)
    assert cache.blocks == blocks_for(150) + 1  # nobody shares it any more
    assert torch.equal(read(cache), torch.cat([first[:, 0], ours[:, 0]], 1))
    assert torch.equal(read(fork), torch.cat([first[:, 0], theirs[:, 0]], 1))
    assert_bytes(cache)


@pytest.mark.parametrize("length", [64, 100, 128])
def test_forks_of_forks_cut_and_continued_do_not_see_each_other(length):
    cache = LatentCache(CONFIG, format="fp32")
    first = rows(cache, length, seed=1)
    write(cache, first)
    family = [cache, cache.fork()]
    family.append(family[1].fork())
    family[2].truncate(length - 30)
    news = [rows(cache, 20 + 10 * seed, seed=seed) for seed in range(3)]
    for each, new in zip(family, news):
        write(each, new)
    for each, new, kept in zip(family, news, (length, length, length - 30)):
        assert torch.equal(read(each), torch.cat([first[:, 0, :kept], new[:, 0]], 1))
    assert_bytes(cache)


def test_a_dropped_fork_returns_its_blocks_and_a_dropped_parent_too():
    cache = LatentCache(CONFIG, format="fp32")
    first = rows(cache, 70)
    write(cache, first)
    fork = cache.fork()
    write(fork, rows(cache, 200))
    assert fork.blocks > blocks_for(70)
    del fork
    assert cache.blocks == blocks_for(70)
    assert_bytes(cache)
    fork = cache.fork()
    del cache
    assert torch.equal(read(fork), first[:, 0])
    assert fork.blocks == blocks_for(70)


def test_more_tokens_than_the_context_are_refused_before_anything_changes():
    cache = LatentCache(CONFIG, batch=2, format="fp32")
    new = rows(cache, 300)
    write(cache, new)
    held = cache.nbytes
    with pytest.raises(RequestError, match="320"):
        cache.reserve(21)
    assert cache.nbytes == held and cache.lengths == [300, 300]
    assert torch.equal(read(cache, 1), new[:, 1])
    write(cache, rows(cache, 20))
    assert cache.lengths == [320, 320]


@pytest.mark.parametrize("shape", [(1, 5, 32), (2, 5, 31), (5, 32)])
def test_rows_of_another_shape_are_refused(shape):
    cache = LatentCache(CONFIG, batch=2, format="fp32")
    with pytest.raises(RequestError, match=r"\[2, tokens, 32\]"):
        cache.append(0, torch.zeros(shape))


@pytest.mark.parametrize("tokens", [1, 4, 6, 90])
def test_appending_makes_its_own_room(tokens):
    cache = LatentCache(CONFIG, batch=2, format="fp32")
    cache.reserve(5)  # by a pass that was interrupted and wanted another number
    new = rows(cache, tokens)
    for layer, of_layer in enumerate(new):
        cache.append(layer, of_layer)
    cache.advance(tokens)
    assert torch.equal(read(cache, 1), new[:, 1])


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'fp9'; there are .*bf16.*q6.*q6\+128"):
        LatentCache(CONFIG, format="fp9")


# an interrupt between reserve and advance: the most ordinary thing in a notebook


def test_an_interrupted_pass_leaves_the_cache_as_it_was():
    cache = LatentCache(CONFIG, format="fp32")
    first, second, third = rows(cache, 70, seed=1), rows(cache, 10, seed=2), rows(cache, 200, seed=3)
    write(cache, first)
    fork = cache.fork()
    cache.reserve(200)
    cache.append(0, third[0])
    write(fork, third)  # in blocks behind those of the interrupted pass
    write(cache, second)
    write(cache, third)
    assert torch.equal(read(cache), torch.cat([first[:, 0], second[:, 0], third[:, 0]], 1))
    assert torch.equal(read(fork), torch.cat([first[:, 0], third[:, 0]], 1))
    assert_bytes(cache)


def test_a_fork_after_an_interrupted_pass_shares_nothing_that_will_be_written():
    cache = LatentCache(CONFIG, format="fp32")
    first = rows(cache, 64, seed=1)
    write(cache, first)
    cache.reserve(30)
    fork = cache.fork()
    ours, theirs = rows(cache, 30, seed=2), rows(cache, 30, seed=3)
    write(cache, ours)
    write(fork, theirs)
    assert torch.equal(read(cache), torch.cat([first[:, 0], ours[:, 0]], 1))
    assert torch.equal(read(fork), torch.cat([first[:, 0], theirs[:, 0]], 1))


# what a forward pass keeps and what it makes


def tensors_alive():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("name", ["lite", "v2"])
def test_after_a_pass_only_the_latent_rows_are_alive(name, model):
    config, cache = model(name).config, LatentCache(model(name).config, format="fp32")
    before = tensors_alive()  # held, so that no address is used twice
    for tokens in (300, 1, 1):
        with torch.no_grad():
            model(name)(torch.zeros(1, tokens, dtype=torch.int64), cache)
    new = storages(tensors_alive()).items() - storages(before).items()
    assert sum(size for _, size in new) == cache.nbytes
    assert cache.nbytes == blocks_for(302) * 64 * config.latent_width * 4 * config.num_hidden_layers


class Largest(TorchDispatchMode):
    """The largest storage any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("form", ["as chosen", "expanded"])
@pytest.mark.usefixtures("by_operation")
def test_a_decoding_step_never_builds_keys_or_values_of_the_context(form, model, monkeypatch):
    config, context = model("lite").config, 960
    cache = LatentCache(config, format="fp32")
    one = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model("lite")(torch.zeros(1, context, dtype=torch.int64), cache)
        if form == "expanded":
            monkeypatch.setattr(workbench.model, "absorbing_is_cheaper", lambda *_: False)
        with Largest() as largest:
            model("lite")(one, cache)
    keys = context * config.num_attention_heads * config.qk_nope_head_dim
    if form == "expanded":
        assert largest.elements >= keys  # so this would be noticed
    else:
        # a step may grow the pool, layer by layer, and look at the rows as they lie there; no more
        assert largest.elements <= cache.blocks * BLOCK * config.latent_width < keys


def test_a_fork_collected_in_the_middle_of_growth_disturbs_nothing(monkeypatch):
    cache = LatentCache(CONFIG, format="fp32")
    old = rows(cache, 100)
    write(cache, old)
    fork = cache.fork()
    write(fork, rows(fork, 100, seed=1))
    cycle = [fork]
    cycle.append(cycle)  # only the garbage collector ends it
    del fork
    empty = cache.pool._empty

    def collecting(blocks):
        cycle_ends.clear()
        gc.collect()
        return empty(blocks)

    cycle_ends = [cycle]
    del cycle
    monkeypatch.setattr(cache.pool, "_empty", collecting)
    new = rows(cache, 100, seed=2)
    write(cache, new)
    assert torch.equal(read(cache), torch.cat([old, new], 2)[:, 0])
    assert cache.nbytes == cache.blocks * BLOCK * CONFIG.latent_width * 4 * CONFIG.num_hidden_layers
    assert sorted(cache.pool.users.elements()) == sorted(cache.sequences[0].table)
