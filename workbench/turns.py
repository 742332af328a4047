"""A conversation is a tree: every edit and every new answer is a version beside the old one, and nothing is lost."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workbench.chat import detect
from workbench.edits import Edit, from_dict, to_dict
from workbench.errors import RequestError
from workbench.sampling import Alternative, Sampling

if TYPE_CHECKING:
    from workbench.engine import Stream
    from workbench.tokenizer import Tokenizer
    from workbench.trace import Trace

FIGURES = (
    "prompt_tokens", "reused_tokens", "prefilled_tokens", "prefill_seconds", "decode_seconds", "tokens",
    "tokens_per_second", "seed",
)  # fmt: skip
FORMAT = "workbench conversation"
VERSION = 1
ANSWERS_TO = {"system": (), "user": ("system", "assistant"), "assistant": ("user",)}


class Record(NamedTuple):
    """One generated token, kept so that it can be looked at again.

    `logprob` (natural) and `entropy` (nats) are of the model's own distribution, `probability` is the one after the
    sampling settings; all three are None for a token whose probability was never computed. `by_hand`: the reader put
    it there. `seconds`: what its step took; `position`: its index in the context.
    """

    token: int
    text: str
    logprob: float | None
    probability: float | None
    entropy: float | None
    alternatives: tuple[Alternative, ...]
    seconds: float
    position: int
    by_hand: bool = False


@dataclass(eq=False)
class Turn:
    """What one side said. The children of a turn are versions of what was said next; `chosen` is the visible one.

    `edits` is how the model was changed for it. `finish`: None while being answered, then "eos", "stop", "length",
    "context", "stopped" or "error".
    """

    key: int
    role: str
    content: str = ""
    parent: "Turn | None" = field(default=None, repr=False)
    children: "list[Turn]" = field(default_factory=list, repr=False)
    chosen: int = 0
    steps: list[Record] = field(default_factory=list, repr=False)
    finish: str | None = None
    error: str | None = None
    stats: dict = field(default_factory=dict, repr=False)
    settings: Sampling | None = field(default=None, repr=False)
    edits: tuple[Edit, ...] = field(default=(), repr=False)
    stream: "Stream | None" = field(default=None, repr=False)  # while it is being answered
    trace: "Trace | None" = field(default=None, repr=False)  # afterwards: prompt and reply, and where each token went

    @property
    def text(self) -> str:
        return self.content

    @property
    def tokens(self) -> list[int]:
        """The exact ids that were generated, the end-of-turn token included where the model chose it."""
        return [record.token for record in self.steps]

    @property
    def versions(self) -> "list[Turn]":
        """This turn and its siblings, oldest first."""
        return self.parent.children if self.parent else [self]

    def append(self, record: Record) -> None:
        self.steps.append(record)
        self.content += record.text

    def message(self) -> dict:
        """As the prompt wants it. A reply is its exact tokens, so what is cached is a prefix of the next prompt."""
        if self.role != "assistant" or not self.steps:
            return {"role": self.role, "content": self.content}
        ended = self.finish == "eos"
        return {"role": self.role, "content": self.content, "tokens": self.tokens[:-1] if ended else self.tokens}


class Tree:
    """All turns below the system prompt, which is the root; the visible path follows `chosen` down to a leaf."""

    def __init__(self, system: str = "") -> None:
        self.root = Turn(0, "system", system)
        self.turns = {0: self.root}

    def add(self, parent: Turn, role: str, content: str = "") -> Turn:
        """A new version under `parent`, made visible."""
        assert parent.role in ANSWERS_TO[role], (parent.role, role)
        turn = Turn(len(self.turns), role, content, parent)
        parent.children.append(turn)
        parent.chosen = len(parent.children) - 1
        self.turns[turn.key] = turn
        return turn

    def path(self) -> list[Turn]:
        """The visible turns, without the root."""
        return list(_descend(self.root))

    def leaf(self) -> Turn:
        return (self.path() or [self.root])[-1]

    def above(self, turn: Turn) -> list[Turn]:
        """From the root's first child down to `turn`, visible or not."""
        path = []
        while turn.parent:
            path.append(turn)
            turn = turn.parent
        return path[::-1]

    def select(self, turn: Turn) -> None:
        """Makes `turn` visible, with whatever was last visible below it."""
        for step in self.above(turn):
            step.parent.chosen = step.versions.index(step)

    def owns(self, turn: Turn) -> bool:
        return isinstance(turn, Turn) and self.turns.get(turn.key) is turn


