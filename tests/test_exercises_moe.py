"""The checks of the exercises on experts and routing accept what is right and name what is wrong."""

import pytest
import torch

from workbench import ops
from workbench.config import Config
from workbench.exercises import CHOOSE, check_choose, check_mix


def mixed(weigh, whom=lambda ids, t: ids[t]):
    """A solution of `mix` but for the gates `weigh(gates[t])` and the experts `whom(ids, t)`."""

    def mix(x, gates, ids, experts):
        out = x.new_zeros(x.shape)
        for t in range(len(x)):
            for gate, n in zip(weigh(gates[t]), whom(ids, t)):
                out[t] += gate * experts[n](x[t])
        return out

    return mix


def in_one_go(x, gates, ids, experts):
    outputs = torch.stack([expert(x) for expert in experts])  # [E, T, D]
    chosen = outputs[ids, torch.arange(len(x))[:, None]]
    return (gates[..., None] * chosen).sum(1)


def with_the_ops(x, gates, ids, experts):
    outputs = [torch.stack([experts[n](token) for n in own]) for token, own in zip(x, ids)]
    return ops.weigh_outputs(torch.stack(outputs), gates)


@pytest.mark.parametrize("mix", [mixed(lambda g: g), in_one_go, with_the_ops], ids="loop indexing ops".split())
def test_mix_may_be_written_in_any_way(mix):
    assert check_mix(mix).passed


def in_place(x, gates, ids, experts):
    for t in range(len(x)):
        x[t] = sum(gate * experts[n](x[t]) for gate, n in zip(gates[t], ids[t]))
    return x


def by_expert_number(x, gates, ids, experts):
    weights = x.new_zeros(len(x), len(experts)).scatter(1, ids, gates.flip(1))
    return sum(weights[:, n, None] * expert(x) for n, expert in enumerate(experts))


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        (lambda x, gates, ids, experts: None, "returned nothing"),
        (lambda x, gates, ids, experts: [1.0], "a tensor like x is expected"),
        (lambda x, gates, ids, experts: mixed(lambda g: g)(x, gates, ids, experts)[0], "one row a token"),
        (mixed(lambda g: torch.ones_like(g)), "gates are missing"),
        (lambda x, gates, ids, experts: sum(expert(x) for expert in experts), "every expert was asked"),
        (lambda x, gates, ids, experts: sum(expert(x) for expert in experts) / len(experts), "every expert was asked"),
        (mixed(lambda g: g / g.sum()), "made to sum to 1"),
        (mixed(lambda g: g.softmax(-1)), "softmax over the gates"),
        (mixed(lambda g: g / len(g)), "this is a mean"),
        (mixed(lambda g: g[:1]), "only the strongest"),
        (mixed(lambda g: g, lambda ids, t: range(ids.shape[1])), "not those in ids"),
        (mixed(lambda g: g, lambda ids, t: ids[0]), "experts of the first one"),
        (by_expert_number, "another expert's output"),
        (lambda x, gates, ids, experts: x + in_one_go(x, gates, ids, experts), "the token itself was added"),
        (in_place, "changed what it was given"),
        (mixed(lambda g: g + 1), "x expert"),
    ],
    ids="nothing list vector ungated all average normalised softmax mean strongest order others swapped residual place "
    "other".split(),
)  # fmt: skip
def test_mix_names_the_mistake(mix, says):
    feedback = check_mix(mix)
    assert not feedback.passed and says in feedback.text


def test_mix_counts_what_is_right_already():
    assert "Right so far: 1 of 3 cases." in check_mix(mixed(lambda g: g, lambda ids, t: ids[0])).text


def chosen(score=lambda groups: groups.amax(1), gates=lambda probs, ids: probs[ids]):
    """A solution of `choose` but for what is given."""

    def choose(probs, n_group, topk_group, k):
        groups = probs.view(n_group, -1)
        best = score(groups).topk(topk_group).indices
        allowed = torch.zeros_like(groups)
        allowed[best] = groups[best]
        ids = allowed.flatten().topk(k).indices
        return ids, gates(probs, ids)

    return choose


def in_plain_python(probs, n_group, topk_group, k):
    probs = probs.tolist()
    size = len(probs) // n_group
    groups = [range(n * size, (n + 1) * size) for n in range(n_group)]
    best = sorted(groups, key=lambda group: -max(probs[n] for n in group))[:topk_group]
    ids = sorted((n for group in best for n in group), key=lambda n: -probs[n])[:k]
    return ids, [probs[n] for n in ids]


