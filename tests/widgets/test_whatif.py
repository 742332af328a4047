"""What-if: the arithmetic of the meter, asked for by name, and refusals that leave it as it was."""

import json

import pytest
import torch

import workbench as wb
from workbench.cache import LatentCache
from workbench.errors import RequestError
from workbench.footprint import Footprint
from workbench.widgets.whatif import WhatIf


@pytest.fixture
def whatif(monkeypatch):
    whatif = WhatIf()
    whatif.told = []
    monkeypatch.setattr(whatif, "_tell", lambda message, buffers=(): whatif.told.append(message))
    yield whatif
    whatif.close()


def test_it_opens_on_the_large_model_at_the_papers_context(whatif):
    footprint = whatif.footprint
    assert (whatif.model, footprint.tokens, footprint.format.name, whatif.dtype) == ("v2", 131_072, "q6", "bf16")
    assert sum(footprint.cache.values()) == 131_072 * 26_160
    assert sum(footprint.weights.values()) == 2 * wb.Config.preset("v2").parameters().total
    assert str(whatif.ratio) == "93.3% less than DeepSeek-67B (GQA, bf16)"


def test_it_says_what_a_cache_would_allocate(whatif):
    whatif.choose(model="pocket", context=1000, batch=2, format="int4+64")
    cache = LatentCache.for_model(wb.Config.preset("pocket"), 2, "int4+64")
    cache.reserve(1000)
    assert sum(whatif.footprint.cache.values()) == cache.nbytes
    assert whatif.footprint == Footprint(wb.Config.preset("pocket"), 1000, 2, "int4+64")
    assert ["int4+64", 56] in whatif.told[-1]["formats"]


def test_each_choice_keeps_the_others_and_answers_once(whatif):
    for message in ({"model": "v2-lite"}, {"context": 4096}, {"batch": 8}, {"format": "bf16"}, {"dtype": "fp32"}):
        whatif._handle_custom_msg({"kind": "choose", "view": "v"} | message, [])
    assert [message["kind"] for message in whatif.told] == ["result"] * 5
    last = whatif.told[-1]
    assert (last["model"], last["context"], last["batch"], last["format"]) == ("v2-lite", 4096, 8, "bf16")
    assert sum(size for _, size in last["cache"]) == 8 * 4096 * 31_104
    assert whatif.footprint.dtype == torch.float32
    assert {name: size for name, _, size, _ in last["baselines"]}["MQA (bf16)"] == 8 * 4096 * 13_824


def test_a_shorter_context_comes_with_the_model(whatif):
    assert whatif.choose(model="pocket").tokens == 2048
    assert whatif.choose(model="v2", context=163_840).tokens == 163_840


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"model": "v3"}, "no model called 'v3'"),
        ({"context": 163_841}, "context of 163,840"),
        ({"context": -1}, "from 0 to the context"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 1025}, "at most 1,024"),
        ({"format": "int3"}, "no cache format"),
        ({"dtype": "fp16"}, "bf16 or fp32"),
    ],
)
def test_what_there_is_not_is_refused_and_changes_nothing(whatif, choice, said):
    before = whatif.footprint
    with pytest.raises(RequestError, match=said):
        whatif.choose(**choice)
    whatif._handle_custom_msg({"kind": "choose", "view": "v"} | choice, [])
    assert whatif.footprint is before and whatif.told[-1]["kind"] == "notice"


def test_every_number_is_exact_in_the_browser(whatif):
    whatif.choose(model="v2", context=163_840, batch=1024, format="fp32", dtype="fp32")
    result = whatif.told[-1]
    sizes = [size for parts in (result["weights"], result["cache"]) for _, size in parts]
    assert all(isinstance(size, int) for size in sizes)
    assert max([*sizes, *(size for _, _, size, _ in result["baselines"])]) < 2**53
    json.dumps(result)


def test_a_model_of_ones_own_is_offered_first():
    mine = WhatIf(config=wb.Config.preset("pocket"), format="int8")
    assert mine.model == "pocket" and list(mine.models)[0] == "pocket" and mine.footprint.tokens == 2048


def test_without_a_browser_there_are_tables_and_a_picture(whatif):
    page = whatif._repr_mimebundle_()
    assert page["image/png"][:4] == b"\x89PNG"
    for text in ("routed experts", "445435084800", "93.3% less than DeepSeek-67B", "expanded (bf16)"):
        assert text in page["text/plain"] and text in page["text/html"]
