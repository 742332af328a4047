"""Facts: what a prompt or an earlier turn states and a question asks back; a fifth is kept for the exam."""

from random import Random

from workbench.train.lesson import LANGUAGES, held_out, pick
from workbench.train.sums import shown
from workbench.train.words import COLUMN, TABLES, a_, capital

NAMES = {language: [row[0] for row in TABLES[f"names {language}"]] for language in LANGUAGES}
TOPICS = ("name", "name", "name", "colour", "city", "pet", "number")
SYLLABLES = (
    "ba be bo da di do fa fe ka ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se si so ta te ti to va "
    "ve vi za zo"
).split()


def _two(rng: Random, choices) -> tuple:
    first = int(rng.random() * len(choices))
    second = (first + 1 + int(rng.random() * (len(choices) - 1))) % len(choices)
    return choices[first], choices[second]


def _kept(rng: Random, make, held: bool = False) -> dict:
    """Draws until the fact asked about, which `make` gives beside its slots, is kept for the exam or is not."""
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
            r, s = (row[COLUMN[language]] for row in rooms)
        return {"n": n, "m": m, "r": r, "s": s}, (n, r)

    return _kept(rng, make, held)


def counts(rng: Random, language: str, held: bool = False) -> dict:
    def make(rng: Random):
        n, m = _two(rng, NAMES[language])
        (o, p) = (row[COLUMN[language]] for row in _two(rng, TABLES["countables"]))
        k, l = 2 + int(rng.random() * 18), 2 + int(rng.random() * 18)
        k, l = shown(rng, language, k, l)
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
        o, p = (row[COLUMN[language]] for row in _two(rng, TABLES["tastes"]))
        return {"n": n, "m": m, "o": o, "p": p}, (n, o)

    return _kept(rng, make, held)


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
    return row[COLUMN[language]]
