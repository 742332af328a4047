"""The exam of pocket: wordings, and combinations of numbers, names and things, that are never taught.

`exam.txt` was written before any training. The curriculum keeps its combinations away by `held_out`, and the training
loop keeps its texts away by passing `texts()` to `conversations`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

from workbench.sampling import Sampling
from workbench.workbench import Workbench

Message = dict[str, str]

EXAM = Path(__file__).parent / "exam.txt"
# The longest answer that is still an answer, in characters; Chinese says the same in a third of them.
LIMITS = {"explain": 360, "identity": 260, "outside": 200, "words": 120, "memory": 100, "facts": 80, "arithmetic": 40}
_SIGNS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "−": "-", "。": ".", "、": ","})


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation, single spaces, digits without separators."""
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS).lower()
    text = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", " ".join(text.split()))
    return re.sub(r"\s*([\"'.,!?:;])\s*", r"\1", text)


def contains(text: str, part: str) -> bool:
    """Whether normalised `text` holds `part`; a number in `part` must be that number, not a piece of a longer one."""
    part = normalise(part)
    before = r"(?<![\d.])" if part[:1].isdigit() else ""
    after = r"(?![\d]|\.\d)" if part[-1:].isdigit() else ""
    if part.isascii() and part.isalpha():  # a Latin word stands alone, but may be a plural or a feminine
        before, after = r"(?<![^\W\d_])", r"(?:es|e|s)?(?![^\W\d_])"
    return re.search(before + re.escape(part) + after, text) is not None


def repeats(text: str) -> bool:
    """Whether a sentence occurs twice: the sign of a model that goes round in circles."""
    sentences = [s.strip() for s in re.split(r"[.!?。！？\n]", text) if len(s.strip()) > 8]
    return len(sentences) != len(set(sentences))


@dataclass(frozen=True)
class Question:
    """`messages` end with the user's question. An answer passes when it holds every text of one tuple of `accept` (or,
    where `number` is given, when that is its last number), holds none of `reject`, is not longer than `limit`
    characters and does not repeat itself."""

    kind: str
    language: str
    messages: tuple[Message, ...]
    accept: tuple[tuple[str, ...], ...] = ()
    reject: tuple[str, ...] = ()
    number: int | None = None

    @property
    def limit(self) -> int:
        limit = LIMITS.get(self.kind, LIMITS["explain"])
        return limit if self.language != "zh" else max(40, limit // 2)

    @property
    def text(self) -> str:
        """What the user says, the turns joined by line breaks."""
        return "\n".join(message["content"] for message in self.messages if message["role"] == "user")

    def passed(self, answer: str) -> bool:
        text = normalise(answer)
        if not text or len(answer) > self.limit or repeats(text):
            return False
        if any(contains(text, part) for part in self.reject):
            return False
        if self.number is not None:
            numbers = re.findall(r"(?<!\d)-?\d+", text.replace("- ", "-") if text.startswith("-") else text)
            return bool(numbers) and int(numbers[-1]) == self.number
        return any(all(contains(text, part) for part in parts) for parts in self.accept)


def questions(path: Path = EXAM) -> list[Question]:
    """The exam, in the order of its file: `# kind language`, then `turns | accepted | rejected`. Turns alternate
    between user and assistant, split by `>>`; accepted texts are split by `;` (or) and `&` (and); `=42` asks for a last
    number."""
    found = []
    kind = language = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            kind, language = line[2:].split()
        elif line.strip():
            turns, wanted, *unwanted = (cell.strip() for cell in line.split(" | "))
            messages = tuple(
                {"role": ("user", "assistant")[at % 2], "content": text.strip()}
                for at, text in enumerate(turns.split(" >> "))
            )
            number = int(wanted[1:]) if wanted.startswith("=") else None
            accept = (
                ()
                if number is not None
                else tuple(tuple(part.strip() for part in parts.split(" & ")) for parts in wanted.split(" ; "))
            )
            reject = tuple(part.strip() for cell in unwanted for part in cell.split(" ; "))
            found.append(Question(kind, language, messages, accept, reject, number))
    return found


def texts(exam: Iterable[Question] | None = None) -> frozenset[str]:
    """What the curriculum must leave out: the user texts of the exam."""
    return frozenset(question.text for question in (questions() if exam is None else exam))


def wilson(passed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (95 % for z = 1.96), honest also for few questions."""
    if total == 0:
        return 0.0, 1.0
    share, spread = passed / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Marked:
    """A question with the answer that was given to it."""

    question: Question
    answer: str
    passed: bool


@dataclass(frozen=True)
class Report:
    """What the model answered, and its shares by kind and by language."""

    marked: tuple[Marked, ...] = field(repr=False)

    def rows(self) -> list[tuple[str, int, int]]:
        """(label, passed, total): each kind, each language, then all."""
        groups: dict[str, list[bool]] = {}
        for by in ("kind", "language"):
            for one in self.marked:
                groups.setdefault(getattr(one.question, by), []).append(one.passed)
        groups["all"] = [one.passed for one in self.marked]
        return [(label, sum(results), len(results)) for label, results in groups.items()]

    def intervals(self) -> list[tuple[float, float]]:
        """The 95 % interval of each row's share."""
        return [wilson(passed, total) for _, passed, total in self.rows()]

    def to_dict(self) -> dict:
        """Plain data: per group the passed, the total and the 95 % interval of the share."""
        return {
            label: {"passed": passed, "total": total, "interval": [round(x, 3) for x in interval]}
            for (label, passed, total), interval in zip(self.rows(), self.intervals(), strict=True)
        }

    def __str__(self) -> str:
        lines = [f"{'':<12}{'passed':>8}{'total':>7}{'share':>8}   95 % interval"]
        for (label, passed, total), (low, high) in zip(self.rows(), self.intervals(), strict=True):
            share = passed / total if total else 0.0
            lines.append(f"{label:<12}{passed:>8}{total:>7}{share:>8.1%}   {low:.1%} to {high:.1%}")
        return "\n".join(lines)

    def failures(self) -> list[Marked]:
        return [one for one in self.marked if not one.passed]


def grade(exam: Iterable[Question], answer: Callable[[list[Message]], str]) -> Report:
    """Asks every question once and marks what `answer` gives for its messages."""
    marked = []
    for question in exam:
        given = answer([dict(message) for message in question.messages])
        marked.append(Marked(question, given, question.passed(given)))
    return Report(tuple(marked))


def examine(bench: Workbench, exam: Iterable[Question] | None = None) -> Report:
    """The whole exam, or the questions given, answered greedily: the same model gets the same marks."""
    calm = Sampling(temperature=0.0, top_p=1.0, max_tokens=160)
    return grade(questions() if exam is None else exam, lambda messages: bench.generate(messages, calm).text)
