"""What a pass adds to the cache of one layer: norm of the latent, rotations, packed rows (paper, eq. 9, 15, 41-43).

B sequences, T new tokens, H heads, R rotary width, C latent, W = C + R the cached row. A row is packed by the codecs of
workbench/codec.py to the byte: a vector becomes `codes`, and for most of them `scales`, for groups a `whole` too.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ELEMENTS = 1024  # of queries, that one program turns
LIMIT = 4096  # elements of a row that a program keeps in registers
HALFWAY = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away again it leaves the nearest whole number, or even
TINY = tl.constexpr(2.0**-24)  # the smallest fp16


@triton.jit
def _largest(x, AXIS: tl.constexpr):
    """The largest absolute value along an axis; as integers they are in the same order, and a NaN is above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _half(scale):
    """codec._half: the fp16 not below a scale, never 0, NaN where there is none. In fp32."""
    half = scale.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    half = tl.where(half.to(tl.float32) < scale, above.to(tl.float32), half.to(tl.float32))
    half = tl.where(half < TINY, TINY, half)
    return tl.where(half == float("inf"), float("nan"), half)


@triton.jit
def _codes(x, unit, MOST: tl.constexpr):
    """The nearest whole multiples of unit, from -MOST to MOST, in fp32; of a NaN any."""
    return tl.minimum(tl.maximum((tl.div_rn(x, unit) + HALFWAY) - HALFWAY, -MOST), MOST)


@triton.jit
def _grouped(x, largest, whole, MOST: tl.constexpr):
    """codec.Groups: codes of x [n, group], scales [n, 1] of 1 to 255 parts of `whole`; largest: scales wanted."""
    for step in tl.static_range(6):
        # 1.0, 0.95, ... 0.75, each rounded once
        wanted = tl.div_rn(largest * ((20 - step) / 20), whole) * 255
        part = tl.minimum(tl.maximum(tl.ceil(wanted), 1), 255)
        unit = tl.div_rn(part, 255.0) * whole
        tried = _codes(x, unit, MOST)
        off = tried * unit - x
        error = tl.sum(off * off, 1, keep_dims=True)
        if step == 0:
            least, scale, codes = error, part, tried
        else:
            better = error < least
            least, scale = tl.where(better, error, least), tl.where(better, part, scale)
            codes = tl.where(better, tried, codes)
    return codes, scale


@triton.jit
def _store_bits(bits_ptr, row, codes, WIDTH: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr):
    """codec.pack_bits: codes [n], of which WIDTH are stored; PER of them fill whole bytes."""
    BLOCK: tl.constexpr = codes.shape[0]
    WORDS: tl.constexpr = BLOCK // PER
    SIZE: tl.constexpr = PER * BITS // 8
    BYTES: tl.constexpr = (WIDTH * BITS + 7) // 8
    codes = tl.where(tl.arange(0, BLOCK) < WIDTH, codes, 0)
    if PER == 1:
        word = tl.reshape(codes, [WORDS, 1]).to(tl.int64)
    else:
        shifts = (BITS * tl.arange(0, PER)).to(tl.int64)
        word = tl.sum(tl.reshape(codes, [WORDS, PER]).to(tl.int64) << shifts[None], 1, keep_dims=True)
    at = tl.arange(0, 8)[None]  # 8 is a power of two, the bytes of a word may be 1, 3 or 5
    offsets = SIZE * tl.arange(0, WORDS)[:, None] + at
    byte = (word >> (8 * at).to(tl.int64)) & 255
    tl.store(bits_ptr + row * BYTES + offsets, byte.to(tl.uint8), mask=(at < SIZE) & (offsets < BYTES))


