"""What edits mean, carried out token by token in plain loops on the float64 reference, as workbench/edits.py has it."""

from functools import cache

import checkpoints
import torch
from inside import Inside
from torch import Tensor

from workbench.editing import Editing
from workbench.edits import Ablate, Add, Bias, Edit, Force, ReplayRouting, Scale, TopK
from workbench.probe import SITES

LENGTH, PROMPT = 12, 7  # tokens of a case, and of its prompt


def edited(config: dict, tensors: dict[str, Tensor], tokens: list[int], edits: list[Edit], prompt: int = 0) -> Inside:
    """One sequence of which the first `prompt` tokens are the prompt."""

    def acts(edit: Edit, layer: int | None, position: int) -> bool:
        if isinstance(edit, ReplayRouting):
            if layer not in edit.layers or position >= len(edit.experts) or (edit.experts[position] < 0).all():
                return False
        elif edit.layer not in (None, layer):
            return False
        if edit.positions is not None and not edit.positions[0] <= position < edit.positions[1]:
            return False
        return edit.phase is None or (position < prompt) == (edit.phase == "prefill")

    def of(kind: type, layer: int | None, position: int) -> list[Edit]:
        return [edit for edit in edits if isinstance(edit, kind) and acts(edit, layer, position)]

    def steer(site: str, layer: int | None, x: Tensor) -> None:
        dims = SITES[site].dims.split()[1:]
        axis = dims.index("T") if "T" in dims else dims.index("S")
        for position in range(x.shape[axis]):
            for edit in of(Scale | Add, layer, position):
                if edit.site != site:
                    continue
                part = x.select(axis, position)
                if edit.index is not None:
                    if edit.index >= len(part):
                        continue
                    part = part[edit.index]
                if isinstance(edit, Scale):
                    part *= edit.factor
                else:
                    part += part.new_tensor(edit.vector if len(edit.vector) > 1 else edit.vector[0])

    def logits(layer: int, x: Tensor) -> None:
        for position in range(len(x)):
            for edit in of(Ablate | Bias, layer, position):
                if isinstance(edit, Bias):
                    x[position, edit.expert] += edit.amount
                else:
                    x[position, list(edit.experts)] = float("-inf")

    def gates(inside: Inside, layer: int, x: Tensor) -> None:
        for position, chosen in enumerate(inside["moe.experts", layer].tolist()):
            for edit in of(ReplayRouting, layer, position):
                column = edit.layers.index(layer)
                recorded = dict(zip(edit.experts[position, column].tolist(), edit.weights[position, column].tolist()))
                for slot, expert in enumerate(chosen):
                    if edit.gates and expert in recorded:
                        x[position, slot] = recorded[expert]
            for edit in of(Force, layer, position):
                for slot, expert in enumerate(chosen):
                    if edit.gate is not None and expert in edit.experts:
                        x[position, slot] = edit.gate

    def change(inside: Inside, site: str, layer: int | None, x: Tensor) -> Tensor:
        x = x.clone()
        if site == "moe.gates":
            gates(inside, layer, x)
        steer(site, layer, x)
        if site == "moe.router_logits":
            logits(layer, x)
        return x

    def choose(inside: Inside, layer: int, position: int, ranked: list[int]) -> list[int]:
        count, forced = config["num_experts_per_tok"], []
        for edit in of(ReplayRouting, layer, position):
            recorded = [expert for expert in edit.experts[position, edit.layers.index(layer)].tolist() if expert >= 0]
            count = len(recorded)
            ranked = recorded + [expert for expert in ranked if expert not in recorded]
        for edit in of(TopK, layer, position):
            count = edit.k
        for edit in of(Force, layer, position):
            forced += [expert for expert in edit.experts if expert not in forced]
        return (forced + [expert for expert in ranked if expert not in forced])[:count]

    return Inside(config, tensors, tokens, change, choose)


def cases(checkpoint, model, seed):
    """cases(...)(name) -> config, tensors, model, tokens, logits without an edit."""

    @cache
    def make(name):
        config, tensors = checkpoint(name).config, checkpoint(name).tensors
        tokens = checkpoints.some_tokens(config, LENGTH, seed=seed)
        with torch.no_grad():
            return config, tensors, model(name), tokens, model(name)(torch.tensor([tokens]))[0]

    return make


def run(bench, tokens, edits, prompts=PROMPT):
    return bench(torch.tensor([tokens]), probe=Editing(edits, bench.config, prompts))[0]


def same(a, b, tolerance=1e-4):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
