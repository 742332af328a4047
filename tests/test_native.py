"""The compiled kernel against float64 products with what codecs unpack; and what is said where it cannot be built."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from workbench import native
from workbench.blocks import Layout, slab
from workbench.codec import Codes, Float, Groups
from workbench.errors import RequestError
from workbench.matrix import Matrix

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(native.kernel() is None, reason=f"no compiled kernel: {native.missing()}")

CODECS = [*(Groups(bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)), Groups(4, 16), Groups(3, 48), Codes(8), Codes(5)]
WIDTHS = (1, 64, 96, 192, 200, 2048)
MAX_ERROR = 1e-4  # of |x| |row|; about 2e-5 is reached, for activations are rounded to 16 bits


@pytest.fixture(scope="module", params=["as the processor can", "portable"])
def kernel(request):
    return native.kernel() if request.param != "portable" else native.opened("-DPORTABLE")


@pytest.fixture
def threads():
    """Sets the number of threads; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error(x, weights, y):
    """The largest, in |x| |row|."""
    x, weights = x.double(), weights.double()
    bound = x.norm(dim=-1)[:, None] * weights.norm(dim=-1)
    return ((y.double() - x @ weights.T).abs() / bound.clamp(min=1e-30)).max().item()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_products_and_unpacked_rows(kernel, codec):
    for width in WIDTHS:
        parts = codec.pack(torch.randn(21, width))
        weights = codec.unpack(parts, width)
        assert torch.equal(kernel.unpack(codec, parts, width, torch.float32), weights)
        assert torch.equal(kernel.unpack(codec, parts, width, torch.bfloat16), weights.bfloat16())
        for n in range(1, 9):
            x = torch.randn(n, width)
            assert error(x, weights, kernel.matvec(x, codec, parts, 21)) < MAX_ERROR, (width, n)


@pytest.mark.parametrize("codec", [Groups(3, 64), Groups(6, 64), Codes(8)], ids=str)
def test_activations_of_every_kind(kernel, codec):
    parts = codec.pack(torch.randn(40, 192))
    weights = codec.unpack(parts, 192)
    x = torch.randn(6, 192)
    x[0, 77] *= 1000
    x[1] = 0
    x[2] = x[2].abs() + 5  # all of one sign: what is subtracted for the offset of the codes is far larger than the rest
    x[3] *= 1e-20
    x[4] *= 1e20
    assert error(x, weights, kernel.matvec(x, codec, parts, 40)) < MAX_ERROR
    x[0, 5], x[3, 100], x[5, 191] = torch.inf, torch.nan, -torch.inf
    finite = kernel.matvec(x, codec, parts, 40).isfinite()
    assert not finite[[0, 3, 5]].any() and finite[[1, 2, 4]].all()


@pytest.mark.parametrize("codec", [Groups(4, 64), Codes(8)], ids=str)
def test_rows_that_are_nan_or_zero(kernel, codec):
    weights = torch.randn(12, 128)
    weights[3, 17], weights[7], weights[11, 0] = torch.nan, 0, torch.inf
    parts = codec.pack(weights)
    y = kernel.matvec(torch.randn(2, 128), codec, parts, 12)
    bad = torch.tensor([3, 11])
    assert y[:, bad].isnan().all() and kernel.unpack(codec, parts, 128, torch.bfloat16)[bad].isnan().all()
    assert (y[:, 7].abs() < 1e-9).all() and y.isfinite().sum() == 2 * 10


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_nothing_is_read_beyond_a_matrix(kernel):
    """Each part once at the end of a page, before one whose touch ends the process."""
    page, libc = 4096, ctypes.CDLL(None)
    for codec in (Groups(3, 64), Groups(4, 64), Groups(5, 64), Codes(8)):
        for width in (7, 96, 192):
            parts = codec.pack(torch.randn(3, width))
            for edge, part in enumerate(parts):
                room = slab(2, page)
                at = room[0, page - part.nbytes :].view(part.dtype).view(part.shape).copy_(part)
                moved = (*parts[:edge], at, *parts[edge + 1 :])
                x = torch.randn(3, width)
                assert libc.mprotect(ctypes.c_void_p(room[1].data_ptr()), page, 0) == 0
                unpacked = kernel.unpack(codec, moved, width, torch.float32)
                product = kernel.matvec(x, codec, moved, 3)
                assert libc.mprotect(ctypes.c_void_p(room[1].data_ptr()), page, 3) == 0
                assert torch.equal(unpacked, codec.unpack(parts, width))
                assert torch.equal(product, kernel.matvec(x, codec, parts, 3))


def packed_experts(hidden, width, count, gate_up, down):
    """Experts in a slab between bytes that nothing may use."""
    layout = Layout(hidden, width, gate_up, down)
    blocks = slab(count, layout.nbytes)
    for block in blocks:
        layout.pack(
            Matrix.pack(gate_up, torch.randn(2 * width, hidden) / hidden**0.5),
            Matrix.pack(down, torch.randn(hidden, width) / width**0.5),
            block,
        )
    return layout.bank(blocks)