@triton.jit
def _pack(
    x, row, codes_ptr, scales_ptr, whole_ptr,
    KIND: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, PER: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Writes x [BLOCK] fp32, of which WIDTH count and the rest is 0, into row `row` of its parts.

    KIND, BITS, SIZE (of a tile or group) and PER: the codec. STRIDE, FIRST: a float's part may be shared with others.
    """
    BLOCK: tl.constexpr = x.shape[0]
    MOST: tl.constexpr = 2 ** (BITS - 1) - 1
    offsets = tl.arange(0, BLOCK)
    if KIND == "float":
        kind = codes_ptr.dtype.element_ty
        tl.store(codes_ptr + row * STRIDE + FIRST + offsets, x.to(kind), mask=offsets < WIDTH)
    elif KIND == "codes":
        whole = _half(tl.div_rn(_largest(x, 0), 1.0 * MOST))
        codes = _codes(x, whole, MOST)
        _store_bits(codes_ptr, row, codes.to(tl.int32) + MOST, WIDTH, BITS, PER)
        tl.store(scales_ptr + row, whole.to(tl.float16))
    else:
        PARTS: tl.constexpr = BLOCK // SIZE
        USED: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
        parts = tl.arange(0, PARTS)[:, None]
        groups = tl.reshape(x, [PARTS, SIZE])
        largest = _largest(groups, 1)[:, None]
        if KIND == "tiles":
            scale = tl.div_rn(largest, 448.0)
            scale = tl.where(scale < 1e-12, 1e-12, scale)
            values = tl.reshape(tl.div_rn(groups, scale), [BLOCK])
            tl.store(codes_ptr + row * WIDTH + offsets, values.to(tl.float8e4nv), mask=offsets < WIDTH)
            tl.store(scales_ptr + row * USED + parts, scale, mask=parts < USED)
        else:
            whole = _half(tl.div_rn(_largest(x, 0), 1.0 * MOST))
            codes, scale = _grouped(groups, tl.div_rn(largest, 1.0 * MOST), whole, MOST)
            _store_bits(codes_ptr, row, tl.reshape(codes, [BLOCK]).to(tl.int32) + MOST, WIDTH, BITS, PER)
            tl.store(scales_ptr + row * USED + parts, scale.to(tl.uint8), mask=parts < USED)
            tl.store(whole_ptr + row, whole.to(tl.float16))


@triton.jit
def _turned(x, rotations_ptr, WIDTH: tl.constexpr):
    """x [n, BLOCK] fp32 by the rotations of one token: neighbouring pairs are complex numbers, and so are those."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    at = tl.arange(0, PAIRS)
    cosine = tl.load(rotations_ptr + 2 * at, mask=2 * at < WIDTH, other=0.0)[None]
    sine = tl.load(rotations_ptr + 2 * at + 1, mask=2 * at < WIDTH, other=0.0)[None]
    real, imaginary = tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    both = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(both, [ROWS, 2 * PAIRS])


@triton.jit
def append_kernel(
    position_ptr, compressed_ptr, norm_ptr, rotations_ptr, turned_ptr, table_ptr, before_ptr,
    latent_ptr, latent_scales_ptr, latent_whole_ptr, rope_ptr, rope_scales_ptr, rope_whole_ptr,
    position_b, position_t, position_h, compressed_b, compressed_t, rotations_b, rotations_t, turned_b, turned_t,
    table_b, heads, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
    LATENT_KIND: tl.constexpr, LATENT_BITS: tl.constexpr, LATENT_SIZE: tl.constexpr, LATENT_PER: tl.constexpr,
    ROPE_KIND: tl.constexpr, ROPE_BITS: tl.constexpr, ROPE_SIZE: tl.constexpr, ROPE_PER: tl.constexpr,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, ROPE_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kind = compressed_ptr.dtype.element_ty
    rotations_ptr += sequence * rotations_b + token.to(tl.int64) * rotations_t
    compressed_ptr += sequence * compressed_b + token.to(tl.int64) * compressed_t
    place = tl.load(before_ptr + sequence) + token
    row = tl.load(table_ptr + sequence * table_b + place // 64).to(tl.int64) * 64 + place % 64
    if tl.program_id(2) == 0:  # the latent
        at = tl.arange(0, BLOCK_C)
        x = tl.load(compressed_ptr + at, mask=at < C, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + at, mask=at < C, other=0.0).to(tl.float32)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 0), 1.0 * C) + eps))
        # rounded before the weight and after it, as the reference is
        latent = ((x * scale).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)
        _pack(
            latent, row, latent_ptr, latent_scales_ptr, latent_whole_ptr,
            LATENT_KIND, LATENT_BITS, LATENT_SIZE, LATENT_PER, C, LATENT_STRIDE, 0,
        )  # fmt: skip
    elif tl.program_id(2) == 1:  # the rotary key
        beside = tl.arange(0, BLOCK_K)
        key = tl.load(compressed_ptr + C + beside, mask=beside < R, other=0.0).to(tl.float32)
        key = tl.reshape(_turned(key[None], rotations_ptr, R), [BLOCK_K]).to(kind).to(tl.float32)
        _pack(
            key, row, rope_ptr, rope_scales_ptr, rope_whole_ptr,
            ROPE_KIND, ROPE_BITS, ROPE_SIZE, ROPE_PER, R, ROPE_STRIDE, ROPE_FIRST,
        )  # fmt: skip
    else:  # some heads of the queries
        head = (tl.program_id(2) - 2) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        width = tl.arange(0, BLOCK_R)[None]
        inside = (head < heads) & (width < R)
        position_ptr += sequence * position_b + token.to(tl.int64) * position_t
        turned_ptr += sequence * turned_b + token.to(tl.int64) * turned_t
        query = tl.load(position_ptr + head * position_h + width, mask=inside, other=0.0).to(tl.float32)
        query = _turned(query, rotations_ptr, R).to(turned_ptr.dtype.element_ty)
        tl.store(turned_ptr + head * R + width, query, mask=inside)


