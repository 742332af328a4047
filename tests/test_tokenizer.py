"""Text in, text out: nothing lost, nothing half-shown, and no special token that a person could type."""

import json
import random

import pytest
import tokenizers
from texts import TEXTS
from transformers import AutoTokenizer

from workbench.errors import CheckpointError, RequestError
from workbench.tokenizer import BOS, EOS, Tokenizer
from workbench.train.vocabulary import SPECIAL, train_tokenizer

SPECIMENS = [
    "Hello world",
    "  two  spaces,\n\n a tab\t and an end ",
    "你好，世界",
    "Führer, où, señor, ÿ ü ø",
    "😀👩‍👩‍👧 family",
    "x = 12345.67  # no",
    "e\u0301 \u202eright to left\u202c \u0000 nul",
    "",
    "\n",
]


@pytest.fixture(scope="module")
def published(vocabulary, tmp_path_factory):
    """As in the published files: FIM tokens not marked special, and an ordinary added token "é" among the others."""
    document = json.loads((vocabulary / "tokenizer.json").read_text(encoding="utf-8"))
    for token in document["added_tokens"]:
        if "fim" in token["content"] or token["content"] in ("<|EOT|>", "<｜User｜>"):
            token |= {"special": False, "normalized": True}
    odd = document["added_tokens"][2] | {"id": 600, "content": "éé"}
    document["added_tokens"].append(odd)
    path = tmp_path_factory.mktemp("published") / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    pools = ["ab eE1 \n.,<|>｜▁", "你好专家éüøß", "😀👍🏽\u200d\u0301", "".join(map(chr, range(0x20, 0x3000, 7)))]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


# The vocabulary


def test_the_vocabulary_has_exactly_the_size_asked_for_and_ends_with_the_special_tokens(tokenizer):
    assert tokenizer.vocab_size == 600
    assert [tokenizer.special(text) for text in SPECIAL] == list(range(600 - len(SPECIAL), 600))


def test_training_twice_gives_the_same_vocabulary():
    assert train_tokenizer(TEXTS, 400).to_str() == train_tokenizer(TEXTS, 400).to_str()


def test_every_byte_has_a_token(tokenizer):
    assert {bytes([byte]) for byte in range(256)} <= {tokenizer.bytes(token) for token in range(600)}


def test_digits_stand_alone_and_words_carry_their_space(tokenizer):
    assert [tokenizer.piece(token) for token in tokenizer.encode("127")] == ["1", "2", "7"]
    assert tokenizer.piece(tokenizer.encode(" the")[0]) == " the"


def test_a_text_too_poor_for_the_vocabulary_is_refused():
    with pytest.raises(RequestError, match="more text"):
        train_tokenizer(["a b c"], 600)
    with pytest.raises(RequestError, match="too small"):
        train_tokenizer(TEXTS, 200)


@pytest.mark.parametrize("text", SPECIMENS)
def test_transformers_loads_the_same_tokenizer(text, vocabulary, tokenizer):
    theirs = AutoTokenizer.from_pretrained(vocabulary)
    tokens = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == tokens
    assert theirs.encode(text) == [tokenizer.bos, *tokens]
    assert theirs.decode(tokens) == text == tokenizer.decode(tokens)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.eos,
    )


# Encoding