@pytest.mark.parametrize(
    "hidden, width, gate_up, down",
    [
        (64, 96, Groups(4, 64), Groups(3, 64)),
        (512, 352, Groups(4, 64), Groups(4, 64)),
        (200, 72, Codes(8), Groups(6, 64)),
        (128, 20, Groups(3, 16), Groups(5, 64)),
    ],
    ids=str,
)
def test_experts(kernel, threads, hidden, width, gate_up, down):
    bank, x = packed_experts(hidden, width, 5, gate_up, down), torch.randn(hidden)
    slots = [4, 0, 3, 3]
    answers = []
    for count in (1, 2, 3):
        threads(count)
        answers.append(kernel.experts(x, *bank, slots))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    for slot, y in zip(slots, answers[0]):
        gate, up = (bank.gate_up[slot].dense(torch.float64) @ x.double()).chunk(2)
        expected = bank.down[slot].dense(torch.float64) @ (F.silu(gate) * up)
        assert (y - expected).norm() / expected.norm() < 2 * MAX_ERROR
    assert kernel.experts(x, *bank, []).shape == (0, hidden)
    bank.gate_up.parts[-1][3, width + 1] = torch.nan  # an up row of expert 3
    assert kernel.experts(x, *bank, slots).isnan().all(-1).tolist() == [False, False, True, True]
    with pytest.raises(RequestError, match="of 5"):
        kernel.experts(x, *bank, [5])


@pytest.mark.parametrize("codec", [Codes(8), Groups(4, 64), Groups(3, 16)], ids=str)
def test_lift_and_lower(kernel, codec):
    for heads, size, value, width in ((3, 12, 20, 72), (2, 9, 5, 600), (1, 4, 4, 64)):
        parts = codec.pack(torch.randn(heads * (size + value), width))
        weights = codec.unpack(parts, width).double().view(heads, -1, width)
        x, latent = torch.randn(3, heads, size), torch.randn(3, heads, width)
        lifted = torch.einsum("nhi,hic->nhc", x.double(), weights[:, :size])
        lowered = torch.einsum("nhc,hvc->nhv", latent.double(), weights[:, size:])
        y = kernel.lift(x, codec, parts, width, size + value)
        assert (y - lifted).norm() / lifted.norm() < MAX_ERROR
        y = kernel.lift(x[..., 1:].contiguous(), codec, parts, width, size + value, 1)
        lifted = torch.einsum("nhi,hic->nhc", x[..., 1:].double(), weights[:, 1:size])
        assert (y - lifted).norm() / lifted.norm() < MAX_ERROR
        y = kernel.lower(latent, codec, parts, size + value, size)
        assert (y - lowered).norm() / lowered.norm() < MAX_ERROR


def test_threads_change_no_bit_and_may_call_at_once(kernel, threads):
    codec = Groups(4, 64)
    parts = codec.pack(torch.randn(700, 256))
    inputs = [torch.randn(2, 256) for _ in range(40)]
    threads(1)
    alone = [kernel.matvec(x, codec, parts, 700) for x in inputs]
    threads(2)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda x: kernel.matvec(x, codec, parts, 700), inputs))
    assert all(map(torch.equal, alone, together))


def test_what_it_does_not_take(kernel):
    assert kernel.takes(Groups(4, 64), 100) and not kernel.takes(Float(torch.bfloat16), 64)
    assert not kernel.takes(Codes(10), 64) and not kernel.takes(Groups(4, 5), 64)
    codec = Groups(4, 64)
    parts = codec.pack(torch.randn(6, 64))
    for x in (torch.randn(2, 64).half(), torch.randn(64, 2).T, torch.randn(64)):
        with pytest.raises(RequestError, match="float32 on the CPU"):
            kernel.matvec(x, codec, parts, 6)
    for wrong in (tuple(part[::2] for part in parts), tuple(part[:5] for part in parts)):
        with pytest.raises(RequestError, match="a part of"):
            kernel.matvec(torch.randn(2, 64), codec, wrong, 6)


# building


def fresh(code, cache, **env):
    """Runs code in a new process, with its own folder for what is built."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


SAY = "from workbench import native; print(native.kernel() is not None, native.missing())"


def test_one_openmp_library_and_one_build(tmp_path):
    code = SAY + "; print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    assert fresh(code, tmp_path).splitlines() == ["True None", "1"]
    (built,) = (tmp_path / "deepseek-workbench").iterdir()
    stamp = built.stat().st_mtime_ns
    assert fresh(SAY, tmp_path) == "True None" and built.stat().st_mtime_ns == stamp
    built.write_bytes(built.read_bytes()[:3000])  # as a full disk would leave it
    assert fresh(SAY, tmp_path) == "True None" and len(built.read_bytes()) > 3000


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"PATH": "", "CC": ""}, "no C compiler"),
        ({"CC": "false"}, "failed"),
        ({"CC": "no-such-compiler"}, "no-such-compiler"),
    ],
    ids=str,
)
def test_without_a_compiler_there_is_a_reason(tmp_path, env, reason):
    assert fresh(SAY, tmp_path, **env).startswith("False ") and reason in fresh(SAY, tmp_path, **env)


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fresh(SAY, tmp_path / "file").startswith("False ")
