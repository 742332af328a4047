"""Exercises about edits."""

from collections.abc import Callable, Sequence

from workbench.config import Config
from workbench.editcheck import check
from workbench.edits import Ablate, Edit, describe
from workbench.errors import RequestError
from workbench.exercises.feedback import Feedback

MODELS = ("pocket", "v2")
GROUPS = (0, 5)


def check_without_group(without_group: Callable[[Config, int], Sequence[Edit]]) -> Feedback:
    """For `without_group(config, group)`: edits that keep the answer, and only it, from all experts of one group."""
    cases = [(name, group) for name in MODELS for group in GROUPS]
    for number, (name, group) in enumerate(cases, 1):
        config = Config.preset(name)
        edits = without_group(config, group)
        if edits is None or edits is ...:
            return Feedback(
                False, "without_group returned nothing. End the function with `return`, and a list of edits."
            )
        if isinstance(edits, Edit):
            return Feedback(False, "one edit alone was returned; a list is expected, even of one: [wb.Ablate(...)].")
        if not isinstance(edits, Sequence) or not all(isinstance(edit, Edit) for edit in edits):
            return Feedback(False, f"{edits!r} was returned. A list of edits is expected, such as [wb.Ablate(...)].")
        hint = _hint(edits, config, group)
        if hint:
            done = f" Right so far: {number - 1} of {len(cases)} cases." if number > 1 else ""
            return Feedback(
                False, f"For {name}, {config.n_group} groups of {_size(config)}, group {group}: {hint}.{done}"
            )
    return Feedback(True, f"All {len(cases)} cases are right, for pocket and for the large V2.")


def _hint(edits: Sequence[Edit], config: Config, group: int) -> str:
    if not edits:
        return "the list is empty, so nothing changes"
    try:
        check(edits, config)
    except RequestError as error:
        return f"the model refuses this: {str(error).rstrip('.')}"
    other = next((edit for edit in edits if not isinstance(edit, Ablate)), None)
    if other is not None:
        return f"'{describe(other)}' is no Ablate; Ablate is what takes experts away"
    if any(edit.phase == "prefill" for edit in edits):
        return "phase='prefill' is the prompt; the tokens of the answer are phase='decode'"
    if any(edit.phase is None for edit in edits):
        return "the prompt is changed too; phase='decode' limits an edit to the tokens of the answer"
    if any(edit.positions is not None for edit in edits):
        return "positions are not needed: wherever the answer begins, phase='decode' is all of it"
    return _wrong_experts(edits, config, group)


def _wrong_experts(edits: Sequence[Ablate], config: Config, group: int) -> str:
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    gone = {layer: {e for edit in edits if edit.layer in (None, layer) for e in edit.experts} for layer in layers}
    untouched = [layer for layer in layers if not gone[layer]]
    if untouched:
        return f"layer {untouched[0]} keeps all its experts; layer=None is every layer that has a router"
    size = _size(config)
    wanted = set(range(group * size, (group + 1) * size))
    wrong = next((layer for layer in layers if gone[layer] != wanted), None)
    if wrong is None:
        return ""
    own = gone[wrong]
    if own == {group}:
        return f"expert {group} alone is gone; group {group} has the {size} experts {min(wanted)} to {max(wanted)}"
    if own == {expert - size for expert in wanted}:
        return f"this is the group before. Groups are counted from 0: group 0 has experts 0 to {size - 1}"
    if own == {n * config.n_group + group for n in range(size)}:
        side = f"the experts of a group stand side by side: {min(wanted)} to {max(wanted)}"
        return f"every {config.n_group}th expert is gone; {side}"
    if wanted - own and own < wanted:
        left = ", ".join(map(str, sorted(wanted - own)[:4]))
        return f"in layer {wrong} expert {left} is still there. The stop of a range is not included"
    return f"in layer {wrong} experts {_short(own)} are gone, and {min(wanted)} to {max(wanted)} should be"


def _size(config: Config) -> int:
    """Experts of a group."""
    return config.n_routed_experts // config.n_group


def _short(experts: set[int]) -> str:
    shown = ", ".join(map(str, sorted(experts)[:6]))
    return shown + (" and more" if len(experts) > 6 else "")
