"""The kernel for packed matrices: live weights, views, the same bits again, refusals."""

import pytest
import torch
from poison import poisoned

from workbench.benchmarks.cases import linear as case
from workbench.benchmarks.cases.compare import close
from workbench.codec import Codes, Float, Groups
from workbench.matrix import Matrix
from workbench.recipe import WEIGHT_FORMATS

pytest.importorskip("triton")
kernel = pytest.importorskip("workbench_kernels.linear")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKED = ("fp8", "int8", "int6", "int4", "int3")


def matrix(format="int4", outputs=24, width=64) -> Matrix:
    return Matrix.pack(WEIGHT_FORMATS[format], torch.randn(outputs, width, device=DEVICE) / 8)


def made(x, weight):
    assert kernel.refuses(x, weight) is None
    with torch.inference_mode(), poisoned():
        return kernel.launch(x, weight)


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_code_and_column_is_in_its_place(format, tokens):
    """By unit vectors: each picks one column, bit for bit but for the scales' order."""
    weight = matrix(format, 19, 96)
    dense = weight.dense(torch.float32)
    for start in (0, 31, 46, 77):
        x = torch.zeros(tokens, 96, device=DEVICE)
        columns = [(start + 7 * token) % 96 for token in range(tokens)]
        x[range(tokens), columns] = 1.0
        torch.testing.assert_close(made(x, weight), dense[:, columns].T, rtol=3e-7, atol=0)


@pytest.mark.parametrize("format", PACKED)
def test_rows_of_a_matrix_are_a_matrix(format):
    weight = matrix(format)
    x = torch.randn(1, 64, device=DEVICE)
    assert torch.equal(made(x, weight[8:13]), made(x, weight)[:, 8:13])


def test_weights_written_over_are_seen_and_the_same_ones_give_the_same_bits():
    weight, other = matrix(), matrix()
    for tokens in (1, 5):
        x = torch.randn(tokens, 64, device=DEVICE).bfloat16()
        first = made(x, weight)
        assert torch.equal(made(x, weight), first)
        weight.copy_(other)
        close(made(x, weight), case.reference(x, other), case.truth(x, other))
        assert not torch.equal(made(x, weight), first)
        weight.copy_(matrix())


def test_nothing_finite_is_made_of_nan():
    weight = matrix()
    weight.parts[2][3] = float("nan")
    for tokens in (1, 2):
        out = made(torch.randn(tokens, 64, device=DEVICE), weight)
        assert out[:, 3].isnan().all() and out.isnan().sum() == tokens


def test_what_is_refused():
    x, weight = torch.zeros(3, 64, device=DEVICE), matrix()
    why = kernel.refuses
    assert why(x, weight) is None and why(x[0], weight) is None and why(x.view(3, 1, 64), weight) is None
    assert "not packed" in why(x, torch.zeros(8, 64)) and "not packed" in why(
        x, Matrix.pack(Float(torch.bfloat16), torch.zeros(8, 64))
    )
    assert "float16" in why(x.half(), weight) and "0 rows" in why(x[:0], weight)
    assert "the weight" in why(x[:, :32], weight)
    assert "next to each other" in why(torch.zeros(64, 3).T, weight)
    assert "not read" in why(x, Matrix.pack(Codes(6), torch.randn(8, 64)))
    assert "not read" in why(x, Matrix.pack(Groups(4, 16), torch.randn(8, 64)))
    assert "32-bit words" in why(torch.zeros(3, 60), matrix("int4", 8, 60))
    assert "do not follow" in why(x, weight[::2])
