"""What a launch of append packs is, byte for byte, what the codec packs; and what is left to the reference."""

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
from workbench import steps
from workbench.benchmarks.cases import append as case
from workbench.cache import LatentCache
from workbench.codec import Codes, Groups, Tiles
from workbench.config import Config
from workbench.formats import CACHE_FORMATS, Packed, Plain, Row, cache_format
from workbench.pages import Latents

kernel = import_module("workbench_kernels.append")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ODD = (
    Packed("2 and 12 bits", Groups(2, 32), Codes(12)),
    Packed("3 and 7 bits", Codes(3), Groups(7, 8)),
    Packed("10 bits and small tiles", Groups(10, 16), Tiles(16)),
)


def arguments(name="bf16", dtype=torch.float32, batch=2, new=3, heads=2, latent=512, rope=64) -> list:
    generator = torch.Generator(DEVICE).manual_seed(torch.seed() % 2**63)
    return list(case.arguments((name, dtype, batch, new, heads, latent, rope), DEVICE, generator))


def stored_as(format, latents: Latents, row: Row) -> Latents:
    """The same place, empty, for another format."""
    old = torch.zeros(len(latents.parts[0]), row.width, device=DEVICE)
    return latents._replace(parts=format.pack(old, row), format=format, row=row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [*CACHE_FORMATS.values(), *ODD], ids=lambda format: format.name)
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (64, 16), (100, 6)])
def test_bytes_are_those_of_the_codec(format, dtype, latent, rope):
    given = arguments(dtype=dtype, latent=latent, rope=rope)
    row = Row(latent, rope)
    # whole numbers: their squares have one sum, whatever the order, so that two launches make the same rows
    given[1] = torch.randint(-60, 60, given[1].shape, device=DEVICE).to(dtype)
    given[1][0, 0], given[1][0, 1] = 0, torch.eye(row.width, device=DEVICE)[3]
    plain, packed = (stored_as(kind, given[4], row) for kind in (Plain("wide", torch.float32), format))
    where = case.reference(*given).where
    for latents in (plain, packed):
        given[4] = latents
        assert kernel.refuses(*given) is None
        kernel.launch(*given)
    wanted = format.pack(plain.parts[0][where].cpu(), row)  # on a GPU a division may be a product with the inverse
    for ours, theirs in zip(packed.parts, wanted, strict=True):
        ours = ours[where].cpu()
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", [3, 530])
def test_what_cannot_be_held_comes_back_as_no_number(name, value, place):
    given = arguments(name, batch=1, new=2)
    given[1][0, 0, place] = value
    written = case.reference(*given)
    kernel.launch(*given)
    latents = given[4]
    ours, theirs = (
        latents.format.unpack(tuple(part[written.where[0]] for part in parts), latents.row, torch.float32)
        for parts in (latents.parts, written.parts)
    )
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert ours[1].isfinite().all()
    if value != 1e30:
        assert not ours[0].isfinite().all()


def test_it_writes_where_a_cache_reads():
    """Through a real cache, whose sequences have blocks between each other and different lengths."""
    config = Config.preset("pocket")
    row = Row(config.kv_lora_rank, config.qk_rope_head_dim)
    caches = [LatentCache(config, 2, "q6", DEVICE) for _ in range(2)]
    for cache in caches:
        for turn in range(2):
            for sequence, tokens in enumerate((60, 70)):
                one = cache.only(sequence)
                one.reserve(tokens)
                one.append(0, torch.full((1, tokens, row.width), 1.0 + turn, device=DEVICE))
                one.advance(tokens)
        cache.reserve(5)
    given = arguments("q6", batch=2, new=5, latent=row.latent, rope=row.rope)
    made = []
    for cache, body in zip(caches, (kernel.launch, steps.append.__wrapped__), strict=True):
        pages = cache.pages
        given[4:6] = cache.latents(0, pages), pages.before
        made.append(body(*given))
    torch.testing.assert_close(*made)
    for sequence in range(2):
        ours, theirs = (cache.rows(0, sequence, torch.float32) for cache in caches)
        assert torch.equal(ours[:-5], theirs[:-5])
        torch.testing.assert_close(ours[-5:], theirs[-5:], atol=0.1, rtol=0.1)


def test_what_is_left_to_the_reference():
    def asked(**changes) -> str:
        names = ("position", "compressed", "norm", "rotations", "latents", "before", "eps")
        given = dict(zip(names, arguments("q6"), strict=True))
        return kernel.refuses(*(given | {name: change(given[name]) for name, change in changes.items()}).values())

    class Own(Plain):
        pass

    assert asked() is None
    assert "recent" in asked(latents=lambda x: x._replace(format=cache_format("q6+128")))
    assert "format mine" in asked(latents=lambda x: x._replace(format=Own("mine", torch.bfloat16)))
    assert "format x" in asked(latents=lambda x: x._replace(format=Packed("x", Groups(4, 24), Codes(8))))
    assert "int32" in asked(before=torch.Tensor.long)
    assert "int32" in asked(latents=lambda x: x._replace(table=x.table.long()))
    assert "bfloat16" in asked(norm=torch.Tensor.bfloat16)
    assert "float16" in asked(**dict.fromkeys(("norm", "position", "compressed"), torch.Tensor.half))
    assert "rotations" in asked(rotations=torch.Tensor.double)
    assert "widths" in asked(position=lambda x: x[..., :32])
    assert "widths" in asked(latents=lambda x: x._replace(row=Row(448, 128)))
    assert "next to each other" in asked(position=lambda x: torch.cat([x, x], -1)[..., ::2])
    assert "gaps" in asked(norm=lambda x: torch.cat([x, x])[::2])
    assert "gaps" in asked(latents=lambda x: x._replace(parts=tuple(torch.cat([p, p], 1)[:, ::2] for p in x.parts)))
