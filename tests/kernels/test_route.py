"""The router's kernel: degenerate rankings, edits, the recorder, refusals, and no tensor cores."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from poison import poisoned

from workbench import ops
from workbench.benchmarks.cases import route as case
from workbench.config import Config
from workbench.ring import RingRow

pytest.importorskip("triton")
kernel = pytest.importorskip("workbench_kernels.route")
ROOT = Path(__file__).parent.parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO = float("-inf")
GREEDY = replace(Config.preset("v2-lite"), n_routed_experts=12, num_experts_per_tok=4)
GROUPED = replace(GREEDY, topk_method="group_limited_greedy", n_group=4, topk_group=2)


def routed(logits: torch.Tensor, config: Config, bias=None, ring=None):
    """By logits [N, E] given outright: the router is the identity."""
    logits = logits.to(DEVICE)
    with torch.inference_mode(), poisoned():
        made = kernel.launch(logits, torch.eye(logits.shape[1], device=DEVICE), bias, config, ring)
    assert not kernel.counters(DEVICE).any()
    return made


def ring(capacity: int, cursor: int, slots: int = 4, layers: int = 2) -> RingRow:
    held = [
        torch.full((capacity, layers, slots), 9, dtype=kind, device=DEVICE) for kind in (torch.uint8, torch.float16)
    ]
    return RingRow(*held, held[1].clone(), torch.tensor([cursor], device=DEVICE), 1)


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_of_equal_experts_the_lower_number_comes_first(tokens):
    logits = torch.randint(3, (tokens, 12)).float()
    ids, _, scores = routed(logits, GREEDY)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids.cpu(), order[:, :4])
    torch.testing.assert_close(scores.cpu(), logits.softmax(-1).gather(-1, order[:, :5]))


def test_of_equal_groups_the_lower_number_is_kept():
    ids, _, scores = routed(torch.tensor([[0, 1, 5, 5, 0, 0, 2, 5, 3, 9, 0, 0.0]]), GROUPED)
    assert ids.tolist() == [[9, 2, 1, 0]]  # groups of three: the fourth, and of those whose best is 5 the first
    assert scores[0, 4] > 0  # expert 10
    everyone, _, _ = routed(torch.zeros(1, 12), GROUPED)
    assert everyone.tolist() == [[0, 1, 2, 3]]


def test_where_few_experts_are_left_ids_are_still_experts():
    bias = torch.full((12,), NO, device=DEVICE)
    bias[[7, 11]] = 0.0
    logits = torch.randn(3, 12)
    logits[:, 7] = 9.0
    for config in (GREEDY, GROUPED, replace(GROUPED, topk_group=1), replace(GREEDY, norm_topk_prob=True)):
        ids, gates, scores = routed(logits, config, bias)
        assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids.tolist())
        assert (ids[:, 0] == 7).all() and (scores[:, 0] > 0).all() and gates.isfinite().all()
        expected = ops.route(logits.to(DEVICE) + bias, config)
        torch.testing.assert_close(gates, expected.gates)
        torch.testing.assert_close(scores, expected.scores)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bias", [[NO] * 12, [0.0] * 11 + [float("nan")]])
@pytest.mark.parametrize("config", [GREEDY, GROUPED])
def test_without_any_probability_some_experts_are_chosen(config, bias):
    ids, gates, _ = routed(torch.randn(2, 12), config, torch.tensor(bias, device=DEVICE))
    assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids.tolist())
    assert gates.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("config", [GREEDY, GROUPED])
def test_nan_chooses_some_experts_and_stays_in_its_row(config):
    logits = torch.randn(5, 12)
    clean = routed(logits, config)
    logits[1, 3], logits[2], logits[4] = float("nan"), float("inf"), NO
    made = routed(logits, config)
    assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in made[0].tolist())
    assert made[1][[1, 2, 4]].isnan().all()
    for before, after in zip(clean, made, strict=True):
        assert torch.equal(before[[0, 3]], after[[0, 3]])


def test_every_expert_chosen_leaves_no_other():
    ids, _, scores = routed(torch.randn(3, 4), replace(GREEDY, n_routed_experts=4))
    assert ids.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 3 and (scores[:, 4] == 0).all()


def test_a_bias_changed_in_place_is_seen_by_the_next_launch():
    logits, bias = torch.arange(12.0)[None], torch.zeros(12, device=DEVICE)
    assert routed(logits, GREEDY, bias)[0].tolist() == [[11, 10, 9, 8]]
    bias[10], bias[0] = NO, 20.0
    assert routed(logits, GREEDY, bias)[0].tolist() == [[0, 11, 9, 8]]


@pytest.mark.parametrize(("tokens", "cursor"), [(3, 0), (3, 6), (70, 7), (1, 8), (2, -1)])
def test_the_recorder_gets_the_rows_there_is_room_for(tokens, cursor):
    record = ring(8, cursor)
    ids, gates, scores = routed(torch.randn(tokens, 12), GREEDY, ring=record)
    for part, values in zip(record[:3], (ids, gates, scores[:, :-1] - scores[:, -1:]), strict=True):
        expected = torch.full_like(part, 9)
        for token in range(tokens):
            if 0 <= cursor + token < 8:
                expected[cursor + token, 1] = values[token].to(part.dtype)
        assert torch.equal(part, expected)
    assert record.cursor.item() == cursor


def test_launches_give_the_same_bits():
    example = next(one for one in kernel.EXAMPLES if one[2] == 70)
    arguments = case.arguments(example, DEVICE, torch.Generator(DEVICE).manual_seed(torch.seed() % 2**63))
    with torch.inference_mode():
        first, second = kernel.launch(*arguments), kernel.launch(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_refused():
    x, weight, bias = torch.zeros(2, 8), torch.zeros(12, 8), torch.zeros(12)

    def why(x=x, weight=weight, bias=None, config=GREEDY, ring=None):
        return kernel.refuses(x, weight, bias, config, ring)

    assert why() is None and why(bias=bias, ring=ring(8, 0)) is None
    assert why(x=torch.zeros(16, 16)[::3, :8]) is None
    assert "float16" in why(x=x.half())
    assert "float64" in why(weight=weight.double())
    assert "next to each other" in why(x=torch.zeros(8, 2).T)
    assert "next to each other" in why(weight=torch.zeros(8, 12).T)
    assert "shape" in why(x=torch.zeros(2, 1, 8)) and "shape" in why(weight=torch.zeros(12, 9))
    assert "no" in why(x=x[:0]) and "257 experts" in why(weight=torch.zeros(257, 8))
    assert "17 of 12" in why(config=replace(GREEDY, num_experts_per_tok=17))
    assert "noaux" in why(config=replace(GREEDY, topk_method="noaux_tc"))
    assert "5 groups" in why(config=replace(GREEDY, n_group=5))
    assert "bias" in why(bias=bias.double()) and "bias" in why(bias=bias[:11])
    assert "5 slots" in why(ring=ring(8, 0, slots=5))
    assert "recorder" in why(ring=ring(8, 0)._replace(gates=torch.zeros(8, 2, 4)))
    assert "contiguous" in why(ring=ring(8, 0)._replace(margins=torch.zeros(8, 4, 2, dtype=torch.float16).mT))


def test_products_are_never_those_of_tensor_cores(tmp_path):
    """Triton 3.7 takes tf32 for 64 rows on sm_100 where an operand was bf16, whatever precision is asked for."""
    wide = next(one for one in kernel.EXAMPLES if one[2] > 1000)
    examples = [(*wide[:4], *kinds, *wide[6:]) for kinds in ((torch.bfloat16, torch.float32), (torch.bfloat16,) * 2)]
    program = (
        "import sys, torch, kernel_compiler as compiler; from workbench_kernels import route; "
        "compiler.CHIPS = {100: compiler.CHIPS[100]}; "
        f"route.EXAMPLES = {examples}; compiler.compile_all('route')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 and not any(line["products"] for line in lines)
