"""A guess comes before the answer, both are kept, and nothing in a question can become markup."""

import pytest

from workbench.errors import RequestError
from workbench.widgets.predict import predict, scorecard


def controls(prediction):
    """The field, "This is my guess", "Reveal", and what is said below them, as a reader finds them."""
    _, field, buttons, said = prediction.children
    return field, *buttons.children, said


@pytest.fixture
def count():
    return predict("How many tokens?", (0, 20), lambda: 9, "tokens", because="Digits stand alone.")


@pytest.fixture
def choice():
    return predict("Same seed: same text?", ["yes", "no"], "yes")


def test_the_answer_waits_for_a_guess(count):
    _, _, reveal, _ = controls(count)
    assert reveal.disabled
    with pytest.raises(RequestError, match="guess first"):
        count.reveal()
    count.guess(12)
    assert not reveal.disabled and count.reveal() == 9


def test_guess_and_measurement_stand_side_by_side(count):
    count.guess(12)
    count.reveal()
    said = controls(count)[-1].value
    assert "12 tokens" in said and "9 tokens" in said and "off by 3" in said and "Digits stand alone." in said


def test_the_buttons_do_what_the_methods_do(choice):
    field, guess, reveal, said = controls(choice)
    field.value = "no"
    guess.click()
    assert choice.guessed == "no" and "yes" not in said.value
    reveal.click()
    assert choice.measured == "yes" and all(control.disabled for control in (field, guess, reveal))


def test_a_press_without_a_choice_says_what_is_missing(choice):
    _, guess, reveal, said = controls(choice)
    guess.click()
    assert choice.guessed is None and reveal.disabled and "choose one of: yes, no" in said.value


def test_a_guess_may_change_until_the_answer_is_out(choice):
    choice.guess("no")
    choice.guess("yes")
    choice.reveal()
    with pytest.raises(RequestError, match="the answer is out"):
        choice.guess("no")
    assert choice.guessed == "yes" and "as you said" in controls(choice)[-1].value


def test_the_answer_is_measured_once_and_not_before_it_is_asked_for():
    measured = []
    prediction = predict("?", (0, 5), lambda: measured.append(1) or len(measured))
    prediction.guess(2)
    assert measured == []
    assert prediction.reveal() == prediction.reveal() == 1


@pytest.mark.parametrize("guess", [21, -1, "9", None, True])
def test_an_impossible_number_is_refused(count, guess):
    with pytest.raises(RequestError, match="a number from 0 to 20"):
        count.guess(guess)
    assert count.guessed is None


def test_an_impossible_choice_is_refused(choice):
    with pytest.raises(RequestError, match="choose one of: yes, no; got 'maybe'"):
        choice.guess("maybe")


def test_what_is_shown_is_escaped():
    prediction = predict("<img src=x>", ["<b>", "&"], "<b>", because="<script>")
    prediction.guess("&")
    prediction.reveal()
    shown = [child.value for child in (prediction.children[0], prediction.children[-1])]
    shown.append(prediction._repr_mimebundle_()["text/html"])
    for html in shown:
        assert "<img" not in html and "<script" not in html
    assert "&lt;b&gt;" in shown[1]


def test_a_saved_notebook_shows_the_question(count, choice):
    page = count._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in page
    assert "How many tokens?" in page["text/html"] and "from 0 to 20 tokens" in page["text/plain"]
    assert "9" not in page["text/html"], "the answer is not given away"
    assert "<li>yes</li><li>no</li>" in choice._repr_mimebundle_()["text/html"]


def test_the_scorecard_has_what_was_answered(count, choice):
    count.guess(12)
    count.reveal()
    card = scorecard(count, choice)
    assert card.loc["How many tokens?"].tolist() == ["12 tokens", "9 tokens"]
    assert card.loc["Same seed: same text?"].tolist() == ["", ""]
