"""mla_decode where the general gate does not look: lengths, pieces, strides, Hopper's shape, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from poison import poisoned
from workbench_kernels import mla_decode

from workbench.benchmarks.cases import mla_decode as case
from workbench.codec import Codes, Groups
from workbench.formats import CACHE_FORMATS, Packed, cache_format

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def made(*example, seed: int = 0) -> tuple:
    return case.arguments(example, DEVICE, torch.Generator(DEVICE).manual_seed(seed))


def right(arguments: tuple) -> torch.Tensor:
    """What `launch` gives, compared with the truth."""
    assert mla_decode.refuses(*arguments) is None
    with torch.inference_mode():
        with poisoned():
            out = mla_decode.launch(*arguments)
        case.check(out, case.reference(*arguments), case.truth(*arguments))
    return out


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("length", [3, 15, 16, 17, 64, 65, 128, 129, 193])
def test_every_length(new, length):
    right(made("q6", FP32, 64, 16, 4, new, (length,)))


@pytest.mark.parametrize("processors", [1, 3, 8])
def test_sequences_are_cut_in_any_number_of_pieces(processors, monkeypatch):
    """What one, three and eight programs at a time read is the same; some find nothing to do."""
    monkeypatch.setattr(mla_decode, "device_of", lambda index: (processors, 0))
    arguments = made("bf16", FP32, 64, 16, 4, 2, (2, 700, 64, 129))
    right(arguments)


def test_a_row_may_see_nothing_of_the_last_piece(monkeypatch):
    """Three new tokens up to 33: the first two see none of the rows from 32 on, which one program reads."""
    monkeypatch.setattr(mla_decode, "LEAST", 16)
    right(made("fp32", FP32, 64, 16, 3, 3, (33,)))


@pytest.mark.parametrize("name", ["bf16", "fp8", "q6"])
def test_hoppers_shape(name, monkeypatch):
    monkeypatch.setattr(mla_decode, "device_of", lambda index: (132, 90))
    right(made(name, BF16, 64, 16, 40, 2, (70,)))


@pytest.mark.parametrize("name", ["int8", "int6", "int4", "fp8", "fp32"])
def test_small_widths_of_every_format(name):
    right(made(name, BF16, 80, 32, 11, 3, (66, 4)))


def test_queries_of_any_strides():
    content, position, *rest = made("bf16", FP32, 64, 16, 4, 2, (70, 9))
    expected = right((content, position, *rest))
    wide = torch.full((4, 2, 2, 64 + 3), float("nan"), device=DEVICE)  # heads first, something between rows
    wide[..., :64] = content.permute(2, 0, 1, 3)
    out = mla_decode.launch(wide.permute(1, 2, 0, 3)[..., :64], position.contiguous(), *rest)
    assert torch.equal(out, expected)


def test_what_lies_beyond_an_end_is_not_read():
    """Rows after the last of a block, and of blocks that no table names, hold NaN."""
    content, position, latents, scale = made("fp8", FP32, 64, 16, 4, 1, (70, 9))
    used = torch.zeros(len(latents.parts[0]), dtype=torch.bool)
    for b, end in enumerate(latents.ends.tolist()):
        seen = torch.arange(end)
        used[(latents.table[b, seen // 64] * 64 + seen % 64).long()] = True
    for part in latents.parts:
        part[~used] = torch.full_like(part[~used], float("nan"), dtype=torch.float32).to(part.dtype)
    right((content, position, latents, scale))


def test_a_row_that_is_no_number_gives_none():
    content, position, latents, scale = made("fp32", FP32, 64, 16, 4, 1, (70, 300))
    latents.parts[0][latents.table[1, 2] * 64 + 5, 3] = float("nan")
    out = mla_decode.launch(content, position, latents, scale)
    assert out[0].isfinite().all() and out[1].isnan().any(-1).all()


PROGRAM = """
import sys, torch, kernel_compiler
from workbench_kernels import mla_decode
from workbench.benchmarks.cases import mla_decode as case
chip, heads, *names = (int(word) if word.isdecimal() else word for word in sys.argv[1:])
mla_decode.device_of = lambda index: (132, chip)
mla_decode.EXAMPLES = tuple((name, torch.bfloat16, 512, 64, heads, 1, (70,)) for name in names)
kernel_compiler.CHIPS = {chip: kernel_compiler.CHIPS[chip]}
kernel_compiler.compile_all("mla_decode")
"""


@pytest.mark.parametrize(
    ("chip", "heads", "names", "product"), [(80, 16, ["bf16"], "HMMA"), (90, 128, ["bf16", "q6"], "HGMMA")]
)
def test_tensor_cores_are_used(chip, heads, names, product, tmp_path):
    """Hopper's shape is chosen only where there is one: no spill, within its shared memory, its products of 64 rows."""
    path = str(Path(__file__).parent.parent)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    program = [sys.executable, "-c", PROGRAM, str(chip), str(heads), *names]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    lines = [line for line in lines if line["kernel"] == "mla_decode_kernel"]
    assert len(lines) == len(names)
    for line in lines:
        assert not line["spills"] and line["shared"] <= line["limit"] and product in line["products"], line


def test_refusals():
    content, position, latents, scale = made("bf16", BF16, 64, 16, 4, 1, (9,))

    def why(content=content, position=position, **changes) -> str | None:
        return mla_decode.refuses(content, position, latents._replace(**changes), scale)

    assert why() is None
    assert "both bfloat16" in why(content.float())
    assert "both bfloat16" in why(content.half(), position.half())
    assert "next to each other" in why(content.mT.contiguous().mT)
    assert "as wide as rows" in why(content[..., :48])
    assert "int32" in why(ends=latents.ends.long())
    assert "not contiguous" in why(parts=(latents.parts[0][:, ::2],))
    assert "newest tokens" in why(format=cache_format("q6+128"))
    packed = made("q6", BF16, 64, 16, 4, 1, (9,))[2].parts
    for latent, rope in ((Groups(5, 32), Codes(10)), (Codes(3), Codes(8)), (Codes(8), Groups(4, 16))):
        odd = Packed("odd", latent, rope)
        assert why(format=odd, parts=packed) == "rows stored as odd are not read"
    for name in CACHE_FORMATS:
        assert mla_decode.refuses(*made(name, FP32, 64, 16, 4, 1, (9,))) is None


def test_no_8_bit_floats_before_ada(monkeypatch):
    monkeypatch.setattr(mla_decode, "device_of", lambda index: (108, 80))
    assert "8-bit floats" in mla_decode.refuses(*made("fp8", BF16, 64, 16, 4, 1, (9,)))
    assert mla_decode.refuses(*made("q6", BF16, 64, 16, 4, 1, (9,))) is None