def with_the_model(probs, n_group, topk_group, k):
    sizes = {"n_routed_experts": len(probs), "n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": k}
    config = Config(*[1] * 10, topk_method="group_limited_greedy", **sizes)
    routing = ops.route(probs.log(), config)
    return routing.ids, routing.gates


@pytest.mark.parametrize("choose", [chosen(), in_plain_python, with_the_model], ids="torch plain model".split())
def test_choose_may_be_written_in_any_way(choose):
    assert check_choose(choose).passed


def right_but(change):
    def choose(probs, n_group, topk_group, k):
        ids, gates = chosen()(probs, n_group, topk_group, k)
        return change(probs, ids.tolist(), gates.tolist())

    return choose


def inside(probs, n_group, topk_group, k):
    groups = probs.view(n_group, -1)
    kept = groups[groups.amax(1).topk(topk_group).indices.sort().values].flatten()
    return kept.topk(k).indices, kept.topk(k).values


def of_the_kept(probs, n_group, topk_group, k):
    ids, gates = chosen()(probs, n_group, topk_group, k)
    best = probs.view(n_group, -1)[probs.view(n_group, -1).amax(1).topk(topk_group).indices]
    return ids, gates / best.sum()


@pytest.mark.parametrize(
    ("choose", "says"),
    [
        (lambda probs, n_group, topk_group, k: None, "returned nothing"),
        (lambda probs, n_group, topk_group, k: [0, 2, 1], "must return two things"),
        (lambda probs, n_group, topk_group, k: (0, 0.25), "ids must be numbers of experts"),
        (lambda probs, n_group, topk_group, k: ([0.25, 0.5, 0.1], [0, 1, 2]), "ids must be numbers of experts"),
        (lambda probs, n_group, topk_group, k: ([0, 2, 99], [0, 1, 2]), "ids must be numbers of experts"),
        (right_but(lambda probs, ids, gates: (ids, None)), "gates must be numbers"),
        (lambda probs, n_group, topk_group, k: tuple(probs.topk(k))[::-1], "limit on groups is missing"),
        (chosen(score=lambda groups: groups.sum(1)), "not as the sum or mean"),
        (chosen(score=lambda groups: groups.mean(1)), "not as the sum or mean"),
        (chosen(score=lambda groups: -groups.amax(1)), "weakest groups"),
        (chosen(score=lambda groups: torch.arange(len(groups), 0.0, -1)), "the first groups, not the best"),
        (inside, "number experts as in probs"),
        (right_but(lambda probs, ids, gates: (ids[::-1], gates[::-1])), "strongest first"),
        (right_but(lambda probs, ids, gates: (sorted(ids), probs[sorted(ids)])), "strongest first"),
        (right_but(lambda probs, ids, gates: (ids[:-1], gates)), "2 were returned"),
        (right_but(lambda probs, ids, gates: (ids, gates[:-1])), "2 were returned"),
        (right_but(lambda probs, ids, gates: (ids[:1] * len(ids), gates)), "is there twice"),
        (chosen(gates=lambda probs, ids: probs[ids] / probs[ids].sum()), "norm_topk_prob is false"),
        (chosen(gates=lambda probs, ids: probs[ids].softmax(-1)), "softmax over the chosen"),
        (of_the_kept, "shares of the kept groups"),
        (right_but(lambda probs, ids, gates: (ids, gates[::-1])), "another order than the ids"),
        (chosen(gates=lambda probs, ids: 4 * probs[ids]), "expected their probabilities"),
    ],
    ids="nothing one bare values beyond gateless free sum mean weakest first inside reversed sorted few gates twice "
    "normalised softmax share order scaled".split(),
)  # fmt: skip
def test_choose_names_the_mistake(choose, says):
    feedback = check_choose(choose)
    assert not feedback.passed and says in feedback.text, feedback


def test_the_mistakes_can_be_told_apart():
    case = CHOOSE[0]
    scores = (lambda g: g.amax(1), lambda g: g.sum(1), lambda g: -g.amax(1), lambda g: -torch.arange(len(g)))
    answers = [tuple(chosen(score)(case.probs, *case[1:4])[0].tolist()) for score in scores]
    answers.append(tuple(case.probs.topk(case.k).indices.tolist()))
    assert len(set(answers)) == len(answers)


def test_choose_counts_what_is_right_already():
    feedback = check_choose(lambda probs, n_group, topk_group, k: chosen()(probs, n_group, min(2, n_group), k))
    assert not feedback.passed and "Right so far: 1 of 5 cases." in feedback.text
