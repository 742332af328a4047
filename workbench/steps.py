"""Operations that are several of ops.py at once, for passes that nobody looks into: each has a kernel of its name.

Nothing in them is known to the host only: where a sequence lies, what is added to logits, where a choice is recorded
are tensors, so that a captured pass can hold them.

N tokens, B batch, T new tokens, S tokens so far, D hidden, H heads, R rotary width, C latent, W = C + R the cached row,
E experts, K chosen, I expert width.
"""

import torch

from workbench import ops
from workbench.blocks import Bank
from workbench.config import Config
from workbench.door import op
from workbench.matrix import Matrix
from workbench.pages import BLOCK, Latents
from workbench.ring import RingRow
from workbench.rope import rotate


def places(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rows of a pool that hold these positions [B, T] of its sequences, int64 [B, T]. table [B, blocks]."""
    return table.long().gather(1, positions // BLOCK) * BLOCK + positions % BLOCK


@op("append")
def append(
    position: torch.Tensor,
    compressed: torch.Tensor,
    norm: torch.Tensor,
    rotations: torch.Tensor,
    latents: Latents,
    before: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Writes the rows of new tokens and turns their queries (paper, eq. 9, 15, 41-43): [B, T, H, R] turned.

    position [B, T, H, R]: queries' rotary part before rotation; compressed [B, T, W]: latent before its norm [C],
    rotary key before rotation; rotations fp32 [B, T, R / 2, 2]: cosine, sine; before int32 [B]: tokens there already.
    """
    latent, k_rope = compressed.split(list(latents.row), -1)
    both = torch.cat([position, k_rope[:, :, None]], 2)
    turned = rotate(both, torch.view_as_complex(rotations)[:, :, None])
    rows = torch.cat([ops.rms_norm.__wrapped__(latent, norm, eps), turned[:, :, -1]], -1)
    positions = before.long()[:, None] + torch.arange(rows.shape[1], device=rows.device)
    where = places(latents.table, positions)
    for part, values in zip(latents.parts, latents.format.pack(rows, latents.row), strict=True):
        part.index_put_((where,), values)
    return turned[:, :, :-1]


@op("mla_decode")
def mla_decode(content: torch.Tensor, position: torch.Tensor, latents: Latents, scale: float) -> torch.Tensor:
    """Absorbed attention of a few new tokens over the cached rows (paper, section 2.1.2): [B, T, H, C].

    content [B, T, H, C]: queries lifted into the latent's space; position [B, T, H, R]: turned. Softmax in fp32.
    """
    batch, new, heads, width = content.shape
    ends = latents.ends.long()[:, None]
    seen = torch.arange(latents.table.shape[1] * BLOCK, device=content.device).expand(batch, -1)
    where = places(latents.table, seen.clamp(max=ends - 1))  # what lies beyond an end is not looked at
    rows = latents.format.unpack(tuple(part[where] for part in latents.parts), latents.row, content.dtype)
    query = torch.cat([content, position], -1).flatten(1, 2)
    scores = torch.bmm(query, rows.mT).float() * scale  # [B, T H, S]
    last = ends - new + torch.arange(new, device=content.device)  # [B, T]
    future = (seen[:, None] > last[..., None]).repeat_interleave(heads, 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(content.dtype)
    return torch.bmm(weights, rows[..., :width]).unflatten(1, (new, heads))


@op("add_norm")
def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta [..., D] in x's type, and its norm."""
    x = x + delta.to(x.dtype)
    return x, ops.rms_norm.__wrapped__(x, weight, eps)


@op("route")
def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Config, ring: RingRow | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [N, K], gates [N, K], scores [N, K + 1] of the experts for x [N, D], by a router [E, D]: see ops.route.

    bias [E] fp32 is added to the logits: edits, in a tensor that may be changed in place. ring: where the recorder
    wants what was chosen.
    """
    logits = ops.router_logits(x, weight)
    _, ids, gates, scores = ops.route(logits if bias is None else logits + bias, config)
    if ring is not None:
        ring.write(ids, gates, scores)
    return ids, gates, scores


@op("experts")
def experts(x: torch.Tensor, slots: torch.Tensor, gates: torch.Tensor, bank: Bank, shared: Bank | None) -> torch.Tensor:
    """The routed experts of x [N, D], all in one bank, and the shared ones [2 S, D], [D, S] beside them: [N, D] fp32.

    slots [N, K] int64 and gates [N, K]; equations 20-22 of the paper without the residual. Packed ones ask the host.
    """
    if isinstance(bank.gate_up, Matrix):
        routed = ops.experts(x, gates, [(bank, slots)]).float()
    else:
        routed = ops.experts_grouped(x, slots, gates, *bank).float()
    if shared is None:
        return routed
    return routed + ops.linear(ops.swiglu(ops.linear(x, shared.gate_up)), shared.down).float()
