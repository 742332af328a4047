"""route: from hidden states to chosen experts, with edits and the recorder."""

from dataclasses import replace
from typing import NamedTuple

import torch

from workbench import steps
from workbench.benchmarks.cases.compare import close
from workbench.config import Config
from workbench.ring import RingRow

TENSOR_CORES = ()  # products are fp32
NEAR = 1e-5  # relative difference of two probabilities below which either may come first: fp32 sums of 5,120 products
BEFORE, LAYERS, LAYER = 2, 3, 1  # rows of the ring used already, layers in it, the one that is written
UNUSED = 77
MEASURED = {
    f"{name}, {tokens} {'token' if tokens == 1 else 'tokens'}, edits and recorder": (
        name.lower(), {}, tokens, Config.preset(name.lower()).hidden_size, torch.bfloat16, torch.bfloat16, True,
        torch.uint8,
    )
    for name in ("V2-Lite", "V2")
    for tokens in (1, 16, 256, 4096)
}  # fmt: skip


class Expected(NamedTuple):
    ids: torch.Tensor
    gates: torch.Tensor
    scores: torch.Tensor
    ring: RingRow | None  # where the kernel was to write, the reference does not
    settled: torch.Tensor | None = None  # [N, K], of the truth: no other expert may stand here


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES."""
    preset, changes, tokens, width, kind, weight_kind, biased, ring_kind = example
    config = replace(Config.preset(preset), hidden_size=width, **changes)
    experts, slots = config.n_routed_experts, config.num_experts_per_tok
    x = torch.randn(tokens, width + 16, device=device, generator=generator)[:, :width]  # rows do not follow each other
    weight = torch.randn(experts, width, device=device, generator=generator) * 1.5 / width**0.5
    bias = None
    if biased:
        bias = torch.randn(experts, device=device, generator=generator)
        bias[torch.randint(experts, (2,), device=device, generator=generator)] = float("-inf")
    ring = None
    if ring_kind is not None:
        shape = (BEFORE + tokens + 3, LAYERS, slots)
        held = [torch.full(shape, UNUSED, dtype=d, device=device) for d in (ring_kind, torch.float16, torch.float16)]
        ring = RingRow(*held, torch.tensor([BEFORE], device=device), LAYER)
    return x.to(kind), weight.to(weight_kind), bias, config, ring


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Config, ring) -> Expected:
    return Expected(*steps.route.__wrapped__(x, weight, bias, config, None), ring)


def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Config, ring) -> Expected:
    """In float64, by sorting."""
    logits = x.double() @ weight.double().T
    probs = (logits if bias is None else logits + bias.double()).softmax(-1)
    sure = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if config.topk_method == "group_limited_greedy":
        best = probs.unflatten(-1, (config.n_group, -1)).amax(-1)
        order = best.sort(-1, descending=True)
        kept = order.indices[:, : config.topk_group]
        if config.topk_group < config.n_group:
            last, next_one = order.values[:, config.topk_group - 1], order.values[:, config.topk_group]
            sure = last - next_one > NEAR * last
        group = torch.arange(probs.shape[1], device=x.device) // (probs.shape[1] // config.n_group)
        probs = probs * (group[:, None] == kept[:, None]).any(-1)
    slots = config.num_experts_per_tok
    ranked = probs.sort(dim=-1, descending=True, stable=True)
    values = torch.cat([ranked.values, torch.zeros_like(ranked.values[:, :1])], -1)[:, : slots + 1]
    chosen = values[:, :slots]
    apart = chosen - values[:, 1:] > NEAR * chosen  # from the one behind
    settled = apart & torch.cat([torch.ones_like(apart[:, :1]), apart[:, :-1]], -1) & sure[:, None]
    if config.norm_topk_prob and slots > 1:
        gates = chosen / chosen.sum(-1, keepdim=True)
    else:
        gates = chosen * config.routed_scaling_factor
    return Expected(ranked.indices[:, :slots], gates, values, ring, settled)


def check(made: tuple, reference: Expected, truth: Expected) -> None:
    ids, gates, scores = made
    assert ids.dtype == torch.int64 and ids.shape == truth.ids.shape, f"ids are {ids.dtype} {tuple(ids.shape)}"
    wrong = (ids != truth.ids) & truth.settled
    assert not bool(wrong.any()), f"{int(wrong.sum())} experts are not those of the truth, near ties left out"
    _close(gates, reference.gates, truth.gates)
    _close(scores, reference.scores, truth.scores)
    if reference.ring is not None:
        check_ring(reference.ring, ids, gates, scores)


def _close(made: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """As `close`; but of a token or two the reference may be right by chance, so a millionth is always near enough."""
    alike = made.shape == reference.shape and made.dtype == reference.dtype
    if not alike or not bool((made.double() - truth).abs().max() <= 1e-6 * truth.abs().max()):
        close(made, reference, truth)


def check_ring(ring: RingRow, ids: torch.Tensor, gates: torch.Tensor, scores: torch.Tensor) -> None:
    """That the recorder holds what was returned, where it was asked for, and nothing anywhere else."""
    for part, values in zip(ring[:3], (ids, gates, scores[:, :-1] - scores[:, -1:]), strict=True):
        expected = torch.full_like(part, UNUSED)
        written = expected[BEFORE : BEFORE + len(ids), LAYER]
        written.copy_(values[: len(written)])
        assert torch.equal(part, expected), f"the ring of {part.dtype}: {part} where {expected} was to be written"
    assert ring.cursor.item() == BEFORE, "the cursor was moved"


def peer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Config, ring):
    """torch's own, one operation after the other, to be timed beside the kernel."""
    return lambda: steps.route.__wrapped__(x, weight, bias, config, ring)
