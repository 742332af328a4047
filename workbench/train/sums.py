"""Sums and numbers: exercises whose answers are computed, with a fifth of all pairs of numbers kept for the exam."""

from random import Random

from workbench.train.lesson import held_out, pick

_ONES = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
    "dix-sept dix-huit dix-neuf".split(),
}
_TENS = {
    "en": "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "fr": "_ _ vingt trente quarante cinquante soixante".split(),
}
_HAN = "零一二三四五六七八九"


def held_out_sum(a: int, b: int) -> bool:
    """Whether a + b and a - b are kept for the exam; sums of digits never are: they are learnt by heart."""
    return max(a, b) > 10 and held_out(a, b)


def in_words(number: int, language: str) -> str:
    """A number from 0 to 99 spelt out."""
    if language == "zh":
        tens, ones = divmod(number, 10)
        return (("" if tens == 1 else _HAN[tens]) + "十" if tens else "") + (_HAN[ones] if ones or not tens else "")
    small = _ONES[language]
    if number < 20:
        return small[number]
    tens, ones = divmod(number, 10)
    if language == "en":
        return _TENS["en"][tens] + ("-" + small[ones] if ones else "")
    if tens in (7, 9):  # soixante-dix, quatre-vingt-dix: sixty and ten, four twenties and ten
        ones += 10
        tens -= 1
    if tens == 8:
        return "quatre-vingts" if ones == 0 else f"quatre-vingt-{small[ones]}"
    joint = " et " if ones in (1, 11) else "-"
    return _TENS["fr"][tens] + (joint + small[ones] if ones else "")


def sum_pair(rng: Random, held: bool = False) -> tuple[int, int]:
    """Two numbers of at most two digits, kept for the exam (`held`) or never kept for it."""
    while True:
        limit = pick(rng, (11, 21, 100, 100, 100))
        a, b = int(rng.random() * limit), int(rng.random() * limit)
        if held_out_sum(a, b) == held:
            return a, b


def shown(rng: Random, language: str, *numbers: int) -> list[str]:
    spelt = rng.random() < 0.12
    return [in_words(n, language) if spelt else str(n) for n in numbers]


def add(rng: Random, language: str) -> dict:
    x, y = sum_pair(rng)
    a, b = shown(rng, language, x, y)
    return {"a": a, "b": b, "x": x, "y": y, "z": x + y}


def subtract(rng: Random, language: str) -> dict:
    x, y = sum_pair(rng)
    if x < y and rng.random() < 0.97:
        x, y = y, x
    a, b = shown(rng, language, x, y)
    return {"a": a, "b": b, "x": x, "y": y, "z": x - y}


def multiply(rng: Random, language: str) -> dict:
    x, y = int(rng.random() * 11), int(rng.random() * 11)
    a, b = shown(rng, language, x, y)
    return {"a": a, "b": b, "x": x, "y": y, "z": x * y}


def compare(rng: Random, language: str) -> dict:
    while True:
        a, b = int(rng.random() * 100), int(rng.random() * 100)
        if a != b and not held_out("compare", a, b):
            return {"a": a, "b": b, "x": max(a, b), "y": min(a, b)}


def drill(rng: Random, language: str) -> dict:
    asked, solved = [], []
    for _ in range(3 + int(rng.random() * 3)):
        (sign, maker) = ("+", add) if rng.random() < 0.6 else ("-", subtract)
        slots = maker(rng, language)
        asked.append(f"{slots['x']} {sign} {slots['y']}")
        solved.append(f"{len(asked)}. {asked[-1]} = {slots['z']}")
    return {"list": ("、" if language == "zh" else ", ").join(asked), "answers": "\n".join(solved)}


def steps(rng: Random, language: str) -> dict:
    """A sum by ones and tens; none of its parts is kept for the exam either."""
    while True:
        x, y = sum_pair(rng)
        ones, tens = x % 10 + y % 10, x // 10 * 10 + y // 10 * 10
        if not held_out_sum(x // 10 * 10, y // 10 * 10) and not held_out_sum(tens, ones):
            break
    first, second, result, colon = {
        "en": ("Ones", "Tens", "Result", ": "),
        "zh": ("个位", "十位", "结果", "："),
        "fr": ("Unités", "Dizaines", "Résultat", " : "),
    }[language]
    lines = (
        f"1. {first}{colon}{x % 10} + {y % 10} = {ones}",
        f"2. {second}{colon}{x // 10 * 10} + {y // 10 * 10} = {tens}",
        f"3. {result}{colon}{tens} + {ones} = {x + y}",
    )
    return {"a": x, "b": y, "steps": "\n".join(lines)}


def count(rng: Random, language: str) -> dict:
    start, length = int(rng.random() * 40), 3 + int(rng.random() * 10)
    up = range(start, start + length)
    numbers = list(up) if rng.random() < 0.8 else list(reversed(up))
    return {"a": numbers[0], "b": numbers[-1], "list": ("、" if language == "zh" else ", ").join(map(str, numbers))}


def following(rng: Random, language: str) -> dict:
    a = int(rng.random() * 99)
    return {"a": a, "b": a + 1}


def preceding(rng: Random, language: str) -> dict:
    a = 1 + int(rng.random() * 99)
    return {"a": a, "b": a - 1}


def parity(rng: Random, language: str) -> dict:
    a = int(rng.random() * 100)
    return {
        "a": a,
        "parity": {"en": ("even", "odd"), "zh": ("偶数", "奇数"), "fr": ("pair", "impair")}[language][a % 2],
    }


def double(rng: Random, language: str) -> dict:
    while True:
        a = int(rng.random() * 50)
        if not held_out_sum(a, a):
            return {"a": a, "b": 2 * a}


def number_words(rng: Random, language: str) -> dict:
    a = int(rng.random() * 100)
    return {"a": a, "b": in_words(a, language)}
