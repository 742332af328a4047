"""Routing in one launch: logits, edits, softmax, groups, top K, gates and the recorder's row (paper, eq. 21-22, 2.2.2).

N tokens, D hidden, E experts, K chosen, L layers with experts. Each program computes logits of a block of tokens for a
block of experts; the one that ends last for its tokens chooses their experts. Nobody waits for anybody.
"""

from functools import cache

import torch
import triton
import triton.language as tl

EXPERTS, CHOSEN = 256, 16  # at most
BLOCKS = 4096  # of tokens in a launch, at most: a counter each
FEW = 64  # tokens up to which a program multiplies and adds in place, without shared tiles
METHODS = ("greedy", "group_limited_greedy")


@triton.jit
def strongest(rank, experts, SIZE: tl.constexpr):
    """Of rank int32 [n, SIZE], in each row: the largest, and the lowest expert that has it. Both [n]."""
    best = tl.max(rank, 1)  # of 32-bit integers a warp has the largest in one instruction
    return best, tl.min(tl.where(rank == best[:, None], experts, SIZE), 1)


@triton.jit(do_not_specialize=["tokens", "layer", "capacity"])
def route_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [E, D]
    bias_ptr,  # [E] or None
    logits_ptr,  # [N, E] fp32, between programs
    counters_ptr,  # [token blocks], 0 before and after
    ids_ptr,  # [N, K]
    gates_ptr,  # [N, K]
    scores_ptr,  # [N, K + 1]
    ring_experts_ptr,  # [capacity, L, K] or None, as the two that follow
    ring_gates_ptr,
    ring_margins_ptr,
    cursor_ptr,
    tokens,
    stride_x,
    layer,
    layers,
    capacity,
    factor,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # experts of a group
    KEPT: tl.constexpr,  # groups that are kept; 0: there are none
    NORMED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,  # tokens whose experts are chosen at once
    SIZE: tl.constexpr,  # E and K + 1, up to a power of two
    SLOTS: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_D)
    x_at = x_ptr + row[:, None] * stride_x + column[None, :]
    weight_at = weight_ptr + expert[:, None] * D + column[None, :]
    # all products and sums in fp32: near ties decide experts
    if DOT:
        # experts are rows, and few: from 64 rows on Triton 3.7 takes tf32 for widened bf16 on sm_100, "ieee" or not
        total = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
        lost = total
    else:
        total = tl.zeros((BLOCK_N, BLOCK_E, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        inside = (column < D - start)[None, :]
        x = tl.load(x_at + start, mask=(row < tokens)[:, None] & inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_at + start, mask=(expert < E)[:, None] & inside, other=0.0).to(tl.float32)
        if DOT:
            # what each sum loses is carried into the next (Kahan): thousands of products in one chain lose digits
            part = tl.dot(weight, tl.trans(x), input_precision="ieee") - lost
            grown = total + part
            lost = (grown - total) - part
            total = grown
        else:
            total += x[:, None, :] * weight[None, :, :]
    logits = tl.trans(total) if DOT else tl.sum(total, 2)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + expert, mask=expert < E, other=0.0)[None, :]
    there = (row < tokens)[:, None] & (expert < E)[None, :]
    tl.store(logits_ptr + row[:, None] * E + expert[None, :], logits, mask=there)

    # After the barrier every thread of this program has stored. The atomic add that one of them then does releases what
    # it knows of, the others' stores included (barriers are part of the order of memory), to whoever acquires it later.
    # So the program that counts last sees the stores of all; it reads them past L1, which knows nothing of other SMs.
    tl.debug_barrier()
    counter = counters_ptr + tl.program_id(1)
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counter, 0)  # for the next launch
        for step in range(0, BLOCK_N, ROWS):
            choose(
                logits_ptr, ids_ptr, gates_ptr, scores_ptr, ring_experts_ptr, ring_gates_ptr, ring_margins_ptr,
                cursor_ptr, first + step + tl.arange(0, ROWS), tokens, layer, layers, capacity, factor,
                E, K, GROUP, KEPT, NORMED, ROWS, SIZE, SLOTS,
            )  # fmt: skip