class Stored(NamedTuple):
    """How a codec of codec.py stores a vector: what the kernel has to know when it is compiled."""

    kind: str
    bits: int = 8
    size: int = 1  # elements of a tile or group
    parts: int = 1

    @property
    def per(self) -> int:
        """Codes that fill whole bytes together."""
        return 8 // math.gcd(self.bits, 8)

    def block(self, width: int) -> int:
        """Elements a program holds."""
        return max(triton.next_power_of_2(width), self.size, self.per)


def stored(codec) -> Stored | None:
    """Of a codec of codec.py; None for another."""
    match type(codec).__name__:
        case "Float":
            return Stored("float")
        case "Tiles":
            return Stored("tiles", size=codec.tile, parts=2)
        case "Codes":
            return Stored("codes", bits=codec.bits, parts=2)
        case "Groups":
            return Stored("groups", bits=codec.bits, size=codec.group, parts=3)
    return None


@cache
def plan(format, latent: int, rope: int) -> tuple[dict, tuple[int | None, ...]] | None:
    """For rows of these widths the kernel's constants, and which part of the format each of its six pointers is.

    None for a format it was not written for.
    """
    if type(format).__name__ == "Plain":  # one part holds both
        both, strides, first, places = (Stored("float"),) * 2, (latent + rope,) * 2, latent, (0, None, None) * 2
    else:
        both = stored(getattr(format, "latent", None)), stored(getattr(format, "rope", None))
        if None in both or any(one.size & (one.size - 1) for one in both):
            return None
        strides, first = (latent, rope), 0
        ahead = both[0].parts
        places = tuple(start + n if n < one.parts else None for start, one in zip((0, ahead), both) for n in range(3))
    constants = {"BLOCK_C": both[0].block(latent), "BLOCK_K": both[1].block(rope), "ROPE_FIRST": first}
    for name, one, stride in zip(("LATENT", "ROPE"), both, strides):
        constants |= {f"{name}_KIND": one.kind, f"{name}_BITS": one.bits, f"{name}_SIZE": one.size}
        constants |= {f"{name}_PER": one.per, f"{name}_STRIDE": stride}
    return constants, places


