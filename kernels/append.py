"""What a pass adds to the cache of one layer: norm of the latent, rotations, packed rows (paper, eq. 9, 15, 41-43).

B sequences, T new tokens, H heads, R rotary width, C latent, W = C + R the cached row. A row is packed by the codecs of
workbench/codec.py to the byte: a vector becomes `codes`, and for most of them `scales`, for groups a `whole` too.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

ELEMENTS = 1024  # of queries, that one program turns
KINDS = {"Float": "float", "Tiles": "tiles", "Codes": "codes", "Groups": "groups"}  # codecs of codec.py, by class
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
def _grouped(x, MOST: tl.constexpr, whole, largest):
    """codec.Groups: codes of x [n, group] and scales [n, 1] of 1 to 255 parts of `whole`: the best of six steps."""
    for step in tl.static_range(6):
        # 1.0, 0.95, ... 0.75, each rounded once
        wanted = tl.div_rn(largest * ((20 - step) / 20), whole) * 255
        part = tl.minimum(tl.maximum(tl.ceil(wanted), 1), 255)
        unit = tl.div_rn(part, tl.full(part.shape, 255, tl.float32)) * whole
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
        largest = _largest(tl.reshape(x, [1, BLOCK]), 1)
        whole = _half(tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32)))  # [1]
        codes = _codes(x, tl.broadcast_to(whole, [BLOCK]), MOST)
        _store_bits(codes_ptr, row, codes.to(tl.int32) + MOST, WIDTH, BITS, PER)
        tl.store(scales_ptr + row + tl.arange(0, 1), whole.to(tl.float16))
    else:
        PARTS: tl.constexpr = BLOCK // SIZE
        USED: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
        parts = tl.arange(0, PARTS)[:, None]
        groups = tl.reshape(x, [PARTS, SIZE])
        largest = _largest(groups, 1)[:, None]
        if KIND == "tiles":
            scale = tl.div_rn(largest, tl.full(largest.shape, 448, tl.float32))
            scale = tl.where(scale < 1e-12, 1e-12, scale)
            values = tl.reshape(tl.div_rn(groups, tl.broadcast_to(scale, groups.shape)), [BLOCK])
            tl.store(codes_ptr + row * WIDTH + offsets, values.to(tl.float8e4nv), mask=offsets < WIDTH)
            tl.store(scales_ptr + row * USED + parts, scale, mask=parts < USED)
        else:
            largest = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32))
            whole = _half(_largest(largest, 0)[:, None])  # [1, 1]
            codes, scale = _grouped(groups, MOST, tl.broadcast_to(whole, largest.shape), largest)
            _store_bits(codes_ptr, row, tl.reshape(codes, [BLOCK]).to(tl.int32) + MOST, WIDTH, BITS, PER)
            tl.store(scales_ptr + row * USED + parts, scale.to(tl.uint8), mask=parts < USED)
            tl.store(whole_ptr + row + tl.zeros([1, 1], tl.int32), whole.to(tl.float16))