@triton.jit
def choose(
    logits_ptr, ids_ptr, gates_ptr, scores_ptr, ring_experts_ptr, ring_gates_ptr, ring_margins_ptr,
    cursor_ptr, row, tokens, layer, layers, capacity, factor,
    E: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The experts of ROWS tokens from their logits."""
    expert = tl.arange(0, SIZE)[None, :]
    there = (row < tokens)[:, None]
    at = logits_ptr + row[:, None] * E + expert
    logits = tl.load(at, mask=there & (expert < E), other=0.0, cache_modifier=".cg")
    logits = tl.where(expert < E, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = weights / tl.sum(weights, 1)[:, None]
    # numbers that are not negative are ordered as their bits are, NaN above all; what is no expert, or taken, has -1
    rank = tl.where(expert < E, probs.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    if KEPT > 0:
        # the best group is that of the best expert, the next one that of the best expert elsewhere
        open_rank, kept = rank, rank < -1
        for _ in tl.static_range(KEPT):
            _, best = strongest(open_rank, expert, SIZE)
            members = (expert // GROUP) == (best // GROUP)[:, None]
            kept = kept | members
            open_rank = tl.where(members, -1, open_rank)
        rank = tl.where(kept, rank, 0)  # what is no expert too: it comes after those of dropped groups, by its number

    # one after the other, K experts and the best of the rest: equal ones by number. There are K with a rank of at least
    # 0 always, so that ids are experts, and different ones, whatever the logits are
    slot = tl.arange(0, SLOTS)[None, :]
    chosen, ids = tl.zeros((ROWS, SLOTS), tl.int32), tl.zeros((ROWS, SLOTS), tl.int32)
    for k in tl.static_range(K + 1):
        best, which = strongest(rank, expert, SIZE)
        chosen = tl.where(slot == k, tl.maximum(best, 0)[:, None], chosen)
        ids = tl.where(slot == k, which[:, None], ids)
        rank = tl.where(expert == which[:, None], -1, rank)
    scores = chosen.to(tl.float32, bitcast=True)
    used = slot < K
    if NORMED:
        gates = scores / (tl.sum(tl.where(used, scores, 0.0), 1) + 1e-20)[:, None]
    else:
        gates = scores * factor
    tl.store(ids_ptr + row[:, None] * K + slot, ids.to(tl.int64), mask=there & used)
    tl.store(gates_ptr + row[:, None] * K + slot, gates, mask=there & used)
    tl.store(scores_ptr + row[:, None] * (K + 1) + slot, scores, mask=there & (slot <= K))
    if ring_experts_ptr is not None:
        rest = tl.sum(tl.where(slot == K, scores, 0.0), 1)
        place = tl.load(cursor_ptr) + row
        at = (place[:, None] * layers + layer) * K + slot
        there = there & used & ((place >= 0) & (place < capacity))[:, None]
        tl.store(ring_experts_ptr + at, ids.to(ring_experts_ptr.dtype.element_ty), mask=there)
        tl.store(ring_gates_ptr + at, gates.to(tl.float16), mask=there)
        tl.store(ring_margins_ptr + at, (scores - rest[:, None]).to(tl.float16), mask=there)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros, which a launch leaves as zeros. One set for a device: its launches follow each other on one stream."""
    return torch.zeros(BLOCKS, dtype=torch.int32, device=device)


def blocks(tokens: int, experts: int, columns: int, programs: int) -> dict:
    """How a launch is cut for a device of so many multiprocessors."""
    if tokens > FEW:
        wide = triton.cdiv(tokens, 64) * triton.cdiv(experts, 32) >= programs
        cut = {"DOT": True, "BLOCK_N": 64 if wide else 16, "BLOCK_E": 32, "BLOCK_D": 32, "STAGES": 3}
        return cut | {"ROWS": 16, "num_warps": 4}
    rows, some = min(triton.next_power_of_2(tokens), 4), 1
    while some < 4 and triton.cdiv(tokens, rows) * triton.cdiv(experts, some) > 2 * programs:
        some *= 2
    # at most 64 sums in a thread's registers; for one token one warp, whose threads choose without barriers
    width = min(triton.next_power_of_2(columns), 1024, 8192 // (rows * some))
    cut = {"DOT": False, "BLOCK_N": rows, "BLOCK_E": some, "BLOCK_D": width, "STAGES": 4}
    return cut | {"ROWS": rows, "num_warps": 1 if tokens == 1 and some == 1 else 4}


def refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config, ring) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"x has the shape {tuple(x.shape)} and the router {tuple(weight.shape)}"
    wrong = {x.dtype, weight.dtype} - {torch.float32, torch.bfloat16}
    if wrong:
        return f"x or the router is {wrong.pop()}, not float32 or bfloat16"
    if x.stride(1) != 1 or not weight.is_contiguous():
        return "columns are not next to each other"
    experts, chosen = weight.shape[0], config.num_experts_per_tok
    if not 0 < chosen <= min(CHOSEN, experts) or experts > EXPERTS:
        return f"{chosen} of {experts} experts, where at most {CHOSEN} of {EXPERTS} are chosen"
    if config.topk_method not in METHODS or experts % config.n_group:
        return f"experts are chosen by {config.topk_method!r} in {config.n_group} groups"
    if not 0 < len(x) <= 16 * BLOCKS:
        return f"{len(x)} tokens, not 1 to {16 * BLOCKS}"
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (experts,) or not bias.is_contiguous()):
        return f"the bias is {bias.dtype} {list(bias.shape)}, not float32 [{experts}]"
    return None if ring is None else _refuses_ring(ring, chosen)


