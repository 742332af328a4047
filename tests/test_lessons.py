"""What pocket is taught and examined on: right, repeatable, in three languages, and kept apart from each other."""

import re
from collections import Counter
from itertools import islice

import pytest

from workbench.evals.exam import Question, grade, normalise, questions, repeats, texts, wilson
from workbench.train.curriculum import LESSON, conversations, corpus, fold, lessons
from workbench.train.exercises import MAKERS
from workbench.train.lesson import LANGUAGES, held_out, read
from workbench.train.sums import held_out_sum, in_words

SUM = re.compile(r"(?<![\d.])(\d+) ([+\-×]) (\d+) = (-?\d+)(?!\d)")
OPERATE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "×": lambda a, b: a * b}


@pytest.fixture(scope="module")
def exam() -> list[Question]:
    return questions()


@pytest.fixture(scope="module")
def taught() -> list:
    return list(islice(lessons(seed=7, exclude=texts()), 20_000))


# the curriculum ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_conversations():
    first, again, other = (list(islice(conversations(seed), 200)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_users_and_assistants_take_turns_and_nobody_is_silent(taught):
    for conversation in taught:
        roles = [message["role"] for message in conversation.messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in conversation.messages)


def test_no_slot_and_no_wording_sign_is_left_in_what_is_said(taught):
    for conversation in taught:
        for message in conversation.messages:
            assert not re.search(r"\{\w*\}|\([^)]*\||\|\)", message["content"]), message["content"]


def test_conversations_run_from_one_to_several_turns(taught):
    lengths = Counter(len(conversation.turns) for conversation in taught)
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert min(lengths.values()) > 500


def test_four_turns_in_ten_are_english_three_chinese_three_french(taught):
    counts = Counter(turn.language for conversation in taught for turn in conversation.turns)
    total = counts.total()
    for language, share in (("en", 0.4), ("zh", 0.3), ("fr", 0.3)):
        assert abs(counts[language] / total - share) < 0.03


def test_the_subjects_keep_their_shares(taught):
    counts = Counter(turn.subject.split("/")[0] for conversation in taught for turn in conversation.turns)
    total = counts.total()
    explained = sum(counts[subject] for subject in ("moe", "mla", "cache", "tokens", "workbench", "deepseek"))
    assert 0.27 < explained / total < 0.33
    assert 0.15 < counts["arithmetic"] / total < 0.20
    assert counts["outside"] / total > 0.08


def test_every_sum_that_is_taught_is_right(taught):
    found = 0
    for conversation in taught[:2000]:
        for message in conversation.messages:
            for a, sign, b, result in SUM.findall(message["content"]):
                assert OPERATE[sign](int(a), int(b)) == int(result), message["content"]
                found += 1
    assert found > 500


def test_a_sum_in_figures_is_answered_with_its_own_numbers(taught):
    asked = re.compile(r"^(\d+) ?([+\-]) ?(\d+) ?(?:=|=\?|= \?)?$")
    pairs = 0
    for conversation in taught:
        for turn in conversation.turns:
            if (match := asked.match(turn.user)) and turn.subject.startswith("arithmetic"):
                a, sign, b = match.groups()
                assert turn.assistant.startswith(f"{a} {sign} {b} = {OPERATE[sign](int(a), int(b))}")
                pairs += 1
    assert pairs > 100


def test_the_larger_number_is_called_larger(taught):
    checked = 0
    for conversation in taught:
        for turn in conversation.turns:
            if turn.subject == "arithmetic/compare":
                large, small = map(int, re.findall(r"\d+", turn.assistant))
                assert large > small
                checked += 1
    assert checked > 50


def test_a_name_told_is_the_name_remembered(taught):
    remembered = 0
    for conversation in taught:
        told = [turn.assistant for turn in conversation.turns if turn.subject == "tell/name"]
        for turn in conversation.turns:
            if turn.subject == "ask/name":
                name = re.sub(r"^(Your name is |你叫|Tu t'appelles )|[.。]$", "", turn.assistant)
                assert name in told[0]
                remembered += 1
    assert remembered > 100


def test_every_lesson_is_given_in_every_language():
    assert LESSON["en"].keys() == LESSON["fr"].keys()
    assert LESSON["en"].keys() - LESSON["zh"].keys() == {"words/plural"}  # Chinese has no plural
    assert MAKERS.keys() <= LESSON["en"].keys()


def test_answers_are_short():
    for language in LANGUAGES:
        for lesson in LESSON[language].values():
            for answer in lesson.answers + lesson.more:
                words = len(answer) / 2 if language == "zh" else len(answer.split())
                assert words <= 60, (language, lesson.name)


def test_numbers_are_spelt_as_each_language_spells_them():
    assert [in_words(n, "en") for n in (0, 13, 40, 99)] == ["zero", "thirteen", "forty", "ninety-nine"]
    assert [in_words(n, "zh") for n in (0, 10, 15, 20, 73)] == ["零", "十", "十五", "二十", "七十三"]
    french = {
        21: "vingt et un",
        71: "soixante et onze",
        80: "quatre-vingts",
        81: "quatre-vingt-un",
        95: "quatre-vingt-quinze",
    }
    assert {n: in_words(n, "fr") for n in french} == french


def test_the_corpus_shows_every_character_that_is_not_rare(taught):
    seen = set("".join(corpus(seed=0, count=2000)))
    used = Counter(c for conversation in taught for message in conversation.messages for c in message["content"])
    missing = {character: count for character, count in used.items() if count > 20 and character not in seen}
    assert not missing


def test_a_lesson_file_that_does_not_fit_names_the_line(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_text("# moe/what\n? what is it\nan answer without its sign\n", encoding="utf-8")
    with pytest.raises(ValueError, match="bad.txt:3"):
        read(file)
    file.write_text("# moe/what\n? what is (it\n= that\n", encoding="utf-8")
    with pytest.raises(ValueError, match="unbalanced"):
        read(file)


# the exam, and what lies between -----------------------------------------------------------------------------------


def test_no_question_of_the_exam_is_taught(taught, exam):
    asked = {"\n".join(map(fold, question.text.split("\n"))) for question in exam}
    for conversation in taught:
        said = [fold(turn.user) for turn in conversation.turns]
        for start in range(len(said)):
            for end in range(start + 1, len(said) + 1):
                assert "\n".join(said[start:end]) not in asked


def test_what_is_excluded_is_left_out_and_only_that():
    said = next(conversations(5))[-2]["content"]
    kept = list(islice(lessons(5, exclude=frozenset({said.upper()})), 300))
    assert all(fold(turn.user) != fold(said) for conversation in kept for turn in conversation.turns)


def test_pairs_kept_for_the_exam_are_never_added_or_subtracted(taught):
    for conversation in taught:
        for message in conversation.messages:
            for a, sign, b, _ in SUM.findall(message["content"]):
                assert sign == "×" or not held_out_sum(int(a), int(b)), message["content"]


def test_about_a_fifth_of_all_pairs_is_kept_in_either_order():
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)
    assert 0.17 < sum(held_out_sum(a, b) for a, b in pairs) / len(pairs) < 0.23


def test_the_sums_of_the_exam_are_kept_pairs(exam):
    sums = 0
    for question in exam:
        numbers = [int(n) for n in re.findall(r"\d+", question.messages[-1]["content"])]
        if question.kind == "arithmetic" and question.number is not None and len(numbers) == 2:
            a, b = numbers
            if question.number == a * b and question.number not in (a + b, a - b, b - a):
                continue
            assert question.number in (a + b, a - b, b - a) and held_out_sum(a, b), question
            sums += 1
    assert sums == 30


def test_the_exam_asks_the_same_in_three_languages(exam):
    counts = {language: Counter(q.kind for q in exam if q.language == language) for language in LANGUAGES}
    assert counts["en"] == counts["zh"] == counts["fr"]
    assert 200 <= len(exam) <= 300
    assert len({question.text for question in exam}) == len(exam)


RIGHT = [
    ("greeting", "en", "Good morning to you!", "Hello! How can I help you?"),
    ("identity", "zh", "我在和谁说话？", "我是 pocket，一个很小的模型。"),
    ("moe", "fr", "Que signifie top-k pour les experts ?", "Dans DeepSeek-V2, k vaut 6."),
    ("mla", "en", "What is the purpose of YaRN?", "YaRN stretches RoPE so that longer texts can be read."),
    ("cache", "fr", "De quel pourcentage le cache de DeepSeek-V2 est-il plus petit ?", "Il est 93.3 % plus petit."),
    ("cache", "en", "How many numbers does the cache hold for one token?", "34,560 numbers for 60 layers."),
    ("tokens", "zh", "种子一样会怎么样？", "会得到同样的文字。"),
    ("workbench", "en", "How do I make you stop in the middle of an answer?", "Press Stop in the input bar."),
    ("deepseek", "zh", "请问 DeepSeek-V2 总共有多少层？", "DeepSeek-V2 有 ６０ 层。"),
    ("arithmetic", "en", "What is 85 + 69?", "85 + 69 = 154."),
    ("words", "fr", "Après lundi, c'est quel jour ?", "Mardi vient après lundi."),
    ("facts", "en", "Eric has a blue ball. What colour is the ball?", "The ball is blue."),
    ("memory", "zh", "还知道我的名字吗？", "你叫田甜。"),
    ("outside", "fr", "Qui était Léonard de Vinci ?", "On ne m'a pas appris cela."),
]


@pytest.mark.parametrize(("kind", "language", "asked", "answer"), RIGHT, ids=[f"{r[0]}-{r[1]}" for r in RIGHT])
def test_a_right_answer_passes_and_others_fail(exam, kind, language, asked, answer):
    (question,) = (q for q in exam if (q.kind, q.language, q.messages[-1]["content"]) == (kind, language, asked))
    assert question.passed(answer)
    assert question.passed(f"  {answer.upper()} ") and not question.passed("")
    assert not question.passed("The moon is made of cheese, 999 times.")
    assert not question.passed(answer + " and so on" * 60), "rambling"
    assert not question.passed("\n".join([f"Once more: {answer}"] * 3)), "going round in circles"


def test_every_kind_has_a_right_answer_above(exam):
    assert {kind for kind, *_ in RIGHT} == {question.kind for question in exam}


def test_a_longer_number_or_a_later_one_does_not_pass():
    sum_ = Question("arithmetic", "en", ({"role": "user", "content": "85 + 69?"},), number=154)
    assert not sum_.passed("85 + 69 = 1154.") and not sum_.passed("154, no: 155") and not sum_.passed("-154")
    experts = Question("deepseek", "en", sum_.messages, accept=(("6",),))
    assert experts.passed("It chooses 6 experts.")
    assert not experts.passed("There are 160 experts.") and not experts.passed("about 6.5") and not experts.passed("16")


def test_the_other_colour_is_wrong_even_beside_the_right_one(exam):
    (question,) = (q for q in exam if q.messages[-1]["content"].startswith("Kate owns a brown car"))
    assert question.passed("The car is brown.") and not question.passed("The car is red, and brown.")


def test_normalising_folds_what_does_not_matter():
    assert normalise("  Ａ　＝　４２。 ") == normalise("a = 42.")
    assert normalise("102,400") == normalise("102 400") == "102400"
    assert repeats("I am a model. I am a model.") and not repeats("Yes. Yes. I am.")


def test_the_report_counts_by_kind_and_language_with_an_interval(exam):
    report = grade(exam, lambda messages: "Hello! 你好！Bonjour !")
    data = report.to_dict()
    assert data["greeting"]["passed"] == 6 and data["all"]["total"] == len(exam)
    assert data["arithmetic"]["passed"] == 0 and data["arithmetic"]["interval"][0] == 0
    assert "greeting" in str(report) and len(report.failures()) == len(exam) - data["all"]["passed"]


def test_the_interval_is_wilsons():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0, 0) == (0.0, 1.0)