def figures(stats: object) -> dict:
    """What a turn keeps of the cost of its generation."""
    return {name: getattr(stats, name) for name in FIGURES}


def whole_trace(turn: Turn, trace: "Trace", said: int) -> "Trace":
    """The trace of a reply of which the first `said` tokens were given: written earlier by the model, or by hand."""
    if not said:
        return trace
    about = trace.header["sequences"][0]
    about["prompt_tokens"] -= said
    where = slice(about["prompt_tokens"], about["prompt_tokens"] + said)
    rows, records = trace.tokens.index[where], turn.steps[:said]
    trace.tokens.loc[rows, "phase"] = "decode"
    columns = {"logprob": "logprob", "probability": "probability", "entropy": "entropy", "ms": "seconds"}
    for column, name in columns.items():
        unit = 1000 if column == "ms" else 1
        # a token put there by hand took no step of its own
        values = [None if record.by_hand and column == "ms" else getattr(record, name) for record in records]
        known = [math.nan if value is None else unit * value for value in values]
        trace.tokens.loc[rows, column] = np.array(known, np.float32)
    return trace


def write(tree: Tree, sampling: Sampling, model: str, vocab_size: int) -> dict:
    """Everything, as JSON values. `vocab_size` says whose token ids these are."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "vocab_size": vocab_size,
        "sampling": asdict(sampling),
        "turns": [_turn_to_dict(turn) for turn in tree.turns.values()],
    }


def read(data: dict, vocab_size: int) -> tuple[Tree, Sampling]:
    """What `write` wrote. RequestError for anything else: nothing is repaired in silence, nothing half read."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RequestError("this is not a conversation exported by the workbench.")
    if data.get("version") != VERSION:
        raise RequestError(
            f"this conversation has format version {data.get('version')!r} and this workbench reads {VERSION}: "
            "update the workbench, or export it again."
        )
    if data.get("vocab_size") != vocab_size:
        raise RequestError(
            f"this conversation was held with {data.get('model')!r}, whose vocabulary has {data.get('vocab_size')} "
            f"tokens, not {vocab_size}: load that model to go on with it."
        )
    _need(isinstance(data.get("sampling"), dict), "it has no sampling settings")
    return _tree(data.get("turns"), vocab_size), _sampling(data["sampling"], "sampling")


def reopen(turn: Turn, tokenizer: "Tokenizer") -> None:
    """Spells a reply anew from its tokens, so that it can go on.

    A character that a limit cut in two was shown as U+FFFD, and text that could have begun a stop string was held back.
    """
    decoder = tokenizer.stream(special=False)
    texts = [decoder.push(record.token) for record in turn.steps]
    first = next((index for index, text in enumerate(texts) if text), None)
    if first is not None and detect(tokenizer).leading_space:
        texts[first] = texts[first].removeprefix(" ")
    turn.steps = [record._replace(text=text) for record, text in zip(turn.steps, texts, strict=True)]
    turn.content = "".join(texts)


def put_by_hand(record: Record, token: int) -> Record:
    """`token` in place of the one that was chosen, with its probabilities where it was an alternative."""
    known = next((a for a in record.alternatives if a.token == token), None)
    return record._replace(
        token=token,
        logprob=math.log(known.before) if known and known.before > 0 else None,
        probability=known.after if known else None,
        by_hand=True,
    )


def _descend(turn: Turn) -> Iterator[Turn]:
    while turn.children:
        turn = turn.children[turn.chosen]
        yield turn


def _turn_to_dict(turn: Turn) -> dict:
    data = {
        "key": turn.key,
        "parent": turn.parent.key if turn.parent else None,
        "role": turn.role,
        "content": turn.content,
        "chosen": turn.chosen,
    }
    if turn.role == "assistant":
        data |= {
            "finish": turn.finish,
            "error": turn.error,
            "stats": dict(turn.stats),
            "settings": asdict(turn.settings) if turn.settings else None,
            "edits": [to_dict(edit) for edit in turn.edits],
            "steps": {name: [getattr(record, name) for record in turn.steps] for name in Record._fields},
        }
        data["steps"]["alternatives"] = [[list(a) for a in record.alternatives] for record in turn.steps]
    return data


