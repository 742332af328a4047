"""What the examples of mla_prefill do not show: lengths, strides and neighbours; and what is left to the reference."""

from importlib import import_module
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")
from workbench.benchmarks.cases import mla_prefill as case
from workbench.benchmarks.cases.compare import close

kernel = import_module("workbench_kernels.mla_prefill")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(*spans, dtype=torch.float32, heads=1, width=48, wide=32) -> list:
    generator = torch.Generator(DEVICE).manual_seed(torch.seed() % 2**63)
    longest = max(new for new, _ in spans)
    return list(case.arguments((dtype, spans, longest, heads, width, wide), DEVICE, generator))


def right(given: list) -> None:
    assert kernel.refuses(*given) is None
    close(kernel.launch(*given), case.reference(*given), case.truth(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spans",
    [
        ((1, 1),),
        ((1, 64), (1, 65)),
        ((64, 64),),
        ((65, 128), (63, 127), (1, 63)),
        ((31, 31), (128, 129)),
        ((2, 300),),
    ],
)
def test_any_lengths(spans, dtype):
    right(arguments(*spans, dtype=dtype))


@pytest.mark.parametrize(("width", "wide"), [(16, 16), (64, 64), (80, 16), (176, 128), (96, 112)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_widths(width, wide, dtype):
    right(arguments((17, 40), dtype=dtype, width=width, wide=wide, heads=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_tiles_for_smaller_chips(monkeypatch, dtype):
    monkeypatch.setattr(kernel, "chip", lambda device: kernel.Chip(60, 101_376))
    right(arguments((70, 100), dtype=dtype, heads=2))


def test_any_strides():
    query, key, value, *rest = arguments((40, 70), (5, 9), heads=3)
    query = torch.cat([query, query], -1)[..., 48:]
    key = key.transpose(0, 1).contiguous().transpose(0, 1)
    value = torch.stack([value, value], 1)[:, 1]
    right([query, key, value, *rest])


def test_a_shared_key_is_seen_by_every_head():
    given = arguments((33, 70), heads=3)
    given[1] = given[1][:, :1].expand(-1, 3, -1)
    right(given)


def test_scores_of_any_size():
    given = arguments((40, 70))
    given[0] *= 100  # a score of 1000 is rounded by 1e-4, here and in the reference: neither is a measure of the other
    torch.testing.assert_close(kernel.launch(*given).double(), case.truth(*given), atol=1e-3, rtol=0)
    given[1].zero_()
    right(given)


def test_a_sequence_does_not_look_into_the_next():
    given = arguments((20, 50), (30, 30), (7, 90))
    whole = kernel.launch(*given)
    for tensor, starts in zip(given[:3], (given[3], given[4], given[4])):
        tensor[starts[1] : starts[2]] = float("nan")
    made = kernel.launch(*given)
    assert torch.equal(made[:20], whole[:20])
    assert torch.equal(made[50:], whole[50:])
    assert made[20:50].isnan().all()


def test_a_sequence_without_queries():
    query, key, value, *_, scale = arguments((20, 50), (30, 30))
    starts = ([0, 20, 20, 50], [0, 50, 50, 80]), ([0, 0, 20, 50], [0, 0, 50, 80]), ([0, 20, 50, 50], [0, 50, 80, 80])
    made = []
    for pair in (*starts, ([0, 20, 50], [0, 50, 80])):
        ends = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in pair)
        made.append(kernel.launch(query, key, value, *ends, 1000, scale))
    assert all(torch.equal(one, made[-1]) for one in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_cut_in_pieces_is_the_same_prompt(dtype):
    given = arguments((150, 150), dtype=dtype)
    query, key, value, *_, scale = given
    whole, made = kernel.launch(*given), []
    for start, end in zip((0, 1, 70, 134), (1, 70, 134, 150)):
        starts = (torch.tensor([0, each], dtype=torch.int32, device=DEVICE) for each in (end - start, end))
        made.append(kernel.launch(query[start:end], key[:end], value[:end], *starts, end - start, scale))
    close(torch.cat(made), whole, case.truth(*given))


def test_work_counts_what_is_seen():
    spans = ((3, 5), (2, 2))
    pairs = sum(length - new + i + 1 for new, length in spans for i in range(new))
    assert pairs == list(accumulate((3, 4, 5, 1, 2)))[-1]
    moved, operations = kernel.work(*arguments(*spans, heads=2))
    assert operations == 2 * 2 * (48 + 32) * pairs
    assert moved == 4 * 2 * (48 + 32) * (5 + 7)


def test_what_is_left_to_the_reference():
    def asked(**changes) -> str:
        names = ("query", "key", "value", "query_starts", "key_starts", "longest", "scale")
        given = dict(zip(names, arguments((3, 5), heads=2), strict=True))
        return kernel.refuses(*(given | {name: change(given[name]) for name, change in changes.items()}).values())

    assert asked() is None
    assert "bfloat16" in asked(value=torch.Tensor.bfloat16)
    assert "float16" in asked(**dict.fromkeys(("query", "key", "value"), torch.Tensor.half))
    assert "one for each of 2 heads" in asked(key=lambda x: x[:, :1])
    assert "multiples of 16" in asked(value=lambda x: x[..., :24])
    assert "192" in asked(**dict.fromkeys(("query", "key"), lambda x: torch.cat([x] * 5, -1)))
    assert "next to each other" in asked(value=lambda x: torch.cat([x, x], -1)[..., ::2])
    assert "int32" in asked(query_starts=torch.Tensor.long)
    assert "vectors" in asked(key_starts=lambda x: x[:1])
    assert "positive" in asked(scale=lambda x: -x)
