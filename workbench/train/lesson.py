"""A lesson is a question with many wordings, and a few wordings of its answer, read from a text file."""

import re
import zlib
from pathlib import Path
from random import Random
from typing import NamedTuple

LANGUAGES = ("en", "zh", "fr")
LESSONS = Path(__file__).parent / "lessons"

_FOLD = str.maketrans(
    dict.fromkeys("!\"#$%&'()*,-./:;<=>?@[\\]^_`{|}~，。？！：；、（）「」『』《》“”‘’«»…—–\u3000\xa0\u202f", " ")
)


def fold(text: str) -> str:
    """Two texts that differ only in case, spaces or punctuation (`+`, `×` and digits are kept) fold to the same."""
    return " ".join(text.lower().translate(_FOLD).split())


class Pattern:
    """A text with alternatives, `what is (a|the) (small |)cat`: each call draws one wording. Groups may nest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts, end = _parse(text, 0, text)
        if end != len(text):
            raise ValueError(f"unbalanced ')' at {end} in lesson wording {text!r}")

    def __call__(self, rng: Random) -> str:
        return _draw(self.parts, rng.random)


def _parse(text: str, at: int, whole: str) -> tuple[list, int]:
    parts: list = []
    start = at
    while at < len(text) and text[at] not in "|)":
        if text[at] == "(":
            if at > start:
                parts.append(text[start:at])
            choices = []
            while True:
                choice, at = _parse(text, at + 1, whole)
                choices.append(choice[0] if len(choice) == 1 and isinstance(choice[0], str) else choice or "")
                if at >= len(text):
                    raise ValueError(f"unbalanced '(' in lesson wording {whole!r}")
                if text[at] == ")":
                    break
            parts.append(tuple(choices))
            start = at + 1
        at += 1
    if at > start:
        parts.append(text[start:at])
    return parts, at


def _draw(parts: list, draw) -> str:
    text = ""
    for part in parts:
        if type(part) is tuple:
            part = part[int(draw() * len(part))]
            if type(part) is list:
                part = _draw(part, draw)
        text += part
    return text


class Lesson(NamedTuple):
    """`asks` are (mark, Pattern): mark "?" is a question, "!" a request or statement, ":" is used as it stands.
    `answers` and `more` (what follows "tell me more") are literal, except for {slots}."""

    name: str
    asks: list[tuple[str, Pattern]]
    answers: list[str]
    more: list[str]

    @property
    def subject(self) -> str:
        return self.name.partition("/")[0]


def read(path: Path) -> dict[str, Lesson]:
    """Lessons by name. A file holds blocks: `# subject/name`, then lines `?`, `!` or `:` (asks), `=` (answers) and `+`
    (more); `\\n` in an answer is a line break. ValueError names the line that does not fit."""
    lessons: dict[str, Lesson] = {}
    lesson = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        mark, _, rest = line.partition(" ")
        rest = rest.strip()
        if mark == "#":
            if rest in lessons:
                raise ValueError(f"{path.name}:{number}: the lesson {rest!r} is given twice")
            lesson = lessons[rest] = Lesson(rest, [], [], [])
        elif lesson is None or mark not in ("?", "!", ":", "=", "+") or not rest:
            raise ValueError(f"{path.name}:{number}: expected '# name', '? ! :' ask, '=' answer or '+' more: {line!r}")
        elif mark in "?!:":
            lesson.asks.append((mark, Pattern(rest)))
        else:
            (lesson.answers if mark == "=" else lesson.more).append(rest.replace("\\n", "\n"))
    for lesson in lessons.values():
        if not (lesson.asks and lesson.answers):
            raise ValueError(f"{path.name}: the lesson {lesson.name!r} needs an ask and an answer")
    return lessons


def read_tables(path: Path) -> dict[str, list[list[str]]]:
    """Tables by name: `# name`, then rows of cells separated by `|`."""
    tables: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            rows = tables[line[2:].strip()] = []
        elif line.strip():
            rows.append([cell.strip() for cell in re.split(r"\|", line)])
    return tables


def pick(rng: Random, choices):
    """One of a sequence. Only `random()` is drawn, whose sequence Python keeps across versions."""
    return choices[int(rng.random() * len(choices))]


def held_out(*parts: object) -> bool:
    """Whether this combination (in any order) is kept for the exam and never taught. About one in five is."""
    return zlib.crc32(" ".join(sorted(map(str, parts))).encode()) % 5 == 0
