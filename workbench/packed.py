"""The operations of ops.py on packed weights: unpack and multiply; a compiled kernel answers on a CPU where it can.

N tokens, K choices, D hidden, H heads, C latent.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from workbench import native
from workbench.blocks import Bank
from workbench.codec import Codec
from workbench.matrix import Matrix

FEW = 8  # tokens at once, up to which the compiled kernel multiplies codes: with more, unpacking once costs less
UNPACKED = 1 << 24  # weights that are unpacked at once, 64 MB in fp32


def linear(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
    """x [..., in] by weight [out, in], some rows of the weight at a time."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    kernel = _kernel(x, weight.codec, weight.width)
    if kernel is not None and len(flat) <= FEW:
        out = kernel.matvec(flat.float().contiguous(), weight.codec, weight.parts, len(weight)).to(x.dtype)
    else:
        step = max(1, UNPACKED // weight.width)
        pieces = [weight[at : at + step] for at in range(0, len(weight), step)]
        if len(pieces) == 1:
            out = F.linear(flat, _unpacked(weight, x.dtype))
        else:
            out = torch.cat([F.linear(flat, _unpacked(piece, x.dtype)) for piece in pieces], -1)
    return out.view(*x.shape[:-1], len(weight))


def lift(content: torch.Tensor, kv_up: Matrix) -> torch.Tensor | None:
    """See ops.lift; None where it is not compiled."""
    kernel = _kernel(content, kv_up.codec, kv_up.width)
    if kernel is None or content.shape[:2].numel() > FEW:
        return None
    heads = content.shape[-2]
    flat = content.flatten(0, 1).float().contiguous()
    lifted = kernel.lift(flat, kv_up.codec, kv_up.parts, kv_up.width, len(kv_up) // heads)
    return lifted.to(content.dtype).view(*content.shape[:-1], kv_up.width)


def lower(out: torch.Tensor, kv_up: Matrix, width: int) -> torch.Tensor | None:
    """See ops.lower; None where it is not compiled."""
    kernel = _kernel(out, kv_up.codec, kv_up.width)
    if kernel is None or out.shape[:2].numel() > FEW:
        return None
    stride = len(kv_up) // out.shape[-2]
    flat = out.flatten(0, 1).float().contiguous()
    lowered = kernel.lower(flat, kv_up.codec, kv_up.parts, stride, stride - width)
    return lowered.to(out.dtype).view(*out.shape[:-1], width)


def expert_outputs(x: torch.Tensor, waves: Iterable[tuple[Bank, torch.Tensor]]) -> torch.Tensor:
    """What each chosen expert makes of x [N, D], before the gates: [N, K, D]. Computed where a wave's bank is."""
    outputs = None
    for bank, slots in waves:
        if outputs is None:
            outputs = x.new_empty(*slots.shape, x.shape[-1])
        where = bank.gate_up.device
        if len(x) == 1 and (kernel := _experts_kernel(x, bank)) is not None:
            chosen = [(place, slot) for place, slot in enumerate(slots[0].tolist()) if slot >= 0]
            places, used = zip(*chosen)
            made = kernel.experts(x[0].float().contiguous(), bank.gate_up, bank.down, list(used))
            outputs[0, list(places)] = made.to(outputs.dtype)
        else:
            _by_expert(x.to(where), bank, slots.to(where), outputs)
    return outputs


def _by_expert(x: torch.Tensor, bank: Bank, slots: torch.Tensor, outputs: torch.Tensor) -> None:
    flat = slots.flatten()
    order = flat.argsort(stable=True)  # choices sorted by expert, those of other waves (-1) first
    found, counts = flat[order].unique_consecutive(return_counts=True)
    runs = order.split(counts.tolist())
    into = outputs.view(-1, outputs.shape[-1])
    for slot, run in zip(found.tolist(), runs, strict=True):
        if slot < 0:
            continue
        gate, up = linear(x[run // slots.shape[1]], bank.gate_up[slot]).chunk(2, -1)
        into[run.to(into.device)] = linear(F.silu(gate) * up, bank.down[slot]).to(into.device)


def _unpacked(weight: Matrix, dtype: torch.dtype) -> torch.Tensor:
    kernel = native.kernel() if weight.device.type == "cpu" else None
    if kernel is None or not kernel.takes(weight.codec, weight.width) or dtype not in (torch.float32, torch.bfloat16):
        return weight.dense(dtype)
    return kernel.unpack(weight.codec, weight.parts, weight.width, dtype)


def _kernel(x: torch.Tensor, codec: Codec, width: int) -> "native.Kernel | None":
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return None
    kernel = native.kernel()
    return kernel if kernel is not None and kernel.takes(codec, width) else None


def _experts_kernel(x: torch.Tensor, bank: Bank) -> "native.Kernel | None":
    if bank.gate_up.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        return None
    kernel = native.kernel()
    both = all(kernel.takes(one.codec, one.width) for one in bank) if kernel is not None else False
    return kernel if both else None
