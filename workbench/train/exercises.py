"""Exercises whose answers are computed: sums, words, facts in the prompt. Each maker fills the slots of a lesson's wordings."""

from __future__ import annotations

import zlib
from random import Random

from workbench.train.lesson import LANGUAGES, LESSONS, pick, read_tables

TABLES = read_tables(LESSONS / "words.txt")
NAMES = {language: [row[0] for row in TABLES[f"names {language}"]] for language in LANGUAGES}
LANGUAGE_NAMES = {
    "en": ("English", "Chinese", "French"),
    "zh": ("英语", "中文", "法语"),
    "fr": ("anglais", "chinois", "français"),
}

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


def held_out(*parts: object) -> bool:
    """Whether this combination (in any order) is kept for the exam and never taught. About one in five is."""
    return zlib.crc32(" ".join(sorted(map(str, parts))).encode()) % 5 == 0


def held_out_sum(a: int, b: int) -> bool:
    """Whether the sum and the difference of a and b are kept for the exam; those of digits never are: they are learnt by heart."""
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


def _shown(rng: Random, language: str, *numbers: int) -> list[str]:
    spelt = rng.random() < 0.12
    return [in_words(n, language) if spelt else str(n) for n in numbers]


def add(rng: Random, language: str) -> dict:
    x, y = sum_pair(rng)
    a, b = _shown(rng, language, x, y)
    return {"a": a, "b": b, "x": x, "y": y, "z": x + y}


def subtract(rng: Random, language: str) -> dict:
    x, y = sum_pair(rng)
    if x < y and rng.random() < 0.97:
        x, y = y, x
    a, b = _shown(rng, language, x, y)
    return {"a": a, "b": b, "x": x, "y": y, "z": x - y}


def multiply(rng: Random, language: str) -> dict:
    x, y = int(rng.random() * 11), int(rng.random() * 11)
    a, b = _shown(rng, language, x, y)
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
    x, y = sum_pair(rng)
    ones, tens = x % 10 + y % 10, x // 10 + y // 10
    texts = {
        "en": ("Ones", "Tens", "Result", ": "),
        "zh": ("个位", "十位", "结果", "："),
        "fr": ("Unités", "Dizaines", "Résultat", " : "),
    }[language]
    colon = texts[3]
    return {
        "a": x,
        "b": y,
        "steps": f"1. {texts[0]}{colon}{x % 10} + {y % 10} = {ones}\n2. {texts[1]}{colon}{x // 10 * 10} + {y // 10 * 10} = "
        f"{tens * 10}\n3. {texts[2]}{colon}{tens * 10} + {ones} = {x + y}",
    }


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
    return {"a": a, "parity": {"en": ("even", "odd"), "zh": ("偶数", "奇数"), "fr": ("pair", "impair")}[language][a % 2]}


def double(rng: Random, language: str) -> dict:
    while True:
        a = int(rng.random() * 50)
        if not held_out_sum(a, a):
            return {"a": a, "b": 2 * a}


def number_words(rng: Random, language: str) -> dict:
    a = int(rng.random() * 100)
    return {"a": a, "b": in_words(a, language)}


# words ---------------------------------------------------------------------------------------------------------------

