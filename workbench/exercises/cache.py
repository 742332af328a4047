"""Exercises about the cache: what it holds, what a row costs in a format, a quantiser, and codes packed into bytes."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from workbench.cache import BLOCK, LatentCache
from workbench.codec import pack_bits
from workbench.config import Config
from workbench.exercises.feedback import Feedback
from workbench.formats import CACHE_FORMATS, Row

HELD = (("pocket", 640), ("pocket", 130), ("pocket", 1), ("pocket", 0), ("v2-lite", 1000), ("pocket", 2048))


def check_held_bytes(held_bytes: Callable[[Config, int], int]) -> Feedback:
    """For `held_bytes(config, tokens)`: bytes that a bf16 cache really holds for one sequence, all layers together."""
    for done, (name, tokens) in enumerate(HELD):
        config = Config.preset(name)
        answer = held_bytes(config, tokens)
        call = f"held_bytes({name}, {tokens})"
        if wrong := _not_whole(answer):
            return Feedback(False, f"{call} {wrong}")
        cache = LatentCache.for_model(config, format="bf16")
        cache.reserve(tokens)
        if answer != cache.nbytes:
            said = f"{call} returned {answer:,}; the cache holds {cache.nbytes:,}"
            return Feedback(False, f"{said}: {_misheld(int(answer), config, tokens)}.{_so_far(done, len(HELD))}")
    return Feedback(True, f"All {len(HELD)} are right, each compared with a cache that was really made.")


def _misheld(answer: int, config: Config, tokens: int) -> str:
    layers, row = config.num_hidden_layers, 2 * config.latent_width
    blocks = -(-tokens // BLOCK)
    causes = {
        tokens * row * layers: f"memory is taken in whole blocks of {BLOCK} tokens",
        tokens // BLOCK * BLOCK * row * layers: f"the last block is there too, however little of its {BLOCK} tokens is "
        "used: round up",
        (tokens // BLOCK + 1) * BLOCK * row * layers: "one block too many: a block that is just full needs no other",
        blocks * BLOCK * row: "that is one layer; every layer has blocks of its own",
        blocks * BLOCK * row * layers // 2: "an element of bf16 has two bytes",
        2 * blocks * BLOCK * row * layers: "that is twice as much: keys and values come from the same row",
        blocks * BLOCK * 2 * config.kv_lora_rank * layers: "the rotary key is missing; it is kept beside the latent",
        blocks * row * layers: f"that counts a block as one row; it has {BLOCK}",
        blocks * BLOCK * 2 * config.mha_width * layers: "that is what multi-head attention would keep",
    }
    return causes.get(answer, f"count whole blocks of {BLOCK} rows, a row of 2 bytes an element, and all layers")


# one thing to round at a time: groups, rotary codes, latent codes; in the last both kinds of codes leave half a byte
ROWS = (Row(512, 64), Row(64, 16), Row(72, 8), Row(64, 6), Row(100, 8), Row(4, 2))


def check_row_bytes(row_bytes: Callable[[int, int], int]) -> Feedback:
    """For `row_bytes(latent, rope)`: bytes of one cache row in the format q6, for any two widths."""
    q6 = CACHE_FORMATS["q6"]
    for done, row in enumerate(ROWS):
        answer = row_bytes(*row)
        call = f"row_bytes({row.latent}, {row.rope})"
        if wrong := _not_whole(answer):
            return Feedback(False, f"{call} {wrong}")
        if answer != q6.nbytes(row):
            said = f"{call} returned {answer:,}; a row has {q6.nbytes(row):,}"
            return Feedback(False, f"{said}: {_mispriced(int(answer), row)}.{_so_far(done, len(ROWS))}")
    return Feedback(True, f"All {len(ROWS)} rows are right. The cache allocates the same: `layout` in formats.py.")


def _mispriced(answer: int, row: Row) -> str:
    codes, groups, turned = -(-5 * row.latent // 8), -(-row.latent // 16), -(-10 * row.rope // 8)
    right = codes + groups + 2 + turned + 2
    causes = [
        (right - codes - turned + -(-(5 * row.latent + 10 * row.rope) // 8), "the codes of latent and rotary key are "
         "packed apart: each fills whole bytes"),
        (right - codes + 5 * row.latent // 8, "codes fill whole bytes in the end: round up"),
        (codes + turned, "the scales are missing: a byte for each group of 16, and two scales of 2 bytes"),
        (codes + groups + turned, "the two scales of 2 bytes are missing, one of the latent and one of the rotary key"),
        (right - 2, "there are two scales of 2 bytes: one of the latent, and one of the rotary key"),
        (right - groups, "the scales of the groups are missing: one byte for every 16 elements of the latent"),
        (right - groups + row.latent // 16, "a last group that is not full has a scale as well: round up"),
        (right + groups, "the scale of a group has 8 bits, one byte; that of 2 bytes is there once, for the latent"),
        (right - turned + 10 * row.rope // 8, "the codes of the rotary key fill whole bytes in the end too: round up"),
        (right - codes + row.latent, "that gives each 5-bit code a byte of its own; they are packed without gaps"),
        (right - turned + 2 * row.rope, "that gives each 10-bit code two bytes; they are packed without gaps"),
        (right - turned + -(-5 * row.rope // 8), "the rotary key has 10 bits an element, not 5"),
        (2 * row.width, "that is the row in bf16"),
    ]  # fmt: skip
    parts = f"{codes} of latent codes, {groups} of group scales, 2, {turned} of rotary codes, 2"
    return next((cause for wrong, cause in causes if wrong == answer != right), f"its parts are {parts}")


BITS = (4, 8, 2)


def check_quantise(quantise: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Feedback:
    """For `quantise(x, bits)`: whole numbers from -m to m, m = 2^(bits - 1) - 1, and a scale for each row of x [T, C].

    codes [T, C] times scale [T, 1] are the nearest that such numbers come to x, where the largest of a row is m times
    its scale. A row of zeros stays one.
    """
    for bits in BITS:
        x = torch.randn(6, 10, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
        x *= torch.tensor([[1.0], [100.0], [0.01], [3.0], [1.0], [7.0]], dtype=torch.float64)
        x[4] = 0
        given, call, most = x.clone(), f"quantise(x {list(x.shape)}, {bits})", 2 ** (bits - 1) - 1
        answer = quantise(given, bits)
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return codes, scale`.")
        if not isinstance(answer, tuple | list) or len(answer) != 2 or not all(isinstance(a, Tensor) for a in answer):
            return Feedback(False, f"{call} must return two tensors: `return codes, scale`.")
        if not torch.equal(given, x):
            return Feedback(False, f"{call} changed x itself. Work on a copy: the cache may hold x too.")
        if wrong := _misrounded(*answer, x, most):
            return Feedback(False, f"{call}: {wrong}.")
    return Feedback(True, f"Right at {', '.join(map(str, BITS))} bits. `Codes` in codec.py does the same, and packs.")


def _misrounded(codes: Tensor, scale: Tensor, x: Tensor, most: int) -> str | None:
    """What to do about the first thing that is wrong; None if nothing is."""
    if codes.shape != x.shape:
        return f"codes have the shape {list(codes.shape)}; one for each element is expected, {list(x.shape)}"
    if list(scale.shape) != [len(x), 1]:
        if scale.numel() == 1:
            return "there is one scale for all rows: the small rows are rounded away. Each row needs its own"
        if list(scale.shape) == [len(x)]:
            return f"scale has the shape {list(scale.shape)}; with keepdim=True it is [{len(x)}, 1] and multiplies rows"
        return f"scale has the shape {list(scale.shape)}; one for each row is expected, [{len(x)}, 1]"
    codes, scale = codes.double(), scale.double()
    if not (codes.isfinite().all() and scale.isfinite().all()):
        return "there is a NaN or an infinity: row 4 is all zeros, and 0 / 0 is not a number. Keep the scale above 0"
    if not torch.equal(codes, codes.round()):
        return "codes are not whole numbers: divide by the scale and round"
    if (codes.abs() > most).any():
        largest = int(codes.abs().max())
        return f"there is a code {largest} in size; the largest that fits is {most}, 2^(bits - 1) - 1 on both sides"
    if codes[4].any():
        return "row 4 is all zeros, and its codes are not"
    full = x.abs().amax(-1) > 0  # whatever the scale of a row of zeros is
    x, codes, scale = x[full], codes[full], scale[full]
    if wrong := _misscaled(scale, x, most):
        return wrong
    nearest = (x / scale).round().clamp(-most, most)
    if torch.equal(codes, (x / scale).trunc()):
        return "codes are cut off towards zero, which doubles the largest error. Round instead"
    if torch.equal(codes, (x / scale).floor().clamp(-most, most)):
        return "codes are rounded down, which makes everything too small on average. Round to the nearest"
    # beside the nearest by one, and as near: a tie, or another precision
    if ((codes - nearest).abs() > 1).any() or ((codes * scale - x).abs() > 0.501 * scale).any():
        return f"{int((codes != nearest).sum())} codes are not the nearest: round x over scale"
    return None


def _misscaled(scale: Tensor, x: Tensor, most: int) -> str | None:
    right = x.abs().amax(-1, keepdim=True) / most

    def is_near(other: Tensor) -> bool:
        return torch.allclose(scale, other, rtol=1e-3)

    if is_near(right):
        return None
    if is_near(1 / right):
        return "scale is upside down: x is about codes * scale, so scale is the largest element over m"
    if is_near(x.amax(-1, keepdim=True) / most):
        return "scale is from the largest element; a negative one may be larger. Take absolute values first"
    if is_near(right * most):
        return f"scale is the largest absolute value itself; divide it by m, here {most}"
    factor = float((scale / right).mean())
    return f"scale is {factor:.3g} times what it should be: the largest absolute value of the row over m, here {most}"


FIVE = (
    (-15, 15, 0, 1, -1, 7, -8, 12),  # eight codes fill five bytes
    (3, -4, 5),
    (15,),
    (1, -15, 14, -2, 0, 9, -9, 3, 6, -6),
)
OFFSET = 15


def check_pack_five(pack_five: Callable[[Sequence[int]], Iterable[int]]) -> Feedback:
    """For `pack_five(codes)`: signed codes, -15 to 15, as bytes: code + 15, 5 bits each, lowest bit first, no gaps."""
    for done, codes in enumerate(FIVE):
        answer, call = pack_five(list(codes)), f"pack_five({list(codes)})"
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and the bytes.")
        if not isinstance(answer, Iterable) or isinstance(answer, str):
            return Feedback(False, f"{call} returned {type(answer).__name__}. Bytes or a list are expected.")
        found = answer.tolist() if isinstance(answer, Tensor) else list(answer)
        if not all(isinstance(n, Integral) and not isinstance(n, bool) and 0 <= n < 256 for n in found):
            return Feedback(False, f"{call} returned {found}. A byte is a whole number from 0 to 255.")
        right = _packed([code + OFFSET for code in codes])
        if found != right:
            said = f"{call} returned {found}; expected {right}"
            return Feedback(False, f"{said}: {_mispacked(found, codes)}.{_so_far(done, len(FIVE))}")
    return Feedback(True, f"All {len(FIVE)} are right. `pack_bits` in codec.py does it to a whole cache at once.")


def _mispacked(found: list[int], codes: Sequence[int]) -> str:
    shifted = [code + OFFSET for code in codes]
    size = -(-5 * len(codes) // 8)
    stream = "".join(f"{code:05b}" for code in shifted)
    padded = shifted + [0] * (-len(codes) % 8)
    causes = [
        (_packed([code + 16 for code in codes]), "codes are one too high: -15 is stored as 0, so 15 is added, not 16"),
        (_packed([code % 32 for code in codes]), "negative codes are in two's complement; here 15 is added to each"),
        (_packed([abs(code) + 16 * (code < 0) for code in codes]), "a bit is kept for the sign; add 15 to each"),
        (shifted, "each code has a byte of its own, and three bits of it are empty: leave no gaps"),
        ([int(stream[n : n + 8].ljust(8, "0"), 2) for n in range(0, len(stream), 8)], "the order is highest bit first; "
         "the first code belongs into the lowest 5 bits of the first byte"),
        (_packed([int(f"{code:05b}"[::-1], 2) for code in shifted]), "the bits inside each code are in reverse order"),
        (_packed(shifted[::-1]), "the codes are packed in reverse order"),
        (_packed(shifted)[::-1], "the bytes are in reverse order"),
        (_packed(shifted)[: 5 * len(codes) // 8], "the last bits do not fill a byte and were dropped: pad with zeros"),
        ([*_packed(shifted), 0], "there is a byte too many: no more than 5 bits a code, filled up to whole bytes"),
        (_packed(padded), "it is padded to eight codes, five bytes; whole bytes are enough"),
        (_packed([*shifted, *[OFFSET] * (-len(codes) % 8)])[:size], "the bits that fill up the last byte should be 0"),
        ([n % 256 for n in found], f"{size} bytes are expected" if len(found) != size else "write the codes one after "
         "the other into one long number, each 5 bits further up, and cut it into bytes from below"),
    ]  # fmt: skip
    return next(cause for wrong, cause in causes if wrong == found)


def _packed(codes: list[int]) -> list[int]:
    return pack_bits(torch.tensor(codes), 5).tolist()


def _not_whole(answer: object) -> str:
    """What is wrong with an answer that should be a whole number; nothing if it is one."""
    if answer is None or answer is ...:
        return "returned nothing. End the function with `return`, and a whole number."
    if isinstance(answer, bool) or not isinstance(answer, Integral):
        return f"returned {answer!r}. Bytes come in whole numbers: `-(-a // b)` divides and rounds up."
    return ""


def _so_far(done: int, of: int) -> str:
    return f" Right so far: {done} of {of}." if done else ""
