"""mla_decode: a few new tokens that attend, in the latent space, over the pages of a cache."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from workbench import steps
from workbench.benchmarks.cases.compare import close
from workbench.formats import Row, cache_format
from workbench.pages import BLOCK, Latents

TENSOR_CORES = ()  # of bf16 only, for which tests/kernels/test_mla_decode.py asks


def arguments(example, device: torch.device, generator: torch.Generator) -> tuple:
    """Of `launch`, random, for one of the kernel's EXAMPLES: pages anywhere in the pool, tables wider than needed."""
    name, dtype, latent, rope, heads, new, lengths = example
    row, format = Row(latent, rope), cache_format(name)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    blocks = [-(-length // BLOCK) for length in lengths]
    pool = sum(blocks) + 2
    order = torch.randperm(pool, device=device, generator=generator).int()
    table = torch.full((len(lengths), max(blocks) + 1), 2**30, dtype=torch.int32, device=device)  # garbage: far outside
    for b, (count, first) in enumerate(zip(blocks, [sum(blocks[:b]) for b in range(len(blocks))], strict=True)):
        table[b, :count] = order[first : first + count]
    rows = random(pool * BLOCK, row.width)
    rows[:, :latent] *= 1 + 2 * random(latent).abs()  # some channels stand out
    parts = format.pack(rows, row)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    latents = Latents(parts, format, row, table, ends)
    query = random(len(lengths), new, heads, row.width).to(dtype)
    content, position = query.split(list(row), -1)
    return content, position, latents, 1.5 / row.width**0.5


def gathered(latents: Latents, sequence: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows [S, W] of one sequence."""
    seen = torch.arange(int(latents.ends[sequence]), device=latents.table.device)
    where = latents.table[sequence, seen // BLOCK].long() * BLOCK + seen % BLOCK
    return latents.format.unpack(tuple(part[where] for part in latents.parts), latents.row, dtype)


def reference(content: torch.Tensor, position: torch.Tensor, latents: Latents, scale: float) -> torch.Tensor:
    return steps.mla_decode.__wrapped__(content, position, latents, scale)


def truth(content: torch.Tensor, position: torch.Tensor, latents: Latents, scale: float) -> torch.Tensor:
    out = torch.empty(content.shape, dtype=torch.float64, device=content.device)
    query, new = torch.cat([content, position], -1).double(), content.shape[1]
    for b in range(len(content)):
        rows = gathered(latents, b, torch.float32).double()
        for t in range(new):
            visible = rows[: len(rows) - new + t + 1]
            weights = (query[b, t] @ visible.T * scale).softmax(-1)
            out[b, t] = weights @ visible[:, : content.shape[-1]]
    return out


check = close


def peer(content: torch.Tensor, position: torch.Tensor, latents: Latents, scale: float):
    """torch's own, on rows that lie unpacked and together, as long as the longest sequence."""
    key = pad_sequence([gathered(latents, b, content.dtype) for b in range(len(content))], batch_first=True)[:, None]
    query = torch.cat([content, position], -1).transpose(1, 2)  # [B, H, T, W]
    heads, new = query.shape[1:3]
    last = latents.ends[:, None] - new + torch.arange(new, device=key.device)  # [B, T]
    mask = (torch.arange(key.shape[2], device=key.device) <= last[..., None])[:, None]
    key, value = (x.expand(-1, heads, -1, -1) for x in (key, key[..., : content.shape[-1]]))
    return lambda: F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)
