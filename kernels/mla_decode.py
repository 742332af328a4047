"""Absorbed latent attention of a few new tokens over a paged cache, packed or not (paper, section 2.1.2).

B sequences, T new tokens, H heads, C latent, R rotary width. All rows of queries that a program holds, T x H of one
sequence, share each tile of the cache: it is read once, unpacked in registers, and is key and value at once. Sequences
are cut into pieces (flash decoding) so that pieces fill the device, and a second kernel adds up those of one sequence.
"""

from functools import cache

import torch
import triton
import triton.language as tl

PAGE = tl.constexpr(64)  # rows of the pool that lie together
LOWEST = tl.constexpr(-1e38)  # below every score, and finite: differences of it are numbers
EXACT = tl.constexpr(0x4B000000)  # 2^23 as fp32: a code in its lowest bits is added to it
LEAST = 128  # rows of the cache that are worth a program of their own
LOG2_E = 1.4426950408889634


@triton.jit
def cut(ends_ptr, batch, wanted, BATCH: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BATCH] each: tiles of every sequence, pieces it is cut into, number of the piece after its last."""
    each = tl.arange(0, BATCH)
    ends = tl.load(ends_ptr + each, mask=each < batch, other=0)
    tiles = (ends + BLOCK_N - 1) // BLOCK_N
    most = tl.maximum((tl.sum(tiles, 0) + wanted - 1) // wanted, LEAST)  # tiles of a piece
    pieces = (tiles + most - 1) // most
    return tiles, pieces, tl.cumsum(pieces, 0)


@triton.jit
def at(values, index, BATCH: tl.constexpr):
    """The element of values [BATCH] at index."""
    return tl.sum(tl.where(tl.arange(0, BATCH) == index, values, 0), 0)


@triton.jit
def coded(
    codes_ptr, row,
    BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes of BITS bits, lowest bit first, less their middle: of rows from `row` and columns from FIRST on, fp32.

    A run of codes that fills whole bytes lies in one 32-bit word or two: each is loaded once.
    """
    RUN: tl.constexpr = 4 if BITS >= 8 else 8
    BYTES: tl.constexpr = RUN * BITS // 8
    PITCH: tl.constexpr = WIDTH * BITS // 8
    runs = FIRST // RUN + tl.arange(0, BLOCK_W // RUN)
    start = tl.arange(0, BLOCK_N)[:, None, None] * PITCH + runs[None, :, None] * BYTES
    base_ptr = codes_ptr + row * PITCH // 4  # BLOCK_N rows fill whole words, whatever WIDTH is
    inside = tl.broadcast_to((runs < WIDTH // RUN)[None, :, None], start.shape)
    shifts = (BITS * tl.arange(0, RUN))[None, None, :]
    if BYTES == 4:
        codes = tl.load(base_ptr + start // 4, mask=inside, other=0) >> shifts
    else:
        low = tl.load(base_ptr + start // 4, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(base_ptr + start // 4 + 1, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        words = (low | (high << 32)) >> (8 * (start % 4)).to(tl.uint64)
        codes = (words >> shifts.to(tl.uint64)).to(tl.int32)
    exact = (codes & (2**BITS - 1)) | EXACT
    values = exact.to(tl.float32, bitcast=True) - (8388608.0 + 2 ** (BITS - 1) - 1)  # cheaper than a conversion
    return values.reshape(BLOCK_N, BLOCK_W)


@triton.jit
def unpacked(
    values_ptr, part_ptr, whole_ptr, row, inside, PITCH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows from `row` and columns from FIRST on [BLOCK_N, BLOCK_W], fp32 if packed; zeros where not `inside`.

    BITS 0: floats, with an fp32 scale for each GROUP if there is one. Otherwise codes, with a scale for each row, of
    which each GROUP, if there is one, takes a part in 255.
    """
    rows = tl.arange(0, BLOCK_N)
    if BITS == 0 and GROUP == 0:
        columns = FIRST + tl.arange(0, BLOCK_W)
        mask = inside[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(values_ptr + row * PITCH + rows[:, None] * PITCH + columns[None, :], mask=mask, other=0.0)
    elif BITS == 0:
        SIZE: tl.constexpr = min(GROUP, BLOCK_W)
        COUNT: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        tiles = FIRST + SIZE * tl.arange(0, BLOCK_W // SIZE)
        columns = tiles[:, None] + tl.arange(0, SIZE)[None, :]
        mask = inside[:, None, None] & (columns < WIDTH)[None, :, :]
        packed = tl.load(values_ptr + row * PITCH + rows[:, None, None] * PITCH + columns[None, :, :], mask, other=0.0)
        mask = inside[:, None] & (tiles < WIDTH)[None, :]
        part = tl.load(part_ptr + row * COUNT + rows[:, None] * COUNT + tiles[None, :] // GROUP, mask=mask, other=0.0)
        values = (packed.to(tl.float32) * part[:, :, None]).reshape(BLOCK_N, BLOCK_W)
    else:
        values = coded(values_ptr, row, BITS, WIDTH, FIRST, BLOCK_W, BLOCK_N)
        whole = tl.load(whole_ptr + row // 2 + rows // 2, mask=inside, other=0) >> (16 * (rows % 2))
        whole = whole.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        if GROUP == 0:
            values = values * whole[:, None]
        else:
            groups = FIRST // GROUP + tl.arange(0, BLOCK_W // GROUP)
            COUNT: tl.constexpr = WIDTH // GROUP
            start = rows[:, None] * COUNT + groups[None, :]
            mask = inside[:, None] & (groups < COUNT)[None, :]
            part = tl.load(part_ptr + row * COUNT // 4 + start // 4, mask=mask, other=0) >> (8 * (start % 4))
            unit = (part & 255).to(tl.float32) * (whole / 255)[:, None]
            values = (values.reshape(BLOCK_N, BLOCK_W // GROUP, GROUP) * unit[:, :, None]).reshape(BLOCK_N, BLOCK_W)
    return values


@triton.jit(do_not_specialize=["batch", "wanted", "table_b"])  # compiled once, however a batch and its pages grow
def mla_decode_kernel(
    content_ptr, position_ptr, latent_ptr, latent_part_ptr, latent_whole_ptr, rope_ptr, rope_whole_ptr,
    table_ptr, ends_ptr, out_ptr, pieces_ptr, sums_ptr, batch, new, heads, wanted, scale,
    content_b, content_t, content_h, position_b, position_t, position_h, table_b, C: tl.constexpr, R: tl.constexpr,
    LATENT_PITCH: tl.constexpr, LATENT_BITS: tl.constexpr, LATENT_GROUP: tl.constexpr, ROPE_PITCH: tl.constexpr,
    ROPE_BITS: tl.constexpr, BATCH: tl.constexpr, LEAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1)
    tiles, pieces, after = cut(ends_ptr, batch, wanted, BATCH, LEAST, BLOCK_N)
    sequence = tl.sum((after <= piece).to(tl.int32), 0)
    if sequence >= batch:
        return
    tiles, pieces, after = at(tiles, sequence, BATCH), at(pieces, sequence, BATCH), at(after, sequence, BATCH)
    each = (tiles + pieces - 1) // pieces
    first = (piece - after + pieces) * each
    last = tl.minimum(first + each, tiles)
    end = tl.load(ends_ptr + sequence)

    kind = content_ptr.dtype.element_ty
    asked = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # token and head of each row
    real = asked < new * heads
    token, head = asked // heads, asked % heads
    unseen = token + 1 - new  # less the length: the first position that a row does not see
    wide = sequence.to(tl.int64)
    columns, turned = tl.arange(0, HALF), tl.arange(0, BLOCK_R)
    content_ptr += wide * content_b
    where = (token * content_t + head * content_h)[:, None] + columns[None, :]
    in_left, in_right = real[:, None] & (columns < C)[None, :], real[:, None] & (columns < C - HALF)[None, :]
    content_left = tl.load(content_ptr + where, mask=in_left, other=0.0)
    content_right = tl.load(content_ptr + where + HALF, mask=in_right, other=0.0)
    where = (token * position_t + head * position_h)[:, None] + turned[None, :]
    mask = real[:, None] & (turned < R)[None, :]
    position = tl.load(position_ptr + wide * position_b + where, mask=mask, other=0.0)

    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    read_left = tl.zeros([BLOCK_M, HALF], tl.float32)
    read_right = tl.zeros([BLOCK_M, HALF], tl.float32)
    table_ptr += wide * table_b
    page = tl.load(table_ptr + first * BLOCK_N // PAGE)
    for tile in tl.range(first, last, disable_licm=True):
        start = tile * BLOCK_N
        row = page.to(tl.int64) * PAGE + start % PAGE
        # one ahead, or the pipeline would spend one of its stages on it
        page = tl.load(table_ptr + (start + BLOCK_N) // PAGE, mask=tile + 1 < last, other=0)
        inside = tl.arange(0, BLOCK_N) < end - start
        left = unpacked(
            latent_ptr, latent_part_ptr, latent_whole_ptr, row, inside, LATENT_PITCH,
            LATENT_BITS, LATENT_GROUP, C, 0, HALF, BLOCK_N,
        ).to(kind)  # fmt: skip
        right = unpacked(
            latent_ptr, latent_part_ptr, latent_whole_ptr, row, inside, LATENT_PITCH,
            LATENT_BITS, LATENT_GROUP, C, HALF, HALF, BLOCK_N,
        ).to(kind)  # fmt: skip
        rope = unpacked(
            rope_ptr, None, rope_whole_ptr, row, inside, ROPE_PITCH, ROPE_BITS, 0, R, 0, BLOCK_R, BLOCK_N
        ).to(kind)  # fmt: skip
        scores = tl.dot(content_left, tl.trans(left), input_precision=PRECISION)
        scores = tl.dot(content_right, tl.trans(right), scores, input_precision=PRECISION)
        scores = tl.dot(position, tl.trans(rope), scores, input_precision=PRECISION) * scale
        scores = tl.where((tl.arange(0, BLOCK_N) + (start - end))[None, :] < unseen[:, None], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        kept, weights = tl.exp2(largest - now), tl.exp2(scores - now[:, None])
        total = total * kept + tl.sum(weights, 1)
        weights = weights.to(kind)
        read_left = tl.dot(weights, left, read_left * kept[:, None], input_precision=PRECISION)
        read_right = tl.dot(weights, right, read_right * kept[:, None], input_precision=PRECISION)
        largest = now

    total = tl.where(total == 0.0, 1.0, total)  # a row may see nothing of its sequence's last piece
    place = asked[:, None] * C + columns[None, :]
    if pieces == 1:
        out_ptr += wide * new * heads * C
        tl.store(out_ptr + place, (read_left / total[:, None]).to(kind), mask=in_left)
        tl.store(out_ptr + place + HALF, (read_right / total[:, None]).to(kind), mask=in_right)
    else:
        before = piece.to(tl.int64) * new * heads
        tl.store(pieces_ptr + before * C + place, read_left / total[:, None], mask=in_left)
        tl.store(pieces_ptr + before * C + place + HALF, read_right / total[:, None], mask=in_right)
        tl.store(sums_ptr + before + asked, largest + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["batch", "wanted"])
def combine_kernel(
    pieces_ptr, sums_ptr, ends_ptr, out_ptr, batch, rows, wanted, C: tl.constexpr, BATCH: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some columns of one row (token and head) of one sequence: its pieces, each by its share of the sum."""
    sequence = tl.program_id(2)
    _, pieces, after = cut(ends_ptr, batch, wanted, BATCH, LEAST, BLOCK_N)
    pieces, after = at(pieces, sequence, BATCH), at(after, sequence, BATCH)
    if pieces == 1:
        return  # written already
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, inside = tl.program_id(0), columns < C
    largest, total = tl.full([], LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
    read = tl.zeros([BLOCK_C], tl.float32)
    for first in range(after - pieces, after, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        where = piece.to(tl.int64) * rows + row
        sums = tl.load(sums_ptr + where, mask=piece < after, other=float("-inf"))
        mask = (piece < after)[:, None] & inside[None, :]
        values = tl.load(pieces_ptr + where[:, None] * C + columns[None, :], mask=mask, other=0.0)
        now = tl.maximum(largest, tl.max(sums, 0))
        kept, shares = tl.exp2(largest - now), tl.exp2(sums - now)
        total = total * kept + tl.sum(shares, 0)
        read = read * kept + tl.sum(values * shares[:, None], 0)
        largest = now
    place = (sequence.to(tl.int64) * rows + row) * C
    tl.store(out_ptr + place + columns, (read / total).to(out_ptr.dtype.element_ty), mask=inside)


CODES = (4, 5, 6, 8, 10)  # bits of codes that are read
STORED = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8)


@cache
def device_of(index: int | None) -> tuple[int, int]:
    """Multiprocessors of a GPU, and its architecture, as 90; of no GPU as many as an H100 has, and 0."""
    if index is None:
        return 132, 0
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, 10 * found.major + found.minor


def coding(format) -> tuple[int, int, int] | None:
    """Bits of a latent's code, elements of its groups, bits of a rotary key's code (0: floats); None if not known."""
    if hasattr(format, "dtype"):
        return 0, 0, 0
    latent, rope = format.latent, format.rope
    bits, turned = getattr(latent, "bits", 0), getattr(rope, "bits", 0)
    group = getattr(latent, "group" if bits else "tile", 0)
    known = (bits in CODES and group in (0, 16)) or (bits == 0 and group in (16, 32, 64, 128))
    plain = turned in CODES and not hasattr(rope, "group") or getattr(rope, "dtype", None) == torch.bfloat16
    return (bits, group, turned) if known and plain else None


def refuses(content: torch.Tensor, position: torch.Tensor, latents, scale: float) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if content.dtype not in (torch.float32, torch.bfloat16) or position.dtype != content.dtype:
        return f"queries are {content.dtype} and {position.dtype}; both must be float32 or both bfloat16"
    if content.stride(-1) != 1 or position.stride(-1) != 1:
        return "elements of a query are not next to each other"
    widths = content.shape[-1], position.shape[-1]
    if widths != tuple(latents.row) or widths[0] % 16 or widths[1] % 16 or widths[0] > 512 or widths[1] > 128:
        return f"queries of {widths[0]} + {widths[1]}: as wide as rows, multiples of 16, up to 512 + 128 are read"
    if latents.format.recent:
        return "the newest tokens are kept beside the cache"
    if latents.parts[0].dtype not in STORED or coding(latents.format) is None:
        return f"rows stored as {latents.format.name} are not read"
    if latents.parts[0].dtype == torch.float8_e4m3fn and 0 < device_of(content.device.index)[1] < 89:
        return "this GPU has no 8-bit floats"
    if {latents.table.dtype, latents.ends.dtype} != {torch.int32}:
        return "pages or ends are not int32"
    if latents.table.stride(-1) != 1 or not all(x.is_contiguous() for x in (latents.ends, *latents.parts)):
        return "parts of the cache, its pages or ends are not contiguous"
    return None


def tensors(latents, bits: int, group: int) -> dict[str, torch.Tensor | None]:
    """The parts of a cache by the names of the kernel; bytes and fp16 as 32-bit words."""
    narrow = (torch.uint8, torch.float16)
    parts = [part.view(-1).view(torch.int32) if part.dtype in narrow else part for part in latents.parts]
    parts += [] if bits or group else [parts[0][:, latents.row[0] :]]
    latent, part = parts.pop(0), parts.pop(0) if group else None
    whole, rope = parts.pop(0) if bits else None, parts.pop(0)
    return {
        "latent_ptr": latent, "latent_part_ptr": part, "latent_whole_ptr": whole,
        "rope_ptr": rope, "rope_whole_ptr": parts.pop() if parts else None,
    }  # fmt: skip


def shape(rows: int, dtype: torch.dtype, stored: torch.dtype, chip: int) -> tuple[int, int, int, int, int]:
    """Rows of queries and of the cache a program holds, warps, stages, programs of a multiprocessor at a time."""
    packed, stages = stored.itemsize == 1, 2 if stored == torch.float32 else 3
    if dtype == torch.float32:
        return 16, 16, 16, 1, 1
    if chip == 90 and rows > (16 if packed else 32):  # what Hopper's products want; elsewhere it does not fit
        return 64, 32, 8, stages, 1
    if rows <= 16 or packed:
        return 16, 32, 4 if packed else 8, stages, 2
    return 32, 32, 8, stages, 1


def launch(content: torch.Tensor, position: torch.Tensor, latents, scale: float) -> torch.Tensor:
    """[B, T, H, C]: what each head reads of the latents, in content's type. One launch, or two if sequences are cut."""
    batch, new, heads, width = content.shape
    rows, turned = new * heads, position.shape[-1]
    bits, group, rope_bits = coding(latents.format)
    processors, chip = device_of(content.device.index)
    block_m, block_n, warps, stages, most = shape(rows, content.dtype, latents.parts[0].dtype, chip)
    shares = triton.cdiv(rows, block_m)  # programs that read the same piece
    programs = triton.cdiv(most * processors, shares)
    wanted = max(programs - batch, programs // 2, 1)  # so that pieces, up to one more a sequence, run all at once
    length = triton.cdiv(latents.table.shape[1] * 64, block_n)  # tiles of the longest sequence there could be
    pieces = min(wanted + batch, batch * triton.cdiv(length, LEAST // block_n))
    split = pieces > batch
    out = torch.empty((batch, new, heads, width), dtype=content.dtype, device=content.device)
    held = torch.empty((pieces if split else 0, rows, width), dtype=torch.float32, device=content.device)
    sums = torch.empty(held.shape[:2], dtype=torch.float32, device=content.device)
    cuts = {"BATCH": triton.next_power_of_2(batch), "LEAST": LEAST // block_n, "BLOCK_N": block_n}
    mla_decode_kernel[(shares, pieces)](
        content, position, **tensors(latents, bits, group), table_ptr=latents.table, ends_ptr=latents.ends,
        out_ptr=out, pieces_ptr=held, sums_ptr=sums, batch=batch, new=new, heads=heads, wanted=wanted,
        scale=scale * LOG2_E, content_b=content.stride(0), content_t=content.stride(1), content_h=content.stride(2),
        position_b=position.stride(0), position_t=position.stride(1), position_h=position.stride(2),
        table_b=latents.table.stride(0), C=width, R=turned, LATENT_PITCH=latents.parts[0].shape[1], LATENT_BITS=bits,
        LATENT_GROUP=group, ROPE_PITCH=0 if rope_bits else latents.parts[2 if group else 0].shape[1],
        ROPE_BITS=rope_bits, **cuts, BLOCK_M=block_m, HALF=max(triton.next_power_of_2(width) // 2, 16),
        BLOCK_R=triton.next_power_of_2(turned), PRECISION="ieee" if content.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages, maxnreg=65536 // (32 * warps) if warps > 8 else None,
    )  # fmt: skip
    if split:
        columns = min(triton.next_power_of_2(width), 128)
        combine_kernel[(rows, triton.cdiv(width, columns), batch)](
            held, sums, latents.ends, out, batch, rows, wanted,
            C=width, **cuts, BLOCK_P=16, BLOCK_C=columns, num_warps=4,
        )  # fmt: skip
    return out


def work(content: torch.Tensor, position: torch.Tensor, latents, scale: float) -> tuple[int, int]:
    """The least bytes moved and operations done. It asks the device how long sequences are."""
    _, new, heads, width = content.shape
    row = sum(part.shape[1] * part.itemsize for part in latents.parts)
    length = int(latents.ends.sum().item())
    operations = 2 * new * heads * length * (2 * width + position.shape[-1])
    return length * row + 2 * content.nbytes + position.nbytes, operations


# cache, type of the queries, latent, rotary width, heads, new tokens, length of each sequence
EXAMPLES = (
    *((name, torch.bfloat16, 512, 64, 16, 1, (65,)) for name in ("bf16", "fp8", "int8", "q6", "int6", "int4")),
    *((name, torch.bfloat16, 512, 64, 128, 1, (65,)) for name in ("bf16", "fp8", "q6")),
    ("fp32", torch.float32, 512, 64, 16, 1, (20,)),
    ("bf16", torch.bfloat16, 64, 16, 8, 1, (1, 300, 64, 65)),  # pocket's widths
    ("fp32", torch.float32, 64, 16, 8, 3, (3, 150, 64, 65)),
    ("q6", torch.float32, 64, 16, 8, 1, (1, 65)),
    ("q6", torch.bfloat16, 48, 16, 5, 3, (3, 200)),
)
