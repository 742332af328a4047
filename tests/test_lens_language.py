"""Tokens tell the language of the texts they are frequent in, and nothing where they are in both."""

import math

import pytest
from fake_bench import FakeTokenizer

from workbench.errors import RequestError
from workbench.lens.language import share, telling

TEXTS = {"a": ["xxxx yyyy", "xxxx zz"], "b": ["wwww yyyy", "wwww zz"]}


def characters(told):
    return {chr(token): label for token, label in told.items()}


def test_only_what_is_frequent_on_one_side_tells():
    assert characters(telling(FakeTokenizer(), TEXTS)) == {"x": "a", "w": "b"}


def test_a_token_seen_once_tells_less_than_one_seen_often():
    texts = {"a": ["x" * 50 + "q"], "b": ["w" * 50]}
    assert characters(telling(FakeTokenizer(), texts, ratio=4)) == {"x": "a", "w": "b"}


def test_frequency_counts_and_not_the_length_of_the_texts():
    texts = {"a": ["xy" * 5], "b": ["y" * 50 + "w" * 50]}
    assert characters(telling(FakeTokenizer(), texts)) == {"x": "a", "w": "b"}


def test_share_of_what_tells():
    told = telling(FakeTokenizer(), TEXTS)
    assert share(b"xxxw yz", told, "a") == 0.75 and share(b"xxxw yz", told, "b") == 0.25
    assert math.isnan(share(b"yz !", told, "a"))


@pytest.mark.parametrize("texts", [{}, {"a": ["x"]}, {"a": ["x"], "b": []}, {"a": ["x"], "b": [""]}])
def test_one_label_tells_nothing_apart(texts):
    with pytest.raises(RequestError, match="at least two labels"):
        telling(FakeTokenizer(), texts)
