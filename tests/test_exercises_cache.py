"""The checks of notebooks 10 to 12 pass what is right, however it is written, and name each typical mistake."""

import pytest
import torch

from workbench.exercises import check_held_bytes, check_pack_five, check_quantise, check_row_bytes


def held(c, t):
    return -(-t // 64) * 64 * 2 * (c.kv_lora_rank + c.qk_rope_head_dim) * c.num_hidden_layers


def test_bytes_that_a_cache_really_holds_are_solved():
    feedback = check_held_bytes(held)
    assert feedback.passed and "really made" in feedback.text


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda c, t: None, "returned nothing"),
        (lambda c, t: float(held(c, t)), "whole numbers"),
        (lambda c, t: True, "whole numbers"),
        (lambda c, t: t * 2 * c.latent_width * c.num_hidden_layers, "whole blocks of 64"),
        (lambda c, t: t // 64 * 64 * 2 * c.latent_width * c.num_hidden_layers, "round up"),
        (lambda c, t: (t // 64 + 1) * 64 * 2 * c.latent_width * c.num_hidden_layers, "one block too many"),
        (lambda c, t: held(c, t) // c.num_hidden_layers, "that is one layer"),
        (lambda c, t: held(c, t) // 2, "two bytes"),
        (lambda c, t: 2 * held(c, t), "the same row"),
        (lambda c, t: -(-t // 64) * 128 * c.kv_lora_rank * c.num_hidden_layers, "the rotary key is missing"),
        (lambda c, t: -(-t // 64) * 2 * c.latent_width * c.num_hidden_layers, "counts a block as one row"),
        (lambda c, t: -(-t // 64) * 128 * c.mha_width * c.num_hidden_layers, "multi-head attention"),
        (lambda c, t: 7, "count whole blocks"),
    ],
)
def test_wrong_bytes_of_a_cache_are_explained(attempt, says):
    feedback = check_held_bytes(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_what_is_right_already_is_counted():
    unrounded = check_held_bytes(lambda c, t: t * 2 * c.latent_width * c.num_hidden_layers)
    assert "Right so far: 1 of 6." in unrounded.text


def priced(latent, rope):
    return -(-5 * latent // 8) + -(-latent // 16) + 2 + -(-10 * rope // 8) + 2


def test_bytes_of_a_row_are_solved():
    assert check_row_bytes(priced).passed
    assert check_row_bytes(lambda c, r: (5 * c + 7) // 8 + (c + 15) // 16 + (10 * r + 7) // 8 + 4).passed


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda c, r: None, "returned nothing"),
        (lambda c, r: c * 5 / 8, "whole numbers"),
        (lambda c, r: priced(c, r) - 4 - -(-c // 16), "the scales are missing"),
        (lambda c, r: priced(c, r) - 4, "the two scales of 2 bytes are missing"),
        (lambda c, r: priced(c, r) - 2, "there are two scales"),
        (lambda c, r: priced(c, r) - -(-c // 16), "the scales of the groups are missing"),
        (lambda c, r: priced(c, r) - -(-c // 16) + c // 16, "a last group that is not full"),
        (lambda c, r: priced(c, r) + -(-c // 16), "one byte"),
        (lambda c, r: priced(c, r) - -(-5 * c // 8) + 5 * c // 8, "codes fill whole bytes"),
        (lambda c, r: priced(c, r) - -(-10 * r // 8) + 10 * r // 8, "of the rotary key fill whole bytes"),
        (lambda c, r: priced(c, r) - -(-5 * c // 8) + c, "a byte of its own"),
        (lambda c, r: priced(c, r) - -(-10 * r // 8) + 2 * r, "two bytes; they are packed"),
        (lambda c, r: -(-(5 * c + 10 * r) // 8) + -(-c // 16) + 4, "packed apart"),
        (lambda c, r: priced(c, r) - -(-10 * r // 8) + -(-5 * r // 8), "10 bits an element"),
        (lambda c, r: 2 * (c + r), "in bf16"),
        (lambda c, r: 436, "its parts are"),
    ],
)
def test_wrong_bytes_of_a_row_are_explained(attempt, says):
    feedback = check_row_bytes(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def quantised(x, bits):
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / most).clamp(min=1e-12)
    return (x / scale).round().clamp(-most, most), scale


def in_whole_numbers(x, bits):
    codes, scale = quantised(x, bits)
    return codes.to(torch.int8), scale.float()


def with_a_half_scale(x, bits):
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / most).half().clamp(min=6e-8)
    return (x / scale).round().clamp(-most, most), scale


def zero_where_nothing_is(x, bits):
    codes, scale = quantised(x, bits)
    return codes, scale * (codes != 0).any(-1, keepdim=True)


@pytest.mark.parametrize("attempt", [quantised, in_whole_numbers, with_a_half_scale, zero_where_nothing_is])
def test_a_right_quantiser_is_solved_however_it_is_written(attempt):
    feedback = check_quantise(attempt)
    assert feedback.passed, feedback


def one_scale(x, bits):
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax() / most).reshape(1, 1)
    return (x / scale).round(), scale


def changed(x, bits):
    codes, scale = quantised(x, bits)
    x /= scale
    return codes, scale


def scaled_by(divisor, about=torch.Tensor.abs):
    def attempt(x, bits):
        scale = (about(x).amax(-1, keepdim=True) / divisor(bits)).clamp(min=1e-12)
        return (x / scale).round(), scale

    return attempt


def rounded_by(rounding):
    def attempt(x, bits):
        codes, scale = quantised(x, bits)
        return rounding(x / scale).clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1), scale

    return attempt


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda x, bits: None, "returned nothing"),
        (lambda x, bits: quantised(x, bits)[0], "two tensors"),
        (lambda x, bits: torch.ones(2, 3), "two tensors"),
        (changed, "changed x itself"),
        (lambda x, bits: (quantised(x, bits)[0][:2], quantised(x, bits)[1]), "one for each element"),
        (one_scale, "one scale for all rows"),
        (lambda x, bits: (quantised(x, bits)[0], quantised(x, bits)[1][:, 0]), "keepdim"),
        (lambda x, bits: (quantised(x, bits)[0], x), "one for each row"),
        (lambda x, bits: (x / (x.abs().amax(-1, keepdim=True) / 7), x.abs().amax(-1, keepdim=True)), "NaN"),
        (lambda x, bits: (x / quantised(x, bits)[1], quantised(x, bits)[1]), "not whole numbers"),
        (scaled_by(lambda bits: 2 ** (bits - 1)), "the largest that fits is"),
        (scaled_by(lambda bits: 2**bits - 1), "the largest that fits is"),
        (lambda x, bits: (quantised(x, bits)[0] + (x == 0), quantised(x, bits)[1]), "row 4 is all zeros"),
        (lambda x, bits: (quantised(x, bits)[0], 1 / quantised(x, bits)[1]), "upside down"),
        (lambda x, bits: (quantised(x, bits)[0], (2 ** (bits - 1) - 1) * quantised(x, bits)[1]), "divide it by m"),
        (scaled_by(lambda bits: (2 ** (bits - 1) - 1) / 2), "2 times what it should be"),
        (rounded_by(torch.trunc), "cut off towards zero"),
        (rounded_by(torch.floor), "rounded down"),
        (lambda x, bits: (quantised(x, bits)[0].roll(1, 0) * (x != 0), quantised(x, bits)[1]), "are not the nearest"),
    ],
)
def test_a_wrong_quantiser_is_explained(attempt, says):
    feedback = check_quantise(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_a_scale_of_the_largest_that_forgets_negative_ones_is_explained():
    def attempt(x, bits):
        codes, _ = quantised(x, bits)
        return codes, (x.amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-12)

    assert "absolute values first" in check_quantise(attempt).text


def number(codes):
    return sum(code << 5 * place for place, code in enumerate(codes))


def packed(codes, offset=15):
    return number([code + offset for code in codes]).to_bytes(-(-5 * len(codes) // 8), "little")


def bit_by_bit(codes):
    bits = [(code + 15) >> n & 1 for code in codes for n in range(5)]
    bits += [0] * (-len(bits) % 8)
    return [sum(bit << n for n, bit in enumerate(bits[start : start + 8])) for start in range(0, len(bits), 8)]


@pytest.mark.parametrize(
    "attempt",
    [packed, bit_by_bit, lambda codes: torch.tensor(list(packed(codes)), dtype=torch.uint8)],
    ids=["number", "bits", "tensor"],
)
def test_packed_codes_are_solved_however_they_are_written(attempt):
    feedback = check_pack_five(attempt)
    assert feedback.passed, feedback


def highest_first(codes):
    bits = "".join(f"{code + 15:05b}" for code in codes)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda codes: None, "returned nothing"),
        (lambda codes: 7, "Bytes or a list"),
        (lambda codes: "abc", "Bytes or a list"),
        (lambda codes: [300], "from 0 to 255"),
        (lambda codes: list(codes), "from 0 to 255"),
        (lambda codes: [1.0], "from 0 to 255"),
        (lambda codes: packed([code % 32 for code in codes], 0), "two's complement"),
        (lambda codes: packed([abs(code) + 16 * (code < 0) for code in codes], 0), "for the sign"),
        (lambda codes: [code + 15 for code in codes], "a byte of its own"),
        (highest_first, "highest bit first"),
        (lambda codes: packed([int(f"{code + 15:05b}"[::-1], 2) for code in codes], 0), "inside each code"),
        (lambda codes: packed(codes[::-1]), "codes are packed in reverse"),
        (lambda codes: packed(codes)[::-1], "bytes are in reverse"),
        (lambda codes: packed(codes)[: 5 * len(codes) // 8], "were dropped"),
        (lambda codes: packed(codes) + b"\0", "a byte too many"),
        (lambda codes: packed([*codes, *[-15] * (-len(codes) % 8)]), "whole bytes are enough"),
        (lambda codes: packed([*codes, *[0] * (-len(codes) % 8)])[: len(packed(codes))], "should be 0"),
        (lambda codes: [0] * len(packed(codes)), "one long number"),
        (lambda codes: [0], "5 bytes are expected"),
    ],
)
def test_wrongly_packed_codes_are_explained(attempt, says):
    feedback = check_pack_five(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_codes_that_are_one_too_high_are_explained():
    def attempt(codes):  # 15 becomes 31 and fits, as one may believe
        return packed([min(code, 14) for code in codes], 16)

    assert not check_pack_five(attempt).passed
    from_second = check_pack_five(lambda codes: packed(codes) if 15 in codes else packed(codes, 16))
    assert "15 is added, not 16" in from_second.text and "Right so far: 1 of 4." in from_second.text
