"""Causal attention with a key and a value for each head, sequences of any lengths (paper, section 2.1, expanded form).

N queries and M keys of all sequences, one after the other; H heads, W key width, V value width, T queries and S keys of
one sequence. A program holds some queries of one head and passes over the keys they see, with the softmax carried along
(arXiv 1805.02867, 2205.14135): sums so far are rescaled when a larger score comes.

W is 192 in V2, no power of two: a score is the sum of two products, over the W1 = 128 elements of the largest power of
two within it and over the rest.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
WIDTH, WIDE = 192, 128  # of keys and values: with more, registers and shared memory would not hold the tiles
LEAST = 98_304  # bytes of shared memory: GPUs with less have no tensor cores for bf16 either


@triton.jit
def _over(
    total, largest, out, query_1, query_2, key_ptr, value_ptr, start, end, seen, length, key_n, value_n, steepness,
    W1: tl.constexpr, W2: tl.constexpr, BLOCK_2: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's sum and largest [m] and the output [m, V] after the keys from start to end; pointers are at start.

    seen [m]: how many keys each query sees. If not MASKED these are whole tiles, and every query sees all of them.
    """
    column, at_1, at_v = tl.arange(0, BLOCK_N), tl.arange(0, W1), tl.arange(0, BLOCK_V)
    # the few tiles on the diagonal are not loaded ahead: registers for both loops would be more than there are
    for first in tl.range(start, end, BLOCK_N, num_stages=1 if MASKED else None):
        key = key_ptr + column[:, None] * key_n
        there = (first + column < length)[:, None]
        if MASKED:
            part = tl.load(key + at_1[None], mask=there, other=0.0)
        else:
            part = tl.load(key + at_1[None])
        score = tl.dot(query_1, tl.trans(part), input_precision=PRECISION)
        if W2 > 0:
            at_2 = W1 + tl.arange(0, BLOCK_2)[None]
            if MASKED or BLOCK_2 > W2:
                rest = tl.load(key + at_2, mask=there & (at_2 < W1 + W2), other=0.0)
            else:
                rest = tl.load(key + at_2)
            score = tl.dot(query_2, tl.trans(rest), score, input_precision=PRECISION)
        if MASKED:
            score = tl.where((first + column)[None] < seen[:, None], score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, 1) * steepness)
        weight, kept = tl.exp2(score * steepness - now[:, None]), tl.exp2(largest - now)
        total = total * kept + tl.sum(weight, 1)
        largest = now
        value = value_ptr + column[:, None] * value_n + at_v[None]
        if MASKED or BLOCK_V > V:
            content = tl.load(value, mask=there & (at_v[None] < V), other=0.0)
        else:
            content = tl.load(value)
        out = tl.dot(weight.to(content.dtype), content, out * kept[:, None], input_precision=PRECISION)
        key_ptr += BLOCK_N * key_n  # so the place of a tile has 64 bits, and within it 32 are enough
        value_ptr += BLOCK_N * value_n
    return total, largest, out


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, out_ptr, query_starts_ptr, key_starts_ptr,
    query_n, query_h, key_n, key_h, value_n, value_h, out_n, steepness,
    W1: tl.constexpr, W2: tl.constexpr, BLOCK_2: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head and sequence."""
    # the last queries first: they see the most keys, and what is left at the end should be small
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2)
    query_start, key_start = tl.load(query_starts_ptr + sequence), tl.load(key_starts_ptr + sequence)
    new = tl.load(query_starts_ptr + sequence + 1) - query_start
    length = tl.load(key_starts_ptr + sequence + 1) - key_start
    if first < new:
        key_ptr += key_start.to(tl.int64) * key_n + head * key_h
        value_ptr += key_start.to(tl.int64) * value_n + head * value_h
        at, at_v = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)[None]
        there, row = (at < new)[:, None], (query_start + at).to(tl.int64)[:, None]
        query = query_ptr + row * query_n + head * query_h
        query_1 = tl.load(query + tl.arange(0, W1)[None], mask=there, other=0.0)
        query_2 = query_1
        if W2 > 0:
            at_2 = W1 + tl.arange(0, BLOCK_2)[None]
            query_2 = tl.load(query + at_2, mask=there & (at_2 < W1 + W2), other=0.0)

        seen = length - new + at + 1
        whole = (length - new + first + 1) // BLOCK_N * BLOCK_N  # keys in tiles that all of these queries see
        end = tl.minimum(length, length - new + first + BLOCK_M)
        total = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        total, largest, out = _over(
            total, largest, out, query_1, query_2, key_ptr, value_ptr, 0, whole, seen, length, key_n, value_n,
            steepness, W1, W2, BLOCK_2, V, BLOCK_V, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        key_ptr += whole.to(tl.int64) * key_n
        value_ptr += whole.to(tl.int64) * value_n
        total, largest, out = _over(
            total, largest, out, query_1, query_2, key_ptr, value_ptr, whole, end, seen, length, key_n, value_n,
            steepness, W1, W2, BLOCK_2, V, BLOCK_V, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_n + head * V + at_v, out, mask=there & (at_v < V))


@triton.jit
def mla_prefill_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, query_starts_ptr, key_starts_ptr,
    query_n, query_h, key_n, key_h, value_n, value_h, out_n, steepness,
    W1: tl.constexpr, W2: tl.constexpr, BLOCK_2: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """bf16, on tensor cores."""
    _attend(
        query_ptr, key_ptr, value_ptr, out_ptr, query_starts_ptr, key_starts_ptr,
        query_n, query_h, key_n, key_h, value_n, value_h, out_n, steepness,
        W1, W2, BLOCK_2, V, BLOCK_V, BLOCK_M, BLOCK_N, "tf32",
    )  # fmt: skip


@triton.jit
def mla_prefill_exact_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, query_starts_ptr, key_starts_ptr,
    query_n, query_h, key_n, key_h, value_n, value_h, out_n, steepness,
    W1: tl.constexpr, W2: tl.constexpr, BLOCK_2: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp32 as it is: no tensor core has its products."""
    _attend(
        query_ptr, key_ptr, value_ptr, out_ptr, query_starts_ptr, key_starts_ptr,
        query_n, query_h, key_n, key_h, value_n, value_h, out_n, steepness,
        W1, W2, BLOCK_2, V, BLOCK_V, BLOCK_M, BLOCK_N, "ieee",
    )  # fmt: skip


