"""The experts' kernels: choices that are elsewhere, both ways of computing the same, live weights, refusals."""

import pytest
import torch
from poison import poisoned

from workbench.benchmarks.cases import experts as case
from workbench.benchmarks.cases.compare import close
from workbench.blocks import Bank, Layout, slab
from workbench.codec import Codes, Groups
from workbench.matrix import Matrix

pytest.importorskip("triton")
kernel = pytest.importorskip("workbench_kernels.experts")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(format="bf16", beside=None, dtype=torch.bfloat16, tokens=2, chosen=2, elsewhere=False, experts=5):
    generator = torch.Generator(DEVICE).manual_seed(torch.seed() % 2**63)
    example = (format, beside, dtype, tokens, 32, 32, 32, experts, chosen, elsewhere)
    return case.arguments(example, DEVICE, generator)


def made(ways, *args):
    assert kernel.refuses(*args) is None
    with torch.inference_mode(), poisoned():
        return ways(*args)


@pytest.mark.parametrize("ways", [kernel.few, kernel.many])
@pytest.mark.parametrize("beside", [None, "int4"])
def test_choices_that_are_all_elsewhere_leave_what_the_shared_experts_give(ways, beside):
    x, slots, gates, bank, shared = arguments(beside=beside)
    out = made(ways, x, torch.full_like(slots, -1), torch.full_like(gates, float("nan")), bank, shared)
    if shared is None:
        assert out.eq(0).all()
    else:
        nothing = torch.zeros_like(gates)
        truth, reference = (side(x, slots, nothing, bank, shared) for side in (case.truth, case.reference))
        close(out, reference, truth)


@pytest.mark.parametrize("ways", [kernel.few, kernel.many])
def test_an_expert_that_nobody_chose_is_not_read(ways):
    x, slots, gates, bank, shared = arguments(tokens=3)
    before = made(ways, x, slots, gates, bank, shared)
    unused = sorted(set(range(5)) - set(slots.flatten().tolist()))
    assert unused
    for weight in bank:
        weight[unused] = float("nan")
    assert torch.equal(made(ways, x, slots, gates, bank, shared), before)


@pytest.mark.parametrize("ways", [kernel.few, kernel.many])
def test_one_expert_may_be_chosen_by_all_and_twice_by_one(ways):
    x, slots, gates, bank, shared = arguments("int4", tokens=3)
    slots.fill_(4)
    args = (x, slots, gates, bank, shared)
    close(made(ways, *args), case.reference(*args), case.truth(*args))


@pytest.mark.parametrize("format", ["bf16", "int3"])
def test_both_ways_agree_and_give_the_same_bits_again(format):
    args = arguments(format, format, tokens=3, chosen=2, elsewhere=True)
    truth, reference = case.truth(*args), case.reference(*args)
    for ways in (kernel.few, kernel.many):
        first, second = made(ways, *args), made(ways, *args)
        assert torch.equal(first, second)
        close(first, reference, truth)


def test_a_token_has_the_same_bits_alone_and_beside_others():
    x, slots, gates, bank, shared = arguments("int6", "int8", tokens=3)
    together = made(kernel.few, x, slots, gates, bank, shared)
    alone = made(kernel.few, x[1:2], slots[1:2], gates[1:2], bank, shared)
    assert torch.equal(alone[0], together[1])


def test_many_choices_are_sorted_and_few_are_not(monkeypatch):
    said = []
    monkeypatch.setattr(kernel, "few", lambda *args: said.append("few"))
    monkeypatch.setattr(kernel, "many", lambda *args: said.append("many"))
    for tokens in (1, kernel.FEW // 2, kernel.FEW // 2 + 1):
        kernel.launch(*arguments(tokens=tokens))
    assert said == ["few", "few", "many"]


@pytest.mark.parametrize("ways", [kernel.few, kernel.many])
def test_an_expert_written_over_in_its_slot_is_seen(ways):
    """As a store of experts does: a block of a slab gets another expert."""
    x, slots, gates, _, _ = arguments()
    codec, experts = Groups(4, 64), []
    for _ in range(2):
        pair = (torch.randn(3, 64, 32, device=DEVICE) / 6, torch.randn(3, 32, 32, device=DEVICE) / 6)
        experts.append(Bank(*(Matrix.pack(codec, weight) for weight in pair)))
    layout = Layout(32, 32, codec, codec)
    room = slab(3, layout.nbytes, DEVICE)
    bank = layout.bank(room)
    for these in experts:
        for expert in range(3):
            layout.pack(these.gate_up[expert], these.down[expert], room[expert])
        args = (x, slots % 3, gates, bank, None)
        close(made(ways, *args), case.reference(*args), case.truth(*args))


def test_what_is_refused():
    x, slots, gates, bank, shared = arguments(beside="bf16")

    def why(x=x, slots=slots, gates=gates, bank=bank, shared=shared):
        return kernel.refuses(x, slots, gates, bank, shared)

    assert why() is None and why(shared=None) is None
    assert "float16" in why(x=x.half()) and "rows of columns" in why(x=x[0])
    assert "next to each other" in why(x=torch.zeros(32, 2, dtype=torch.bfloat16).T)
    assert "int32" in why(slots=slots.int()) and "bfloat16" in why(gates=gates.bfloat16())
    assert "one for each row" in why(slots=slots.T.contiguous().T, gates=gates.T.contiguous().T)
    assert "0 choices" in why(x=x[:0], slots=slots[:0], gates=gates[:0])
    assert "weights are torch.float32" in why(bank=Bank(*(weight.float() for weight in bank)))
    assert "do not fit" in why(shared=Bank(shared.gate_up[:32], shared.down))
    assert "experts" in why(bank=Bank(bank.gate_up, bank.down[:2])) and "experts" in why(bank=shared)
    assert "do not follow" in why(bank=Bank(bank.gate_up, bank.down.mT.contiguous().mT))
    for codec in (Codes(4), Groups(5, 64), Groups(4, 16)):
        packed = Bank(*(Matrix.pack(codec, weight.float()) for weight in bank))
        assert "not read" in why(bank=packed)
    narrow = Bank(
        Matrix.pack(Groups(3, 64), torch.randn(5, 88, 32)), Matrix.pack(Groups(3, 64), torch.randn(5, 32, 44))
    )
    assert "32-bit words" in why(bank=narrow)
