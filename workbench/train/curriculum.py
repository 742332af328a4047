"""The curriculum: an endless, seeded stream of short conversations in English, Chinese and French.

A conversation mixes lessons (wordings and answers from `lessons/`), exercises (answers computed), what was never taught
(an honest answer), and what needs the earlier turns: the user's name, the last question, "tell me more".
"""

import re
from collections.abc import Iterator
from itertools import chain, islice
from random import Random
from typing import NamedTuple

from workbench.train.exercises import MAKERS
from workbench.train.facts import TOPICS, remembered
from workbench.train.lesson import LANGUAGES, LESSONS, Lesson, fold, held_out, pick, read
from workbench.train.sums import held_out_sum
from workbench.train.words import LANGUAGE_NAMES, TABLES

__all__ = ["Conversation", "conversations", "corpus", "fold", "held_out", "held_out_sum", "lessons"]

Message = dict[str, str]

LESSON = {
    language: read(LESSONS / f"{language}.txt")
    | read(LESSONS / f"exercises.{language}.txt")
    | read(LESSONS / f"outside.{language}.txt")
    for language in LANGUAGES
}
EXPLAINED = ("moe", "mla", "cache", "tokens", "workbench", "deepseek")
_NAMES = {
    "explain": [name for name in LESSON["en"] if name.split("/")[0] in EXPLAINED],
    "talk": [name for name in LESSON["en"] if name.split("/")[0] in ("greeting", "identity")]
    + ["greeting/hello", "greeting/thanks", "identity/who", "identity/who", "identity/can", "identity/cannot"],
    "outside": [name for name in LESSON["en"] if name.startswith("outside/")],
    "exercise": [name for name, (_, weight) in MAKERS.items() for _ in range(weight)],
}
# Share of each kind of turn, in percent; memory and recall come on top of these, at the rates below.
MIX = {"explain": 34, "talk": 9, "exercise": 46, "outside": 11}
_KINDS = [kind for kind, percent in MIX.items() for _ in range(percent)]
_LANGUAGES = ["en"] * 4 + ["zh"] * 3 + ["fr"] * 3
_LENGTHS = [1] * 30 + [2] * 27 + [3] * 22 + [4] * 13 + [5] * 8
_QUOTES = {"en": '"{}"', "zh": "“{}”", "fr": "« {} »"}
_ENDS = {"en": ("?", ".", "!"), "zh": ("？", "。", "！"), "fr": (" ?", ".", " !")}


class Turn(NamedTuple):
    subject: str
    language: str
    user: str
    assistant: str
    more: list[str]


class Conversation(NamedTuple):
    """`messages` as a chat template takes them; `turns` says what each exchange teaches, for tests and statistics."""

    messages: list[Message]
    turns: list[Turn]


def dress(rng: Random, language: str, mark: str, text: str, plain: bool = False) -> str:
    """The wording as somebody might type it: with or without politeness, capitals, final mark, seldom with a slip.
    `plain` text holds nothing whose spelling matters, so it may be lowered or mistyped as a whole."""
    if mark == ":":
        return text
    chance = rng.random
    end = _ENDS[language][0] if mark == "?" else _ENDS[language][1 + (chance() < 0.25)]
    if end == " ?" and chance() < 0.4:
        end = "?"
    if plain:
        slip = chance()
        if slip < 0.03 and language != "zh" and len(text) > 12:
            at = 3 + int(chance() * (len(text) - 5))
            if text[at : at + 2].isalpha():
                text = text[:at] + (text[at + 1] + text[at] if slip < 0.015 else text[at + 1]) + text[at + 2 :]
        elif slip > 0.99:
            text = text.upper()
        elif slip > 0.7:
            text = text.lower()
    elif ". " in text and chance() < 0.8:
        text = ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
    start = chance()
    if start < 0.1:
        before = pick(rng, TABLES[f"before {language}"])[0]
        text = before + ("" if language == "zh" else " ") + text
    elif start > 0.96:
        after = pick(rng, TABLES[f"after {language}"])[0]
        text = text + ("，" + after if after == "谢谢" else after) if language == "zh" else f"{text}, {after}"
    if chance() < 0.75:
        text = text[:1].upper() + text[1:]
    if chance() < (0.75 if mark == "?" else 0.5):
        text += end
    return text


def _fill(rng: Random, language: str, name: str, slots: dict, plain: bool = False) -> tuple[str, str]:
    lesson = LESSON[language][name]
    mark, pattern = pick(rng, lesson.asks)
    user, answer = pattern(rng), pick(rng, lesson.answers)
    if slots:
        user, answer = user.format_map(slots), answer.format_map(slots)
    return dress(rng, language, mark, user, plain), answer


def _exercise(rng: Random, language: str) -> Turn:
    name = pick(rng, _NAMES["exercise"])
    if name not in LESSON[language]:  # Chinese has no plural
        name = "words/translate"
    user, answer = _fill(rng, language, name, MAKERS[name][0](rng, language))
    return Turn(name, language, user, answer, [])


def _told(rng: Random, language: str, kind: str, reply: str) -> Turn:
    """A lesson, usually asked and answered in one language; the answer comes from the lesson of `reply`."""
    lesson: Lesson
    name = pick(rng, _NAMES[kind])
    lesson, answered = LESSON[language][name], LESSON[reply][name]
    mark, pattern = pick(rng, lesson.asks)
    user = dress(rng, language, mark, pattern(rng), plain=True)
    return Turn(name, language, user, pick(rng, answered.answers), answered.more)