def test_any_text_survives_the_round_trip(tokenizer):
    for text in SPECIMENS + random_texts(300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_encodes_as_the_file_says(published):
    theirs, ours = tokenizers.Tokenizer.from_file(str(published)), Tokenizer(published)
    for text in [*SPECIMENS, "éé and aéé, ééé"] + random_texts(300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("special", SPECIAL)
def test_a_special_string_in_text_stays_text(special, published):
    tokenizer = Tokenizer(published)
    half = len(special) // 2
    nested = special[:half] + special + special[half:]
    neighbours = f"{special}{EOS}\n{BOS}", f"éé{special}", special * 2
    for text in (special, f"a{special}b", f" {special} ", nested, *neighbours):
        tokens = tokenizer.encode(text)
        assert not any(tokenizer.is_special(token) for token in tokens)
        assert tokenizer.decode(tokens, special=False) == text


def test_look_alikes_are_ordinary_text(tokenizer):
    for text in ("<|User|>", "< ｜User｜>", "<｜User ｜>", "<｜end_of_sentence｜>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not tokenizer.has(text)


def test_special_tokens_are_found_by_string(tokenizer):
    assert tokenizer.bos == tokenizer.special(BOS) and tokenizer.eos == tokenizer.special(EOS)
    assert tokenizer.has("<｜Assistant｜>") and not tokenizer.has("the")
    with pytest.raises(CheckpointError, match=r"no special token '<think>'\. It has: .*<｜User｜>"):
        tokenizer.special("<think>")


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode("ok\ud83d")


def test_align_says_which_characters_a_token_stands_for(tokenizer):
    text = " the 😀 专家"
    tokens, ranges = tokenizer.align(text)
    assert len(tokens) == len(ranges)
    assert {at for start, end in ranges for at in range(start, end)} == set(range(len(text)))
    assert ranges[0] == (0, 4), "with its space"


# Decoding


def test_streaming_gives_the_same_text_as_decoding_at_once(tokenizer):
    rng = random.Random(3)
    cases = [[rng.randrange(610) for _ in range(rng.randrange(30))] for _ in range(500)]
    for tokens in cases + [tokenizer.encode(text) for text in random_texts(300)]:
        for special in (True, False):
            decoder = tokenizer.stream(special)
            streamed = "".join(decoder.push(token) for token in tokens) + decoder.flush()
            assert streamed == tokenizer.decode(tokens, special)


def test_random_tokens_decode_as_the_library_does(vocabulary, tokenizer):
    theirs = tokenizers.Tokenizer.from_file(str(vocabulary / "tokenizer.json"))
    rng = random.Random(5)
    for _ in range(500):
        tokens = [rng.randrange(610) for _ in range(20)]
        assert tokenizer.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False)
        assert tokenizer.decode(tokens, special=False) == theirs.decode(tokens, skip_special_tokens=True)


def test_half_a_character_is_never_shown(tokenizer):
    decoder = tokenizer.stream()
    tokens = [tokenizer.encode("😀")[0:1], tokenizer.encode("😀")[1:]]
    assert len(tokens[1]) == 3, "the specimen should be four single bytes"
    assert [decoder.push(token) for token in tokens[0] + tokens[1]] == ["", "", "", "😀"]
    assert decoder.flush() == ""


def test_broken_bytes_show_as_soon_as_they_can_no_longer_heal(tokenizer):
    byte = {tokenizer.bytes(token): token for token in range(600)}
    decoder = tokenizer.stream()
    assert decoder.push(byte[b"\xf0"]) == ""
    assert decoder.push(byte[b"\x9f"]) == ""
    assert decoder.push(byte[b"a"]) == "\ufffda"
    assert decoder.push(byte[b"\xff"]) == "\ufffd"
    assert decoder.push(byte[b"\xe4"]) == ""
    assert decoder.flush() == "\ufffd"


def test_special_tokens_are_shown_or_hidden(tokenizer):
    tokens = [*tokenizer.encode("hi"), tokenizer.eos]
    assert tokenizer.decode(tokens) == f"hi{EOS}"
    assert tokenizer.decode(tokens, special=False) == "hi"


def test_added_tokens_decode_as_they_are_written(published):
    tokenizer = Tokenizer(published)
    assert 600 in tokenizer.encode("éé")
    assert tokenizer.decode([600]) == "éé"


def test_padding_ids_have_no_text(tokenizer):
    assert tokenizer.decode([102_399]) == ""
    assert tokenizer.piece(102_399) == "<unused 102399>"


def test_a_piece_shows_incomplete_bytes_by_number(tokenizer):
    byte = {tokenizer.bytes(token): token for token in range(600)}
    assert tokenizer.piece(byte[b"\xe4"]) == "<0xE4>"
    assert tokenizer.piece(tokenizer.eos) == EOS


# Files


def test_bos_and_eos_come_from_the_config_beside_the_file(vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((vocabulary / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == (5, 6)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|EOT|>"}, "eos_token": EOS}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos) == (tokenizer.special("<|EOT|>"), tokenizer.special(EOS))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_corrupt_file_is_named_with_what_to_do(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*Copy the file"):
        Tokenizer(tmp_path)


def test_a_truncated_file_is_refused(vocabulary, tmp_path):
    content = (vocabulary / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="Copy the file"):
        Tokenizer(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer(tmp_path)


def test_a_corrupt_tokenizer_config_is_refused(vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((vocabulary / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        Tokenizer(tmp_path)