def _tree(turns: list, vocab_size: int) -> Tree:
    _need(isinstance(turns, list) and turns, "`turns` must be a list with at least the system turn")
    tree = Tree()
    for key, data in enumerate(turns):
        where = f"turn {key}"
        _need(isinstance(data, dict) and data.get("key") == key, f"{where}: expected an object with key {key}")
        turn = _turn_from_dict(data, key, vocab_size, where)
        if key == 0:
            _need(turn.role == "system" and data.get("parent") is None, "turn 0 must be the system turn")
            tree.root = turn
        else:
            parent = tree.turns.get(data.get("parent")) if _is_index(data.get("parent"), key) else None
            _need(parent is not None, f"{where}: its parent {data.get('parent')!r} does not come before it")
            _need(parent.role in ANSWERS_TO[turn.role], f"{where}: {turn.role} cannot follow {parent.role}")
            turn.parent = parent
            parent.children.append(turn)
        tree.turns[key] = turn
    for turn in tree.turns.values():
        valid = range(max(1, len(turn.children)))
        _need(turn.role != "user" or turn.children, f"turn {turn.key} has no reply")
        _need(turn.chosen in valid, f"turn {turn.key}: chosen version {turn.chosen} of {len(turn.children)}")
    return tree


def _turn_from_dict(data: dict, key: int, vocab_size: int, where: str) -> Turn:
    role, content, chosen = data.get("role"), data.get("content"), data.get("chosen")
    _need(role in tuple(ANSWERS_TO), f"{where}: unknown role {role!r}")
    _need(isinstance(content, str), f"{where}: content must be text")
    _need(_is_index(chosen), f"{where}: chosen must be a number")
    turn = Turn(key, role, content, chosen=chosen)
    if role != "assistant":
        return turn
    for name, kinds in (("finish", str | None), ("error", str | None), ("stats", dict), ("settings", dict | None)):
        _need(isinstance(data.get(name), kinds), f"{where}: {name} is {data.get(name)!r}")
    turn.error, turn.stats = data["error"], dict(data["stats"])
    # a reply exported while it was being generated is, from now on, one that was stopped
    turn.finish = data["finish"] or "stopped"
    turn.settings = _sampling(data["settings"], where) if data["settings"] else None
    edits = data.get("edits", [])
    _need(isinstance(edits, list), f"{where}: edits must be a list")
    turn.edits = tuple(from_dict(edit) for edit in edits)
    turn.steps = _records(data.get("steps"), vocab_size, where)
    spelled = "".join(record.text for record in turn.steps)
    _need(spelled == content, f"{where}: its tokens do not spell its content")
    return turn


def _records(columns: dict, vocab_size: int, where: str) -> list[Record]:
    complete = isinstance(columns, dict) and all(isinstance(columns.get(name), list) for name in Record._fields)
    _need(complete, f"{where}: steps must have the columns {', '.join(Record._fields)}")
    _need(len({len(columns[name]) for name in Record._fields}) == 1, f"{where}: the columns of steps differ in length")
    records = []
    for row in zip(*(columns[name] for name in Record._fields), strict=True):
        record = Record(*row)
        valid = (
            _is_index(record.token, vocab_size)
            and isinstance(record.text, str)
            and all(value is None or _is_number(value) for value in record[2:5])
            and isinstance(record.alternatives, list)
            and all(isinstance(a, list) and len(a) == 3 and _is_index(a[0], vocab_size) for a in record.alternatives)
            and all(_is_number(value) for a in record.alternatives for value in a[1:])
            and _is_number(record.seconds)
            and _is_index(record.position)
            and isinstance(record.by_hand, bool)
        )
        _need(valid, f"{where}: step {len(records)} is not a token of this model: {row!r:.80}")
        records.append(record._replace(alternatives=tuple(Alternative(*a) for a in record.alternatives)))
    return records


def _sampling(data: dict, where: str) -> Sampling:
    try:
        return Sampling(**(data | {"stop": tuple(data.get("stop", ()))}))
    except TypeError as error:
        raise RequestError(f"{where}: these are not sampling settings ({error}).") from None


def _is_number(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: int, end: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0 and (end is None or value < end)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(f"this conversation cannot be read: {message}. Is the file complete and unedited?")