def _refuses_ring(ring, chosen: int) -> str | None:
    if ring.experts.shape[2] != chosen:
        return f"the recorder has {ring.experts.shape[2]} slots for {chosen} experts"
    types = [part.dtype for part in ring[:4]]
    if types[0] not in (torch.uint8, torch.int16) or types[1:] != [torch.float16, torch.float16, torch.int64]:
        return f"the recorder holds {types}"
    if not all(part.is_contiguous() for part in ring[:4]):
        return "the recorder's tensors are not contiguous"
    return None


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config, ring
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [N, K] int64, gates [N, K] and scores [N, K + 1] fp32 of x [N, D], by a router [E, D], in one launch."""
    (tokens, columns), experts, chosen = x.shape, weight.shape[0], config.num_experts_per_tok
    cut = blocks(tokens, experts, columns, processors(x.device))
    grouped = config.topk_method == "group_limited_greedy"
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, chosen, dtype=torch.int64, device=x.device)
    gates = torch.empty(tokens, chosen, dtype=torch.float32, device=x.device)
    scores = torch.empty(tokens, chosen + 1, dtype=torch.float32, device=x.device)
    route_kernel[(triton.cdiv(experts, cut["BLOCK_E"]), triton.cdiv(tokens, cut["BLOCK_N"]))](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        logits_ptr=logits,
        counters_ptr=counters(x.device),
        ids_ptr=ids,
        gates_ptr=gates,
        scores_ptr=scores,
        ring_experts_ptr=None if ring is None else ring.experts,
        ring_gates_ptr=None if ring is None else ring.gates,
        ring_margins_ptr=None if ring is None else ring.margins,
        cursor_ptr=None if ring is None else ring.cursor,
        tokens=tokens,
        stride_x=x.stride(0),
        layer=0 if ring is None else ring.layer,
        layers=0 if ring is None else ring.experts.shape[1],
        capacity=0 if ring is None else ring.experts.shape[0],
        factor=float(config.routed_scaling_factor),
        D=columns,
        E=experts,
        K=chosen,
        GROUP=experts // config.n_group,
        KEPT=config.topk_group if grouped and config.topk_group < config.n_group else 0,
        NORMED=config.norm_topk_prob and chosen > 1,  # one alone is scaled, as in the original code
        SIZE=max(triton.next_power_of_2(experts), 2),
        SLOTS=triton.next_power_of_2(chosen + 1),
        **cut,
    )
    return ids, gates, scores


def work(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config, ring) -> tuple[int, int]:
    """The least bytes moved and operations done."""
    tokens, slots = len(x), config.num_experts_per_tok
    made = tokens * (8 * slots + 4 * slots + 4 * (slots + 1))
    if ring is not None:
        made += tokens * slots * (ring.experts.element_size() + 4)
    edits = 0 if bias is None else bias.nbytes
    return x.numel() * x.element_size() + weight.nbytes + edits + made, 2 * x.numel() * len(weight)


# preset and what is replaced in it, tokens, D, type of x, of the router, bias, type of the ring's experts or None
_FP32, _BF16, _U8, _I16 = torch.float32, torch.bfloat16, torch.uint8, torch.int16
EXAMPLES = (
    ("v2-lite", {}, 1, 2048, _BF16, _BF16, False, _U8),
    ("v2-lite", {"norm_topk_prob": True}, 3, 2048, _BF16, _FP32, True, None),
    ("v2", {}, 1, 5120, _BF16, _BF16, True, _U8),
    ("v2", {"norm_topk_prob": True}, 17, 5120, _BF16, _BF16, False, _I16),
    ("v2", {}, 70, 160, _BF16, _FP32, True, _U8),
    ("pocket", {}, 1, 192, _FP32, _FP32, False, None),
    ("pocket", {}, 3, 192, _FP32, _FP32, True, _U8),
    ("pocket", {"num_experts_per_tok": 1, "norm_topk_prob": True, "n_group": 4, "topk_group": 4}, 2, 192, _FP32, _FP32,
     False, _U8),
    ("v2-lite", {"n_routed_experts": 10, "num_experts_per_tok": 3}, 17, 193, _FP32, _FP32, True, _I16),
    ("v2-lite", {"n_routed_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True}, 5, 100, _BF16, _BF16, False,
     _U8),
    ("v2", {"n_routed_experts": 256, "num_experts_per_tok": 8}, 1070, 64, _BF16, _BF16, False, _I16),
)  # fmt: skip
