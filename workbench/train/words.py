"""Words in three languages: translations, opposites, plurals, spelling, the calendar; from `words.txt`."""

from random import Random

from workbench.train.lesson import LANGUAGES, LESSONS, pick, read_tables

TABLES = read_tables(LESSONS / "words.txt")
LANGUAGE_NAMES = {
    "en": ("English", "Chinese", "French"),
    "zh": ("英语", "中文", "法语"),
    "fr": ("anglais", "chinois", "français"),
}
COLUMN = {"en": 0, "zh": 1, "fr": 2}
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
    language: [w[COLUMN[language]] for k, w, _ in _WORDS if k not in ("phrase", "action")] for language in ("en", "fr")
}
_SPELLABLE["zh"] = _SPELLABLE["en"]
_REPEATABLE = {language: [w[COLUMN[language]] for _, w, _ in _WORDS] for language in LANGUAGES}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def a_(noun: str) -> str:
    """The noun with its English indefinite article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def translate(rng: Random, language: str) -> dict:
    _, words, _ = pick(rng, _WORDS)
    source = COLUMN[language] if rng.random() < 0.6 else int(rng.random() * 3)
    target = (source + 1 + int(rng.random() * 2)) % 3
    return {"w": words[source], "t": words[target], "language": LANGUAGE_NAMES[language][target]}


def opposite(rng: Random, language: str) -> dict:
    row = pick(rng, TABLES["opposites"])
    at = 2 * COLUMN[language]
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
    word = words[COLUMN[language]]
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
    class_of = {name: row[COLUMN[language]] for name, row in _CLASSES.items()}
    return {
        "w": words[COLUMN[language]],
        "aw": noun,
        "Aw": capital(noun),
        "a_right": class_of[right],
        "a_wrong": class_of[wrong],
    }


def listing(rng: Random, language: str) -> dict:
    kind = pick(rng, tuple(_LISTABLE))
    rows = _KINDS[kind]
    start = int(rng.random() * len(rows))
    chosen = [rows[(start + i * 3) % len(rows)][0][COLUMN[language]] for i in range(3)]
    lines = "\n".join(f"{i}. {word}" for i, word in enumerate(chosen, 1))
    return {"plural": _LISTABLE[kind][COLUMN[language]], "answers": lines}


def pair_of(table: str):
    """A maker for a table of two cells per language: what is asked about, and what is answered."""
    rows = TABLES[table]

    def maker(rng: Random, language: str) -> dict:
        at = 2 * COLUMN[language]
        w, t = pick(rng, rows)[at : at + 2]
        return {"w": w, "W": capital(w), "t": t}

    return maker


def calendar(step: int):
    def maker(rng: Random, language: str) -> dict:
        table, units = pick(rng, (("days", ("day", "天", "jour")), ("months", ("month", "个月", "mois"))))
        rows = TABLES[table]
        at = int(rng.random() * len(rows))
        w, t = (rows[i % len(rows)][COLUMN[language]] for i in (at, at + step))
        return {"unit": units[COLUMN[language]], "w": w, "t": t, "T": capital(t)}

    return maker


def whole(table: str):
    def maker(rng: Random, language: str) -> dict:
        names = [row[COLUMN[language]] for row in TABLES[table]]
        return {"answers": ("、" if language == "zh" else ", ").join(names)}

    return maker


def repeat(rng: Random, language: str) -> dict:
    words = [pick(rng, _REPEATABLE[language]) for _ in range(1 + int(rng.random() * 5))]
    return {"w": ("" if language == "zh" else " ").join(words)}


def letter(rng: Random, language: str) -> dict:
    at = ord("A") + int(rng.random() * 25)
    return {"a": chr(at), "b": chr(at + 1)}
