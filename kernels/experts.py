"""Routed and shared experts, plain or packed: sum over the chosen of gate * down(silu(gate row) * up row) (eq. 20-22).

N tokens, K choices, D hidden, E experts in the bank, I their width, S that of the shared ones. Few choices: two
launches straight from the slots, a vector at a time. Many: choices sorted by expert, then products on tensor cores.
Weights are unpacked in registers in both.
"""

import torch
import triton
import triton.language as tl
from workbench_kernels._product import product, silu
from workbench_kernels._unpack import arguments, arguments_of_shared, columns, rows_of, unread, vector, weighed, wholes

FEW = 48  # choices up to which each reads its expert on its own: beyond, most experts have several
MOST = 1 << 24  # choices in a launch
EXPERTS = 1024  # in a bank, at most


@triton.jit
def hidden_rows(
    x_ptr, hidden_ptr, values_ptr, part_ptr, whole_ptr, values_at, part_at, whole_at, block, inner, units,
    UNIT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes ROWS elements of silu(gate) * up, of one expert and one token."""
    each = tl.arange(0, 2 * ROWS)  # rows of gate and up in turns
    row = block * ROWS + each // 2
    inside, weight = row < inner, row + each % 2 * inner
    total = tl.zeros([2 * ROWS, BLOCK // CHUNK], tl.float32)
    for step in range(0, (units * UNIT + BLOCK - 1) // BLOCK):
        total += weighed(
            vector(x_ptr, step, units, UNIT, BLOCK), values_ptr, part_ptr, values_at, part_at, weight, inside,
            step, units, UNIT, BITS, GROUP, 2 * ROWS, BLOCK, CHUNK,
        )  # fmt: skip
    both = tl.sum(total, 1)
    if whole_ptr is not None:
        both *= wholes(whole_ptr, whole_at, weight, inside, GROUP)
    gate, up = tl.split(both.reshape(ROWS, 2))
    row = block * ROWS + tl.arange(0, ROWS)
    tl.store(hidden_ptr + row, (silu(gate) * up).to(hidden_ptr.dtype.element_ty), mask=row < inner)


@triton.jit
def gate_up_kernel(
    x_ptr,  # [N, D]
    slots_ptr,  # [N, K]
    hidden_ptr,  # [N, K I + S]
    values_ptr,  # [E, 2 I, D]; where a format has no parts of a scale, or no whole one, it is None
    part_ptr,
    whole_ptr,
    values_stride,
    part_stride,
    whole_stride,
    shared_values_ptr,  # [2 S, D]
    shared_part_ptr,
    shared_whole_ptr,
    tokens,
    stride_x,
    choices,
    inner,  # I
    shared_inner,  # S
    units,  # of UNIT columns: D
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_BITS: tl.constexpr,
    SHARED_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Some rows of one expert for one token. Those of different tokens are neighbours: weights they share are in L2."""
    pairs = tokens * choices
    routed = pairs * ((inner + ROWS - 1) // ROWS)
    number = tl.program_id(0)
    length = choices * inner + shared_inner
    if number < routed:
        block, pair = number // pairs, number % pairs
        token, choice = (pair // choices).to(tl.int64), pair % choices
        expert = tl.load(slots_ptr + pair)
        if expert >= 0:
            hidden_rows(
                x_ptr + token * stride_x, hidden_ptr + token * length + choice * inner, values_ptr, part_ptr, whole_ptr,
                expert * values_stride, expert * part_stride, expert * whole_stride, block, inner, units,
                UNIT, BITS, GROUP, ROWS, BLOCK, CHUNK,
            )  # fmt: skip
    elif shared_values_ptr is not None:
        block, token = (number - routed) // tokens, ((number - routed) % tokens).to(tl.int64)
        hidden_rows(
            x_ptr + token * stride_x, hidden_ptr + token * length + choices * inner, shared_values_ptr,
            shared_part_ptr, shared_whole_ptr, 0, 0, 0, block, shared_inner, units,
            UNIT, SHARED_BITS, SHARED_GROUP, ROWS, BLOCK, CHUNK,
        )  # fmt: skip


@triton.jit
def down_kernel(
    hidden_ptr,  # [N, K I + S]
    slots_ptr,  # [N, K]
    gates_ptr,  # [N, K]
    out_ptr,  # [N, D] fp32
    values_ptr,  # [E, D, I]
    part_ptr,
    whole_ptr,
    values_stride,
    part_stride,
    whole_stride,
    shared_values_ptr,  # [D, S]
    shared_part_ptr,
    shared_whole_ptr,
    tokens,
    choices,
    outputs,  # D
    units,  # of UNIT columns: I
    shared_units,  # of SHARED_UNIT columns: S
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_UNIT: tl.constexpr,
    SHARED_BITS: tl.constexpr,
    SHARED_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some elements of what all experts give one token, in the order of its choices and of columns."""
    block, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < outputs
    hidden_ptr += token.to(tl.int64) * (choices * units * UNIT + shared_units * SHARED_UNIT)
    total = tl.zeros([ROWS, BLOCK // CHUNK], tl.float32)
    steps = (units * UNIT + BLOCK - 1) // BLOCK
    for number in tl.range(0, choices * steps, num_stages=STAGES):  # one loop, so that loads run ahead of sums
        choice, step = number // steps, number % steps
        slot = tl.load(slots_ptr + token * choices + choice)
        gate = tl.load(gates_ptr + token * choices + choice)
        chosen, expert = row < tl.where(slot >= 0, outputs, 0), tl.maximum(slot, 0)
        x = vector(hidden_ptr + choice * (units * UNIT), step, tl.where(slot >= 0, units, 0), UNIT, BLOCK)
        sums = weighed(
            x, values_ptr, part_ptr, expert * values_stride, expert * part_stride, row, chosen, step, units,
            UNIT, BITS, GROUP, ROWS, BLOCK, CHUNK,
        )  # fmt: skip
        if whole_ptr is not None:
            sums *= wholes(whole_ptr, expert * whole_stride, row, chosen, GROUP)[:, None]
        total += sums * tl.where(slot >= 0, gate, 0.0)
    out = tl.sum(total, 1)
    if shared_values_ptr is not None:
        hidden_ptr += choices * (units * UNIT)
        total = tl.zeros([ROWS, BLOCK // CHUNK], tl.float32)
        for step in tl.range(0, (shared_units * SHARED_UNIT + BLOCK - 1) // BLOCK, num_stages=STAGES):
            total += weighed(
                vector(hidden_ptr, step, shared_units, SHARED_UNIT, BLOCK), shared_values_ptr, shared_part_ptr,
                0, 0, row, inside, step, shared_units, SHARED_UNIT, SHARED_BITS, SHARED_GROUP, ROWS, BLOCK, CHUNK,
            )  # fmt: skip
        shared = tl.sum(total, 1)
        if shared_whole_ptr is not None:
            shared *= wholes(shared_whole_ptr, 0, row, inside, SHARED_GROUP)
        out += shared
    tl.store(out_ptr + token.to(tl.int64) * outputs + row, out, mask=inside)


@triton.jit
def combine_kernel(
    outputs_ptr,  # [N K, D]
    shared_ptr,  # [N, D] or None
    slots_ptr,
    gates_ptr,
    out_ptr,  # [N, D] fp32
    width,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the choices of one token gave, in their order, and what the shared experts gave."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        there = tl.load(slots_ptr + pair) >= 0
        gate = tl.load(gates_ptr + pair)
        given = columns < tl.where(there, width, 0)
        values = tl.load(outputs_ptr + pair * width + columns, mask=given, other=0.0).to(tl.float32)
        total += tl.where(there, gate, 0.0) * values
    if shared_ptr is not None:
        total += tl.load(shared_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total, mask=inside)


def refuses(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank, shared) -> str | None:
    """Why this call is left to the reference; None if the kernel takes it."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, not float32 or bfloat16"
    if x.dim() != 2 or x.stride(1) != 1:
        return "x is not rows of columns next to each other"
    if slots.dtype != torch.int64 or gates.dtype != torch.float32 or slots.shape != gates.shape:
        return f"slots are {slots.dtype} {list(slots.shape)} and gates {gates.dtype} {list(gates.shape)}"
    if slots.dim() != 2 or len(slots) != len(x) or not (slots.is_contiguous() and gates.is_contiguous()):
        return "slots and gates are not one row after the other, one for each row of x"
    if not 0 < slots.numel() <= MOST:
        return f"{slots.numel()} choices, not 1 to {MOST}"
    if len(bank.gate_up.shape) != 3 or len(bank.gate_up) != len(bank.down) or len(bank.down) > EXPERTS:
        return f"a bank of {list(bank.gate_up.shape)} and {list(bank.down.shape)}, not of up to {EXPERTS} experts"
    for name, pair in (("the bank", bank), ("the shared experts", shared)):
        if pair is None:
            continue
        *_, width, inner = pair.down.shape
        if width != x.shape[1] or tuple(pair.gate_up.shape[-2:]) != (2 * inner, width):
            return f"{name}: {list(pair.gate_up.shape)} and {list(pair.down.shape)} do not fit {list(x.shape)}"
        for weight in (pair.gate_up, pair.down):
            if weight.device != x.device:
                return f"{name}: weights are on {weight.device}, x on {x.device}"
            if why := unread(weight, x):
                return f"{name}: {why}"
    return None


def few(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank, shared) -> torch.Tensor:
    """In two launches: what is inside the experts, then what they give."""
    (tokens, width), choices = x.shape, slots.shape[1]
    inner, shared_inner = bank.down.shape[-1], 0 if shared is None else shared.down.shape[-1]
    hidden = torch.empty(tokens, choices * inner + shared_inner, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=torch.float32, device=x.device)
    pair = [bank.gate_up] if shared is None else [bank.gate_up, shared.gate_up]
    cut = {"ROWS": 4, "BLOCK": min(map(columns, pair)), "CHUNK": max(rows_of(one).chunk for one in pair)}
    rows = rows_of(bank.gate_up)
    programs = choices * triton.cdiv(inner, cut["ROWS"]) + triton.cdiv(shared_inner, cut["ROWS"])
    gate_up_kernel[(tokens * programs,)](
        x_ptr=x,
        slots_ptr=slots,
        hidden_ptr=hidden,
        **arguments(bank.gate_up),
        **arguments_of_shared(shared and shared.gate_up),
        tokens=tokens,
        stride_x=x.stride(0),
        choices=choices,
        inner=inner,
        shared_inner=shared_inner,
        units=width // rows.unit,
        UNIT=rows.unit,
        **cut,
        num_warps=1,
    )
    pair = [bank.down] if shared is None else [bank.down, shared.down]
    cut = {"ROWS": 4, "BLOCK": 2 * min(map(columns, pair)), "CHUNK": max(rows_of(one).chunk for one in pair)}
    rows, shared_rows = rows_of(bank.down), rows_of(pair[-1])
    down_kernel[(tokens * triton.cdiv(width, cut["ROWS"]),)](
        hidden_ptr=hidden,
        slots_ptr=slots,
        gates_ptr=gates,
        out_ptr=out,
        **arguments(bank.down),
        **arguments_of_shared(shared and shared.down),
        tokens=tokens,
        choices=choices,
        outputs=width,
        units=inner // rows.unit,
        shared_units=shared_inner // shared_rows.unit,
        UNIT=rows.unit,
        SHARED_UNIT=shared_rows.unit,
        **cut,
        STAGES=4,
        num_warps=2 if rows.bits else 4,  # to unpack 64 codes each, or multiply 16 floats
    )
    return out


def many(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank, shared) -> torch.Tensor:
    """Choices sorted by expert, so that each expert sees one run of rows; then summed up token by token."""
    (tokens, width), choices, experts = x.shape, slots.shape[1], len(bank.down)
    flat = slots.flatten()
    ordered, order = flat.sort(stable=True)  # those that are in no slot, -1, come first
    bounds = torch.searchsorted(ordered, torch.arange(-1, experts, device=x.device), right=True)
    runs = {"bounds_ptr": bounds, "order_ptr": order, "choices": choices, "experts": experts}
    hidden = torch.empty(len(flat), bank.down.shape[-1], dtype=x.dtype, device=x.device)
    outputs = torch.empty(len(flat), width, dtype=x.dtype, device=x.device)
    product(x, bank.gate_up, hidden, True, **runs)
    product(hidden, bank.down, outputs, False, **runs)
    beside = None
    if shared is not None:
        inside = torch.empty(tokens, shared.down.shape[-1], dtype=x.dtype, device=x.device)
        beside = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
        product(x, shared.gate_up, inside, True)
        product(inside, shared.down, beside, False)
    out = torch.empty(tokens, width, dtype=torch.float32, device=x.device)
    combine_kernel[(tokens, triton.cdiv(width, 1024))](
        outputs_ptr=outputs,
        shared_ptr=beside,
        slots_ptr=slots,
        gates_ptr=gates,
        out_ptr=out,
        width=width,
        K=choices,
        BLOCK=1024,
        num_warps=4,
    )
    return out


def launch(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank, shared) -> torch.Tensor:
    """[N, D] fp32 of x [N, D], slots [N, K] (-1: in another bank, which adds nothing here) and gates [N, K].

    bank: gate_up [E, 2 I, D], gate rows first, and down [E, D, I]; shared: [2 S, D] and [D, S], or None.
    """
    return (few if slots.numel() <= FEW else many)(x, slots, gates, bank, shared)


def work(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank, shared) -> tuple[int, int]:
    """The least bytes moved and operations done. It asks the device which experts are chosen."""
    used = slots[slots >= 0]
    width, inner = bank.down.shape[-2:]
    moved = x.nbytes + slots.nbytes + gates.nbytes + 4 * x.numel()
    moved += len(used.unique()) * sum(weight.nbytes // len(weight) for weight in (bank.gate_up, bank.down))
    operations = 6 * width * inner * len(used)
    if shared is not None:
        moved += sum(weight.nbytes for weight in (shared.gate_up, shared.down))
        operations += 6 * width * shared.down.shape[-1] * len(x)
    return moved, operations


# format of the bank, of the shared experts or None, type of x, tokens, D, I, S, experts, chosen, of which some are in
# no slot
_FP32, _BF16 = torch.float32, torch.bfloat16
EXAMPLES = (
    *(
        (format, beside, _FP32 if format == "fp32" else _BF16, tokens, 64, 64, 96, experts, 2, elsewhere)
        for format in ("bf16", "int4", "fp32", "fp8", "int8", "int6", "int3")
        for beside, tokens, experts, elsewhere in ((format, 1, 5, False), (None, 25, 5, True), (None, 113, 2, False))
    ),
    ("bf16", None, _BF16, 3, 40, 88, 0, 8, 2, True),
    ("int3", "int4", _BF16, 2, 96, 32, 64, 3, 2, True),
    ("int4", "fp32", _FP32, 1, 64, 64, 96, 5, 2, False),
    ("int4", None, _FP32, 25, 72, 88, 0, 5, 2, True),
    ("bf16", "bf16", _BF16, 70, 192, 88, 104, 2, 1, True),
)
