"""append: rows of new tokens packed into a cache whose blocks lie anywhere, and the queries turned."""

from typing import NamedTuple

import torch

from workbench import steps
from workbench.benchmarks.cases.compare import close
from workbench.formats import Row, cache_format
from workbench.pages import BLOCK, Latents

TENSOR_CORES = ()
EPS = 1e-6
BLOCKS = 3  # of each sequence
EQUAL = 0.99  # of the bytes of a row


class Written(NamedTuple):
    """What is to be compared once the kernel has run too."""

    turned: torch.Tensor  # [B, T, H, R]
    latents: Latents  # the kernel's
    parts: tuple[torch.Tensor, ...]  # the reference's
    where: torch.Tensor  # [B, T], rows that were written


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random: views of wider tensors, scattered blocks, and one sequence that crosses into its next."""
    name, dtype, batch, new, heads, latent, rope = example
    format, row = cache_format(name), Row(latent, rope)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    position = random(batch, new, heads, 2 * rope).to(dtype)[..., rope:]
    outlying = 1 + 9 * (random(latent).abs() > 2)
    compressed = torch.cat([random(batch, new, 32), random(batch, new, row.width)], -1).to(dtype)[..., 32:]
    angles = random(batch, new, rope // 2) * 9
    rotations = torch.view_as_real(torch.polar(torch.full_like(angles, 0.9), angles))
    blocks = torch.randperm(BLOCKS * batch + 1, generator=generator, device=device)
    table = blocks[: BLOCKS * batch].view(batch, BLOCKS).to(torch.int32)
    before = torch.randint(0, (BLOCKS - 1) * BLOCK, (batch,), generator=generator, device=device, dtype=torch.int32)
    before[0] = BLOCK - new // 2 - 1  # the last of a block, and the first of the next
    old = random(len(blocks) * BLOCK, row.width)
    latents = Latents(format.pack(old, row), format, row, table, before + new)
    return position, compressed, (random(latent) * outlying).to(dtype), rotations, latents, before, EPS


def reference(position, compressed, norm, rotations, latents: Latents, before: torch.Tensor, eps: float) -> Written:
    """On a copy of the cache."""
    parts = tuple(part.clone() for part in latents.parts)
    copied = latents._replace(parts=parts)
    turned = steps.append.__wrapped__(position, compressed, norm, rotations, copied, before, eps)
    positions = before.long()[:, None] + torch.arange(position.shape[1], device=before.device)
    return Written(turned, latents, parts, steps.places(latents.table, positions))


def truth(position, compressed, norm, rotations, latents: Latents, before, eps: float) -> tuple[torch.Tensor, ...]:
    """Queries turned, latents normed, keys turned: in float64, packed by nothing."""
    latent, key = compressed.double().split(list(latents.row), -1)
    cosine, sine = rotations.double().unbind(-1)

    def turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        real, imaginary = x[..., ::2], x[..., 1::2]
        return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1).flatten(-2)

    latent = norm.double() * latent / (latent.square().mean(-1, keepdim=True) + eps).sqrt()
    return turned(position.double(), cosine[:, :, None], sine[:, :, None]), latent, turned(key, cosine, sine)


def check(made: torch.Tensor, reference: Written, truth: tuple[torch.Tensor, ...]) -> None:
    """Queries, what the cache now gives back, its bytes, and every byte of other rows."""
    turned, *rows = truth
    close(made, reference.turned, turned)
    latents, where = reference.latents, reference.where
    unpacked = (
        latents.format.unpack(tuple(part[where] for part in parts), latents.row, torch.float32)
        for parts in (latents.parts, reference.parts)
    )
    for ours, theirs, true in zip(*(one.split(list(latents.row), -1) for one in unpacked), rows, strict=True):
        close(ours, theirs, true)
    same = [
        ours.view(torch.uint8) == theirs.view(torch.uint8)
        for ours, theirs in zip(latents.parts, reference.parts, strict=True)
    ]
    others = torch.ones(len(same[0]), dtype=torch.bool, device=where.device).index_fill(0, where.flatten(), False)
    assert all(bool(part[others].all()) for part in same), "a row of another token was changed"
    # fp32 differs in its last bits by the order of sums; a value that is rounded up here and down there may, seldom,
    # be the largest of its row and change its scale: hence half of the rows
    coded = [
        part[where.flatten()] for part, ours in zip(same, latents.parts, strict=True) if ours.dtype != torch.float32
    ]
    if coded:
        share = torch.cat(coded, 1).double().mean(1).median().item()
        assert share >= EQUAL, f"{share:.1%} of the bytes are the reference's"


def peer(*_) -> None:
    """torch has nothing that does this at once."""