class Chip(NamedTuple):
    """What of a GPU decides how the work is cut."""

    processors: int
    shared: int  # bytes of shared memory that a program may have


@cache
def chip(device: torch.device) -> Chip:
    """Of a CPU: an H100's."""
    if device.type != "cuda":
        return Chip(132, 232_448)
    found = torch.cuda.get_device_properties(device)
    return Chip(found.multi_processor_count, found.shared_memory_per_block_optin)


def tiles(dtype: torch.dtype, longest: int, others: int, chip: Chip) -> dict[str, int]:
    """How the work is cut: `others` heads and sequences have up to `longest` queries each."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    if chip.shared < 166_912:  # what an A100 has; GPUs without so large a memory are given less to hold
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    # small tiles where there would not be one large one for every processor
    large = triton.cdiv(longest, 128) * others >= chip.processors
    return {"BLOCK_M": 128 if large else 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def refuses(query, key, value, query_starts, key_starts, longest: int, scale: float) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if query.dtype not in (torch.float32, torch.bfloat16) or {key.dtype, value.dtype} != {query.dtype}:
        return f"queries are {query.dtype}, keys {key.dtype}, values {value.dtype}; all must be float32 or all bfloat16"
    heads, width = query.shape[1:]
    if key.shape[1:] != query.shape[1:] or value.shape[:2] != key.shape[:2]:
        return f"keys {list(key.shape)} and values {list(value.shape)} are not one for each of {heads} heads"
    if width % 16 or value.shape[2] % 16 or not 16 <= width <= WIDTH or not 16 <= value.shape[2] <= WIDE:
        return f"widths {width} and {value.shape[2]} are not multiples of 16 up to {WIDTH} and {WIDE}"
    if chip(query.device).shared < LEAST:
        return "this GPU has too little shared memory"
    if scale <= 0:
        return f"the scale {scale} is not positive"
    if query.stride(2) != 1 or key.stride(2) != 1 or value.stride(2) != 1:
        return "elements of a vector are not next to each other"
    if query_starts.dtype != torch.int32 or key_starts.dtype != torch.int32:
        return "starts are not int32"
    if not (query_starts.is_contiguous() and key_starts.is_contiguous()) or query_starts.shape != key_starts.shape:
        return "starts are not two plain vectors of one length"
    return None


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """query [N, H, W], key [M, H, W], value [M, H, V] -> [N, H, V], in one launch.

    Sequence b has the queries and keys from starts [B + 1] int32 b to b + 1; its queries are the last of its keys'
    positions, and at most `longest`.
    """
    (count, heads, width), wide = query.shape, value.shape[2]
    out = torch.empty((count, heads, wide), dtype=query.dtype, device=query.device)
    sequences = len(query_starts) - 1
    cut = tiles(query.dtype, longest, heads * sequences, chip(query.device))
    one = 2 ** (width.bit_length() - 1)
    kernel = mla_prefill_exact_kernel if query.dtype == torch.float32 else mla_prefill_kernel
    kernel[(triton.cdiv(longest, cut["BLOCK_M"]), heads, sequences)](
        query, key, value, out, query_starts, key_starts,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], out.stride(0), scale * LOG2E,
        W1=one, W2=width - one, BLOCK_2=triton.next_power_of_2(width - one), V=wide,
        BLOCK_V=triton.next_power_of_2(wide), **cut,
    )  # fmt: skip
    return out


def work(query, key, value, query_starts, key_starts, longest: int, scale: float) -> tuple[int, int]:
    """The least bytes moved and operations done: a product and a sum for each query, key it sees, and element."""
    new, length = (starts.diff().long() for starts in (query_starts, key_starts))
    pairs = (new * (length - new) + new * (new + 1) // 2).sum().item()
    heads, width = query.shape[1:]
    moved = query.nbytes + key.nbytes + value.nbytes + query.element_size() * query.shape[0] * heads * value.shape[2]
    return moved, 2 * heads * (width + value.shape[2]) * pairs


# type, queries and keys of each sequence, most queries it is cut for, heads, widths of keys and values:
# V2's widths in small and in large tiles, pocket's, one that no power of two divides well
EXAMPLES = (
    (torch.bfloat16, ((70, 70), (3, 130)), 70, 2, 192, 128),
    (torch.bfloat16, ((40, 200), (130, 130)), 8500, 1, 192, 128),
    (torch.bfloat16, ((65, 65),), 65, 8, 48, 32),
    (torch.bfloat16, ((20, 83),), 20, 1, 112, 48),
    (torch.float32, ((33, 33), (1, 97)), 33, 2, 192, 128),
    (torch.float32, ((40, 67),), 40, 3, 48, 32),
)
