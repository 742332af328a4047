"""experts: routed and shared experts of a few tokens and of many, plain and packed."""

import torch

from workbench import ops
from workbench.benchmarks.cases.compare import close
from workbench.blocks import Bank, Layout, slab
from workbench.codec import Float
from workbench.matrix import Matrix, dense
from workbench.recipe import WEIGHT_FORMATS

TENSOR_CORES = ("product_kernel",)


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES: packed experts are views into blocks of a slab."""
    format, beside, dtype, tokens, width, inner, shared_inner, experts, chosen, elsewhere = example

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def pair(format: str, inner: int, *count: int) -> Bank:
        codec = WEIGHT_FORMATS[format]
        gate_up = random(*count, 2 * inner, width) * (1.5 / width**0.5)
        down = random(*count, width, inner) / inner**0.5
        if isinstance(codec, Float):
            return Bank(gate_up.to(codec.dtype), down.to(codec.dtype))
        packed = Bank(Matrix.pack(codec, gate_up), Matrix.pack(codec, down))
        if not count:
            return packed
        layout = Layout(width, inner, codec, codec)
        room = slab(*count, layout.nbytes, device)
        for expert in range(*count):
            layout.pack(packed.gate_up[expert], packed.down[expert], room[expert])
        return layout.bank(room)

    bank = pair(format, inner, experts)
    shared = None if beside is None else pair(beside, shared_inner)
    x = random(tokens, width + 16)[:, :width].to(dtype)
    # one expert is chosen by everyone; one by nobody, where there are more than are chosen
    scores = torch.rand(tokens, experts, device=device, generator=generator)
    scores[:, -1], scores[:, experts // 2] = 2.0, -1.0
    scores, slots = scores.topk(chosen, -1)
    gates = scores.softmax(-1) * 2
    if elsewhere:
        slots[torch.rand(slots.shape, device=device, generator=generator) < 0.3] = -1
    return x, slots.contiguous(), gates.contiguous(), bank, shared


def reference(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank: Bank, shared: Bank | None):
    """steps.experts, on unpacked weights and with a gate of 0 for what is in no slot."""
    plain = [dense(weight, x.dtype) for weight in bank]
    out = ops.experts_grouped(x, slots.clamp(min=0), torch.where(slots >= 0, gates, 0.0), *plain).float()
    if shared is None:
        return out
    gate_up, down = (dense(weight, x.dtype) for weight in shared)
    return out + ops.linear(ops.swiglu(ops.linear(x, gate_up)), down).float()


def truth(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank: Bank, shared: Bank | None) -> torch.Tensor:
    """In float64, one expert after the other."""

    def given(wide: torch.Tensor, pair: Bank) -> torch.Tensor:
        gate, up = (wide @ dense(pair.gate_up, torch.float32).double().T).chunk(2, -1)
        return (gate * gate.sigmoid() * up) @ dense(pair.down, torch.float32).double().T

    wide = x.double()
    out = torch.zeros_like(wide) if shared is None else given(wide, shared)
    for expert in slots[slots >= 0].unique().tolist():
        tokens, places = (slots == expert).nonzero(as_tuple=True)
        made = given(wide[tokens], Bank(bank.gate_up[expert], bank.down[expert]))
        out.index_add_(0, tokens, made * gates[tokens, places].double()[:, None])
    return out


check = close


def peer(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank: Bank, shared: Bank | None):
    """torch's own products of groups, on weights unpacked beforehand."""
    plain = Bank(*(dense(weight, x.dtype) for weight in bank))
    beside = shared and Bank(*(dense(weight, x.dtype) for weight in shared))
    return lambda: reference(x, slots, gates, plain, beside)


# shapes to be timed: tokens, then D, I, S and experts of V2-Lite and of V2
LITE, V2 = ("v2-lite", (2048, 1408, 2816, 64)), ("v2", (5120, 1536, 3072, 160))
SHAPES = (
    *((LITE, format, 1) for format in ("bf16", "fp8", "int8", "int6", "int4", "int3")),
    *((LITE, format, tokens) for format in ("bf16", "int4") for tokens in (8, 32, 2048)),
    *((V2, format, tokens) for format in ("bf16", "int4") for tokens in (1, 2048)),
)
MEASURED = {
    f"{model} {format} {tokens} tokens": (format, format, torch.bfloat16, tokens, *widths, 6, False)
    for (model, widths), format, tokens in SHAPES
}