_COLUMN = {"en": 0, "zh": 1, "fr": 2}
_WORDS = [(kind, (en, zh, fr.rsplit(" ", 1)[0]), fr[-1]) for kind, en, zh, fr in TABLES["words"]]
_CLASSES = {row[0]: row[1:] for row in TABLES["categories"]}
_KINDS = {kind: [(words, gender) for k, words, gender in _WORDS if k == kind] for kind in _CLASSES}
_LISTABLE = {
    "animal": ("animals", "动物", "animaux"),
    "fruit": ("fruits", "水果", "fruits"),
    "drink": ("drinks", "饮料", "boissons"),
    "colour": ("colours", "颜色", "couleurs"),
}
_SPELLABLE = {
    language: [w[_COLUMN[language]] for k, w, _ in _WORDS if k not in ("phrase", "action")] for language in ("en", "fr")
}
_SPELLABLE["zh"] = _SPELLABLE["en"]
_REPEATABLE = {language: [w[_COLUMN[language]] for _, w, _ in _WORDS] for language in LANGUAGES}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def a_(noun: str) -> str:
    """The noun with its English indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def translate(rng: Random, language: str) -> dict:
    _, words, _ = pick(rng, _WORDS)
    source = _COLUMN[language] if rng.random() < 0.6 else int(rng.random() * 3)
    target = (source + 1 + int(rng.random() * 2)) % 3
    return {"w": words[source], "t": words[target], "language": LANGUAGE_NAMES[language][target]}


def opposite(rng: Random, language: str) -> dict:
    row = pick(rng, TABLES["opposites"])
    at = 2 * _COLUMN[language]
    pair = row[at : at + 2]
    if rng.random() < 0.5:
        pair = pair[::-1]
    return {"w": pair[0], "t": pair[1]}


def plural(rng: Random, language: str) -> dict:
    w, t = pick(rng, TABLES[f"plurals {language}"])
    return {"w": w, "t": t}


def spelling(rng: Random, language: str) -> dict:
    w = pick(rng, _SPELLABLE[language])
    letters = [letter for letter in w if letter.isalpha()]
    return {"w": w, "t": "-".join(letters), "n": len(letters)}


def _noun(words: tuple[str, ...], gender: str, kind: str, language: str) -> str:
    word = words[_COLUMN[language]]
    if language == "zh":
        return word
    if language == "en":
        return word if kind in ("food", "drink", "colour") else a_(word)
    return f"{'une' if gender == 'f' else 'un'} {word}" if kind not in ("colour",) else f"le {word}"


def kind(rng: Random, language: str) -> dict:
    right = pick(rng, tuple(_KINDS))
    words, gender = pick(rng, _KINDS[right])
    wrong = pick(rng, tuple(_KINDS))
    noun = _noun(words, gender, right, language)
    class_of = {name: row[_COLUMN[language]] for name, row in _CLASSES.items()}
    return {
        "w": words[_COLUMN[language]],
        "aw": noun,
        "Aw": capital(noun),
        "a_right": class_of[right],
        "a_wrong": class_of[wrong],
    }


def listing(rng: Random, language: str) -> dict:
    kind = pick(rng, tuple(_LISTABLE))
    rows = _KINDS[kind]
    start = int(rng.random() * len(rows))
    chosen = [rows[(start + i * 3) % len(rows)][0][_COLUMN[language]] for i in range(3)]
    lines = "\n".join(f"{i}. {word}" for i, word in enumerate(chosen, 1))
    return {"plural": _LISTABLE[kind][_COLUMN[language]], "answers": lines}


def pair_of(table: str):
    """A maker for a table of two cells per language: what is asked about, and what is answered."""
    rows = TABLES[table]

    def maker(rng: Random, language: str) -> dict:
        at = 2 * _COLUMN[language]
        w, t = pick(rng, rows)[at : at + 2]
        return {"w": w, "W": capital(w), "t": t}

    return maker


def calendar(step: int):
    def maker(rng: Random, language: str) -> dict:
        table, units = pick(rng, (("days", ("day", "天", "jour")), ("months", ("month", "个月", "mois"))))
        rows = TABLES[table]
        at = int(rng.random() * len(rows))
        w, t = (rows[i % len(rows)][_COLUMN[language]] for i in (at, at + step))
        return {"unit": units[_COLUMN[language]], "w": w, "t": t, "T": capital(t)}

    return maker


def whole(table: str):
    def maker(rng: Random, language: str) -> dict:
        names = [row[_COLUMN[language]] for row in TABLES[table]]
        return {"answers": ("、" if language == "zh" else ", ").join(names)}

    return maker


def repeat(rng: Random, language: str) -> dict:
    words = [pick(rng, _REPEATABLE[language]) for _ in range(1 + int(rng.random() * 5))]
    return {"w": ("" if language == "zh" else " ").join(words)}


def letter(rng: Random, language: str) -> dict:
    at = ord("A") + int(rng.random() * 25)
    return {"a": chr(at), "b": chr(at + 1)}


# facts in the prompt -------------------------------------------------------------------------------------------------


def _two(rng: Random, choices) -> tuple:
    first = int(rng.random() * len(choices))
    second = (first + 1 + int(rng.random() * (len(choices) - 1))) % len(choices)
    return choices[first], choices[second]


def _kept(rng: Random, make, held: bool = False) -> dict:
    """Draws until the fact asked about, which `make` gives beside its slots, is on the wanted side of the reservation."""
    while True:
        slots, fact = make(rng)
        if held_out(*fact) == held:
            return slots


def _object(rng: Random, language: str, thing: list[str], tint: list[str]) -> tuple[str, ...]:
    """article, noun, colour, and for Chinese the measure word."""
    if language == "en":
        return a_(tint[0]).split()[0], thing[0], tint[0], ""
    if language == "zh":
        return "", thing[2], tint[1], thing[1]
    noun, gender = thing[3].rsplit(" ", 1)
    return ("une", noun, tint[3], "la") if gender == "f" else ("un", noun, tint[2], "le")


def belongings(rng: Random, language: str, coloured: bool = True, held: bool = False) -> dict:
    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        things, tints = _two(rng, TABLES["things"]), _two(rng, TABLES["tints"])
        a, o, c, u = _object(rng, language, things[0], tints[0])
        b, p, d, v = _object(rng, language, things[1], tints[1])
        slots = {"n": n, "m": m, "a": a, "b": b, "o": o, "p": p, "c": c, "d": d, "u": u, "v": v}
        if language == "fr":
            slots |= {"le_o": f"{u} {o}", "Le_o": capital(f"{u} {o}"), "le_p": f"{v} {p}"}
        if language == "en" and not coloured:
            slots |= {"a": a_(o).split()[0], "b": a_(p).split()[0]}
        return slots, (n, c, o)

    return _kept(rng, make, held)


def owners(rng: Random, language: str, held: bool = False) -> dict:
    return belongings(rng, language, coloured=False, held=held)


def places(rng: Random, language: str, held: bool = False) -> dict:
    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        rooms = _two(rng, TABLES["rooms"])
        if language == "fr":
            r, s = (f"{row[3]} {row[2]}" for row in rooms)
        else:
            r, s = (row[_COLUMN[language]] for row in rooms)
        return {"n": n, "m": m, "r": r, "s": s}, (n, r)

    return _kept(rng, make, held)


def counts(rng: Random, language: str, held: bool = False) -> dict:
    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        (o, p) = (row[_COLUMN[language]] for row in _two(rng, TABLES["countables"]))
        k, l = 2 + int(rng.random() * 18), 2 + int(rng.random() * 18)
        k, l = _shown(rng, "zh" if language == "zh" else language, k, l)
        return {"n": n, "m": m, "o": o, "p": p, "k": k, "l": l}, (n, k, o)

    return _kept(rng, make, held)


def ages(rng: Random, language: str, held: bool = False) -> dict:
    """`n` is older than `m`."""

    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        k, l = sorted(_two(rng, range(3, 90)), reverse=True)
        return {"n": n, "m": m, "k": k, "l": l}, (n, k)

    return _kept(rng, make, held)


def likings(rng: Random, language: str, held: bool = False) -> dict:
    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        o, p = (row[_COLUMN[language]] for row in _two(rng, TABLES["tastes"]))
        return {"n": n, "m": m, "o": o, "p": p}, (n, o)

    return _kept(rng, make, held)


# what a user may say of himself, and ask for later --------------------------------------------------------------------

SYLLABLES = ("ba be bo da di do fa fe ka ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se si so ta te "
             "ti to va ve vi za zo").split()


def name(rng: Random, language: str) -> str:
    if rng.random() < 0.25 and language != "zh":
        return capital("".join(pick(rng, SYLLABLES) for _ in range(2 + int(rng.random() * 2))))
    return pick(rng, NAMES[language])


def remembered(rng: Random, topic: str, language: str) -> str:
    """A value that the user tells: a name, colour, city, pet or number."""
    if topic == "name":
        return name(rng, language)
    if topic == "number":
        return str(int(rng.random() * 1000))
    if topic == "colour":
        row = pick(rng, TABLES["tints"])
    else:
        row = pick(rng, TABLES["cities" if topic == "city" else "pets"])
    return row[_COLUMN[language]]


TOPICS = ("name", "name", "name", "colour", "city", "pet", "number")

MAKERS = {
    "arithmetic/add": (add, 90),
    "arithmetic/subtract": (subtract, 70),
    "arithmetic/multiply": (multiply, 25),
    "arithmetic/compare": (compare, 12),
    "arithmetic/drill": (drill, 12),
    "arithmetic/steps": (steps, 6),
    "numbers/count": (count, 8),
    "numbers/next": (following, 5),
    "numbers/before": (preceding, 3),
    "numbers/parity": (parity, 3),
    "numbers/double": (double, 3),
    "numbers/spell": (number_words, 4),
    "numbers/read": (number_words, 4),
    "words/translate": (translate, 90),
    "words/opposite": (opposite, 14),
    "words/plural": (plural, 6),
    "words/spelling": (spelling, 10),
    "words/letters": (spelling, 5),
    "words/kind": (kind, 10),
    "words/list": (listing, 4),
    "words/colour": (pair_of("colours of"), 6),
    "words/ending": (pair_of("endings"), 8),
    "words/sound": (pair_of("sounds"), 3),
    "words/after": (calendar(1), 9),
    "words/before": (calendar(-1), 5),
    "words/days": (whole("days"), 2),
    "words/months": (whole("months"), 2),
    "words/repeat": (repeat, 14),
    "words/letter-after": (letter, 3),
    "facts/colour": (belongings, 10),
    "facts/colours": (belongings, 10),
    "facts/owner": (owners, 7),
    "facts/place": (places, 8),
    "facts/count": (counts, 8),
    "facts/age": (ages, 6),
    "facts/likes": (likings, 8),
    "facts/wholikes": (likings, 6),
    "facts/older": (ages, 4),
}
