"""Edits of a forward pass, as data: they can be compared, written into a trace, and carried out again.

The order in which they act is that of the computation, whatever order they are listed in: router logits (Scale and
Add, then Bias and Ablate), probabilities, groups, choice (ReplayRouting, then TopK, then Force), gates (those of
ReplayRouting, of Force, then Scale and Add). Scale and Add act at their site, several at one in the order listed; of
several TopK, ReplayRouting or forced gates that a token meets, the last listed counts.
"""

import base64
import zlib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import RequestError

if TYPE_CHECKING:
    from workbench.trace import Trace

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What all edits share: where in the sequence they act.

    positions  (start, stop), absolute, stop not included; None is everywhere
    phase      "prefill" (tokens of the prompt) or "decode" (tokens the model wrote); None is both
    """

    positions: tuple[int, int] | None = None
    phase: str | None = None

    def __post_init__(self):
        if self.phase not in (None, *PHASES):
            raise RequestError(f"phase must be 'prefill', 'decode' or None; got {self.phase!r}.")
        if getattr(self, "layer", None) is not None:
            _count(self, "layer")
        if self.positions is None:
            return
        given = self.positions
        if isinstance(given, range) and given.step == 1:
            given = (given.start, given.stop)
        if not isinstance(given, list | tuple) or len(given) != 2 or not all(_whole(x) for x in given):
            raise RequestError(f"positions must be (start, stop), whole numbers; got {self.positions!r}.")
        object.__setattr__(self, "positions", tuple(int(x) for x in given))
        if self.positions[0] >= self.positions[1]:
            raise RequestError(f"positions {self.positions} are empty: stop is not included.")


@dataclass(frozen=True)
class Ablate(Edit):
    """The router cannot choose these experts: their logits are minus infinity, so the others share the probability."""

    layer: int | None
    experts: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        _set_experts(self)


@dataclass(frozen=True)
class Force(Edit):
    """These experts are always among the chosen, in place of the weakest, with the router's own probability as gate.

    gate: the weight of each instead, in final units (routed_scaling_factor included).
    """

    layer: int | None
    experts: tuple[int, ...]
    gate: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _set_experts(self)
        if self.gate is not None:
            _number(self, "gate")


@dataclass(frozen=True)
class Bias(Edit):
    """Adds `amount` to the router logit of one expert: soft steering."""

    layer: int | None
    expert: int
    amount: float

    def __post_init__(self):
        super().__post_init__()
        _count(self, "expert")
        _number(self, "amount")


@dataclass(frozen=True)
class TopK(Edit):
    """Chooses k experts, as a model with num_experts_per_tok = k would."""

    layer: int | None
    k: int

    def __post_init__(self):
        super().__post_init__()
        _count(self, "k", least=1)


@dataclass(frozen=True, eq=False)
class ReplayRouting(Edit):
    """Every token at a recorded position goes to the experts it went to there, whatever the router says now.

    trace  a Trace; of several sequences, the first
    gates  also take its gates; else the router's present probabilities of those experts weigh them
    Positions beyond the trace, and layers that are not in it, are routed as usual.
    """

    trace: "Trace"
    gates: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not hasattr(self.trace, "sequence"):
            raise RequestError(f"a Trace is needed, such as wb.Trace.load gives; got {self.trace!r:.60}.")
        one = self.trace.sequence(0)
        if not len(one.layers) or not (one.experts >= 0).any():
            raise RequestError("this trace has no routing to replay.")
        position = np.asarray(one.tokens["position"])
        shape = (int(position[-1]) + 1, *one.experts.shape[1:])
        experts, weights = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
        experts[position], weights[position] = one.experts, one.gates
        object.__setattr__(self, "layers", one.layers)
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "gates", bool(self.gates))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReplayRouting) and to_dict(self) == to_dict(other)

    def __hash__(self) -> int:
        return hash((self.layers, self.experts.tobytes()))


@dataclass(frozen=True)
class Scale(Edit):
    """Multiplies what passes a site by `factor`; 0 removes it.

    index: which entry of the first dimension after batch and token (head of attn.z, slot of moe.gates); None: all
    """

    site: str
    factor: float
    layer: int | None = None
    index: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _place(self)
        _number(self, "factor")


@dataclass(frozen=True)
class Add(Edit):
    """Adds a vector (or one number) along the last dimension of what passes a site. `index` as in Scale."""

    site: str
    vector: tuple[float, ...]
    layer: int | None = None
    index: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _place(self)
        given = self.vector.tolist() if hasattr(self.vector, "tolist") else self.vector
        given = list(given) if isinstance(given, list | tuple) else [given]
        if not given or not all(_finite(x) for x in given):
            raise RequestError("vector must be a number or a list of numbers, all finite.")
        object.__setattr__(self, "vector", tuple(float(x) for x in given))


KINDS = {kind.__name__: kind for kind in (Ablate, Force, Bias, TopK, ReplayRouting, Scale, Add)}


def to_dict(edit: Edit) -> dict:
    """JSON values from which `from_dict` makes the same edit again; a replayed trace is packed into text."""
    if isinstance(edit, ReplayRouting):
        data = {
            "layers": list(edit.layers),
            "shape": list(edit.experts.shape),
            "experts": _packed(edit.experts),
            "weights": _packed(edit.weights),
            "gates": edit.gates,
            "positions": edit.positions,
            "phase": edit.phase,
        }
    else:
        data = asdict(edit)
    return {"kind": type(edit).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def from_dict(data: dict) -> Edit:
    """The edit that `to_dict` wrote. RequestError names what is wrong with anything else."""
    data = dict(data) if isinstance(data, dict) else {}
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise RequestError(f"no edit called {kind!r}; there are {', '.join(KINDS)}.")
    try:
        if kind == "ReplayRouting":
            return _replay(data)
        return KINDS[kind](**data)
    except (TypeError, KeyError, ValueError, zlib.error) as error:
        known = ", ".join(field.name for field in fields(KINDS[kind]))
        raise RequestError(f"this is no {kind} edit ({error}); it has {known}.") from None


def describe(edit: Edit) -> str:
    """One line in words."""
    layer = getattr(edit, "layer", None)
    where = "every layer" if layer is None else f"layer {layer}"
    match edit:
        case Ablate():
            text = f"without {_experts(edit.experts)} in {where}"
        case Force():
            text = f"{_experts(edit.experts)} forced in {where}" + (
                "" if edit.gate is None else f", gate {edit.gate:g}"
            )
        case Bias():
            text = f"router logit of expert {edit.expert} {edit.amount:+g} in {where}"
        case TopK():
            text = f"{edit.k} expert{'s' if edit.k > 1 else ''} per token in {where}"
        case ReplayRouting():
            text = f"routing of a trace of {len(edit.experts)} tokens" + (", gates too" if edit.gates else "")
        case Scale() | Add():
            change = f"x {edit.factor:g}" if isinstance(edit, Scale) else "+ a vector"
            text = f"{edit.site}{'' if edit.index is None else f'[{edit.index}]'} {change}"
            text += "" if edit.site in ("embed", "final.norm", "logits") else f" in {where}"
        case _:
            text = type(edit).__name__
    if edit.positions is not None:
        text += f", positions {edit.positions[0]} to {edit.positions[1] - 1}"
    return text + (f", {edit.phase} only" if edit.phase else "")


def _experts(experts: tuple[int, ...]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 0


def _set_experts(edit: Ablate | Force) -> None:
    given = edit.experts.tolist() if hasattr(edit.experts, "tolist") else edit.experts
    experts = tuple(given) if isinstance(given, list | tuple | set | range) else (given,)
    if not experts or not all(_whole(expert) for expert in experts):
        raise RequestError(f"experts must be whole numbers, 0 or more, at least one; got {edit.experts!r}.")
    object.__setattr__(edit, "experts", tuple(dict.fromkeys(int(expert) for expert in experts)))


def _count(edit: Edit, name: str, least: int = 0) -> None:
    value = getattr(edit, name)
    if not _whole(value) or value < least:
        raise RequestError(f"{name} must be a whole number, {least} or more; got {value!r}.")
    object.__setattr__(edit, name, int(value))


def _place(edit: "Scale | Add") -> None:
    if not isinstance(edit.site, str):
        raise RequestError(f"site must be the name of one, such as 'resid.post'; got {edit.site!r}.")
    if edit.index is not None:
        _count(edit, "index")


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _number(edit: Edit, name: str) -> None:
    value = getattr(edit, name)
    if not _finite(value):
        raise RequestError(f"{name} must be a finite number; got {value!r}.")
    object.__setattr__(edit, name, float(value))


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 9)).decode()


def _unpacked(text: str, dtype: type, shape: list[int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


class _Recorded:
    """As much of a Trace as ReplayRouting takes from one."""

    def __init__(self, layers: tuple[int, ...], experts: np.ndarray, gates: np.ndarray):
        self.layers, self.experts, self.gates = layers, experts, gates
        self.tokens = {"position": np.arange(len(experts))}

    def sequence(self, number: int) -> "_Recorded":
        return self


def _replay(data: dict) -> ReplayRouting:
    shape = data["shape"]
    experts = _unpacked(data["experts"], np.int16, shape)
    weights = _unpacked(data["weights"], np.float32, shape)
    trace = _Recorded(tuple(data["layers"]), experts, weights)
    if experts.ndim != 3 or len(trace.layers) != experts.shape[1]:
        raise ValueError(f"{len(trace.layers)} layers, but experts of shape {shape}")
    return ReplayRouting(trace, data["gates"], positions=data["positions"], phase=data["phase"])
