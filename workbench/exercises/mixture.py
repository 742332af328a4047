"""Exercises about the mixture of experts.

T tokens, D hidden, K experts that read a token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.exercises.feedback import Feedback

Expert = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    x: Tensor  # [T, D]
    gates: Tensor  # [T, K]
    ids: Tensor  # [T, K]

    def sum(self, weigh: Callable[[Tensor], Tensor] = lambda gates: gates, ids: Tensor | None = None) -> Tensor:
        """The right answer; or what comes of other gates, [K] from [K], or of other ids [T, K]."""
        ids = self.ids if ids is None else ids
        tokens = zip(self.x, self.gates, ids.tolist(), strict=True)
        return torch.stack(
            [sum(gate * EXPERTS[n](x) for gate, n in zip(weigh(g), own, strict=True)) for x, g, own in tokens]
        )


def _expert(number: int) -> Expert:
    def expert(x: Tensor) -> Tensor:
        return 2.0**number * x.roll(number, -1) + 1  # no two alike, and exact in binary

    return expert


EXPERTS = tuple(_expert(number) for number in range(4))
# gates that do not sum to 1, as in V2, and experts that do not stand in order
MIX = (
    Case(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[2, 0]])),
    Case(
        torch.tensor([[1.0, 2.0, 4.0], [3.0, -1.0, 2.0], [0.5, 0.0, -2.0]]),
        torch.tensor([[0.5, 0.125], [1.0, 0.25], [0.25, 0.125]]),
        torch.tensor([[3, 1], [0, 3], [1, 2]]),
    ),
    Case(torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[1, 3, 0]])),
)


def check_mix(mix: Callable[[Tensor, Tensor, Tensor, Sequence[Expert]], Tensor]) -> Feedback:
    """For `mix(x, gates, ids, experts)`: for each token of x [T, D], the sum of gate * expert(token) over its K."""
    for number, case in enumerate(MIX, 1):
        given = Case(*(values.clone() for values in case))
        answer = mix(*given, list(EXPERTS))
        what = f"{len(case.x)} token{'s' * (len(case.x) > 1)} with {case.ids.shape[1]} experts each"
        if answer is None or answer is ...:
            return Feedback(False, f"mix returned nothing for {what}. End the function with `return`, and a tensor.")
        if not isinstance(answer, Tensor):
            return Feedback(False, f"mix returned a {type(answer).__name__}; a tensor like x is expected.")
        if answer.shape != case.x.shape:
            return Feedback(
                False,
                f"x is {list(case.x.shape)} and mix returned {list(answer.shape)}: one row a token is expected, "
                "as wide as the token.",
            )
        if not all(torch.equal(a, b) for a, b in zip(given, case)):
            return Feedback(
                False, "mix changed what it was given. Add up in a tensor of your own: x.new_zeros(x.shape)."
            )
        if not torch.allclose(answer, case.sum(), atol=1e-6):
            done = f" Right so far: {number - 1} of {len(MIX)} cases." if number > 1 else ""
            return Feedback(False, f"For {what}: {_hint(answer, case)}.{done}")
    return Feedback(True, f"All {len(MIX)} cases are right. The model does the same, in workbench/ops.py: `experts`.")


def _hint(answer: Tensor, case: Case) -> str:
    everyone = torch.arange(len(EXPERTS)).expand(len(case.ids), -1)
    ones = torch.ones(len(EXPERTS))
    first = torch.arange(case.ids.shape[1]).expand_as(case.ids)
    mistakes = (
        (case.sum(torch.ones_like), "the gates are missing; each output counts gate times"),
        (case.sum(lambda g: g / g.sum()), "the gates were made to sum to 1, which this model does not do"),
        (case.sum(lambda g: g.softmax(-1)), "a softmax over the gates; they come from one already"),
        (case.sum(lambda g: g / len(g)), "this is a mean; the experts are summed"),
        (case.sum(lambda g: torch.full_like(g, 1 / len(g))), "a mean without the gates; each output counts gate times"),
        (case.sum(lambda g: g * (g == g.max())), "only the strongest expert is there; every one in ids counts"),
        (case.sum(lambda g: g.flip(0)), "each gate met another expert's output; gates[t, k] belongs to ids[t, k]"),
        (case.sum(ids=first), "these are the first experts in the list, not those in ids"),
        (case.sum(ids=case.ids[:1].expand_as(case.ids)), "every token went to the experts of the first one"),
        (case.x + case.sum(), "the token itself was added; that is done later, by the block"),
        (case.sum(lambda g: ones, everyone), "every expert was asked; only those in ids may be"),
        (case.sum(lambda g: ones * g.sum(), everyone), "every expert was asked; only those in ids may be"),
        (case.sum(lambda g: ones / len(ones), everyone), "every expert was asked; only those in ids may be"),
    )
    for wrong, words in mistakes:
        if torch.allclose(answer, wrong, atol=1e-6):
            return words
    row = int((answer - case.sum()).abs().amax(1).argmax())
    given = ", ".join(f"{gate:g} x expert {n}" for gate, n in zip(case.gates[row].tolist(), case.ids[row].tolist()))
    return f"row {row} is {answer[row].tolist()}, and {given} makes {case.sum()[row].tolist()}"