@cache
def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def refuses(position, compressed, norm, rotations, latents, before, eps: float) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if latents.format.recent:
        return "the format keeps recent tokens wide beside their rows"
    if plan(latents.format, *latents.row) is None:
        return f"no kernel packs the format {latents.format.name}"
    if any(part.dtype == torch.float8_e4m3fn for part in latents.parts) and not _has_fp8(position.device):
        return "this GPU has no 8-bit floats"
    kinds = {position.dtype, compressed.dtype, norm.dtype}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16}:
        return f"queries, rows and norm are {', '.join(map(str, kinds))}; they must be all float32 or all bfloat16"
    if rotations.dtype != torch.float32 or rotations.shape[-1] != 2 or rotations.stride()[-2:] != (2, 1):
        return "rotations are not pairs of float32, cosine and sine, next to each other"
    latent, rope = latents.row
    if (position.shape[-1], compressed.shape[-1]) != (rope, latent + rope) or rope % 2:
        return f"widths {position.shape[-1]} and {compressed.shape[-1]} are not those of a row of {latent} and {rope}"
    if latent > LIMIT or rope > LIMIT:
        return f"a row of {latent} and {rope} elements is wider than {LIMIT}"
    if position.stride(-1) != 1 or compressed.stride(-1) != 1 or latents.table.stride(-1) != 1:
        return "elements of a vector are not next to each other"
    if not (norm.is_contiguous() and before.is_contiguous() and all(part.is_contiguous() for part in latents.parts)):
        return "the cache, the norm or the lengths have gaps"
    if before.dtype != torch.int32 or latents.table.dtype != torch.int32:
        return "tables and lengths are not int32"
    return None


def launch(
    position: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    rotations: torch.Tensor,
    latents,
    before: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Writes the rows of new tokens and turns their queries, in one launch: [B, T, H, R] turned.

    position [B, T, H, R], compressed [B, T, W]: both before rotation, and the latent before its norm [C]; rotations
    fp32 [B, T, R / 2, 2]: cosine, sine; latents: pages.Latents; before int32 [B]: tokens there already.
    """
    batch, new, heads, rope = position.shape
    turned = torch.empty(position.shape, dtype=position.dtype, device=position.device)
    constants, places = plan(latents.format, *latents.row)
    block = triton.next_power_of_2(rope)
    some = min(max(ELEMENTS // block, 1), triton.next_power_of_2(heads))
    parts = (None if place is None else latents.parts[place] for place in places)
    append_kernel[(new, batch, 2 + triton.cdiv(heads, some))](
        position, compressed, norm, rotations, turned, latents.table, before,
        *parts,
        *position.stride()[:3], *compressed.stride()[:2], *rotations.stride()[:2], *turned.stride()[:2],
        latents.table.stride(0),
        heads, eps,
        C=latents.row[0], R=rope, BLOCK_R=block, BLOCK_H=some, **constants,
        num_warps=4,
    )  # fmt: skip
    return turned


def work(position, compressed, norm, rotations, latents, before, eps: float) -> tuple[int, int]:
    """The least bytes moved and operations done: a norm takes four for each element, a turn three."""
    rows = compressed.shape[0] * compressed.shape[1] * sum(part.shape[1] * part.itemsize for part in latents.parts)
    read = position.nbytes + compressed.nbytes + norm.nbytes + rotations.nbytes + 8 * len(before)
    return read + position.nbytes + rows, 4 * compressed.numel() + 3 * position.numel()


# format, type, sequences, tokens, heads, latent and rotary width: every format at V2's width, pocket's, odd ones
EXAMPLES = (
    *((name, torch.bfloat16, 3, 1, 16, 512, 64) for name in ("fp32", "bf16", "fp8", "int8", "q6", "int6", "int4")),
    *((name, torch.float32, 1, 2, 16, 512, 64) for name in ("fp32", "bf16", "fp8", "int8", "q6", "int6", "int4")),
    ("bf16", torch.bfloat16, 1, 1, 128, 512, 64),
    ("q6", torch.bfloat16, 1, 1, 128, 512, 64),
    ("fp32", torch.float32, 3, 5, 8, 64, 16),
    ("q6", torch.bfloat16, 3, 5, 8, 64, 16),
    ("int8", torch.float32, 1, 5, 5, 48, 16),
)