def _any(rng: Random, language: str, reply: str | None = None) -> Turn:
    kind = pick(rng, _KINDS)
    if kind == "exercise" and reply is None:
        return _exercise(rng, language)
    if kind == "exercise":
        kind = "explain"
    if reply is None and kind == "explain" and rng.random() < 0.05:
        at = int(rng.random() * 3)
        turn = _told(rng, language, kind, LANGUAGES[at])
        user, _ = _fill(
            rng, language, "in/language", {"language": LANGUAGE_NAMES[language][at], "q": turn.user, "v": ""}
        )
        return turn._replace(user=user)
    return _told(rng, language, kind, reply or language)


def _recall(rng: Random, language: str, turns: list[Turn]) -> Turn | None:
    """A turn about the turns before it, or None where they do not lend themselves to it."""
    last, draw = turns[-1], rng.random()
    if last.more and draw < 0.6:
        user, answer = _fill(rng, language, "follow/more", {"v": pick(rng, last.more)})
        return Turn("follow/more", language, user, answer, []) if language == last.language else None
    if draw < 0.75 and len(last.user) <= 60:
        name, text = "recall/question", last.user
    elif draw < 0.82 and len(turns) > 1 and len(turns[0].user) <= 60:
        name, text = "recall/first", turns[0].user
    elif len(last.assistant) <= 110:
        name, text = "recall/answer", last.assistant
    else:
        return None
    user, answer = _fill(rng, language, name, {"v": text})
    return Turn(name, language, user, answer, [])


def _remember(rng: Random, language: str, turns: list[Turn]) -> None:
    """Puts into the turns what the user tells of himself, and later the question about it (or the question alone)."""
    topic = pick(rng, TOPICS)
    if rng.random() < 0.2:
        user, answer = _fill(rng, language, f"unknown/{topic}", {"v": ""})
        turns.insert(int(rng.random() * (len(turns) + 1)), Turn(f"unknown/{topic}", language, user, answer, []))
        return
    value = remembered(rng, topic, language)
    slots = {"v": value, "V": value[:1].upper() + value[1:]}
    told = int(rng.random() * len(turns)) if rng.random() < 0.5 else 0
    asked = told + 1 + int(rng.random() * (len(turns) - told + 1))
    for at, name in ((told, f"tell/{topic}"), (asked, f"ask/{topic}")):
        user, answer = _fill(rng, language, name, slots)
        turns.insert(at, Turn(name, language, user, answer, []))


def _conversation(rng: Random) -> Conversation:
    chance = rng.random
    language = pick(rng, _LANGUAGES)
    length = pick(rng, _LENGTHS)
    system, reply = None, None
    if chance() < 0.1:
        system = pick(rng, TABLES[f"system {language}"])[0]
    elif chance() < 0.025:
        row = pick(rng, TABLES["system language"])
        system, reply = row[1 + LANGUAGES.index(language)], row[0]
    turns: list[Turn] = []
    remember = reply is None and chance() < 0.14
    if remember:
        length = min(length, 3)
    while len(turns) < length:
        if turns and chance() < 0.08:
            language = pick(rng, LANGUAGES)
        if turns and not remember and reply is None and chance() < 0.11:
            turn = _recall(rng, language, turns)
            if turn is not None:
                turns.append(turn)
                continue
        turns.append(_any(rng, language, reply))
    if remember:
        _remember(rng, language, turns)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.assistant})
    return Conversation(messages, turns)


def excluded(turns: list[Turn], exclude: frozenset[str]) -> bool:
    """Whether any run of user texts, folded and joined by line breaks, is in `exclude`, folded likewise."""
    folded = [fold(turn.user) for turn in turns]
    runs = (folded[i:j] for i in range(len(folded)) for j in range(i + 1, len(folded) + 1))
    return any("\n".join(run) in exclude for run in runs)


def lessons(seed: int, exclude: frozenset[str] = frozenset()) -> Iterator[Conversation]:
    """The endless stream of conversations, with what each turn teaches. The same seed gives the same stream, less those
    in which the user says one of `exclude`, in any case and punctuation; several turns are joined by line breaks."""
    exclude = frozenset("\n".join(map(fold, text.split("\n"))) for text in exclude)
    rng = Random(seed)
    while True:
        conversation = _conversation(rng)
        if not (exclude and excluded(conversation.turns, exclude)):
            yield conversation


def conversations(seed: int, exclude: frozenset[str] = frozenset()) -> Iterator[list[Message]]:
    """The messages of `lessons`, ready for a chat template."""
    return (conversation.messages for conversation in lessons(seed, exclude))


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts for training a tokenizer: the tables and lessons once, so that no character of theirs is missed, then
    `count` conversations as plain text."""
    cells = (cell for table in TABLES.values() for row in table for cell in row)
    known = [lesson for language in LANGUAGES for lesson in LESSON[language].values()]
    wordings = (re.sub(r"[(|)]|\{\w+\}", " ", pattern.text) for lesson in known for _, pattern in lesson.asks)
    answers = (answer for lesson in known for answer in lesson.answers + lesson.more)
    texts = ("\n".join(message["content"] for message in messages) for messages in islice(conversations(seed), count))
    return chain(cells, wordings, answers, texts)
