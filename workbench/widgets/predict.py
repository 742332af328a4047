"""Predict, then reveal: a guess is written down before the measured answer can be seen."""

from collections.abc import Callable, Sequence
from html import escape
from numbers import Real

import ipywidgets
import pandas as pd

from workbench.errors import RequestError, WorkbenchError

Answer = str | float


class Prediction(ipywidgets.VBox):
    """One question to answer by a guess. Both controls are also methods: `guess(x)`, `reveal()`.

    `options` are the answers to choose from, or (low, high) for a number between the two, both included. `answer` is
    the measured one, or what measures it: called once, at the first reveal, so keep it short. `because` is shown with
    it. A guess may be changed until the reveal.
    """

    def __init__(
        self,
        question: str,
        options: Sequence[str] | tuple[float, float],
        answer: Answer | Callable[[], Answer],
        unit: str = "",
        because: str = "",
    ) -> None:
        self.question, self.options, self.unit, self.because = question, tuple(options), unit, because
        self.guessed: Answer | None = None
        self.measured: Answer | None = None
        self._answer = answer
        self._is_choice = all(isinstance(option, str) for option in self.options)
        self._field = _choice(self.options) if self._is_choice else _number(*self.options, unit)
        self._guess = ipywidgets.Button(description="This is my guess", tooltip="Writes your guess down")
        self._reveal = ipywidgets.Button(description="Reveal", tooltip="Shows what was measured", disabled=True)
        self._said = ipywidgets.HTML()
        self._guess.on_click(lambda _: self._try(lambda: self.guess(self._field.value)))
        self._reveal.on_click(lambda _: self._try(self.reveal))
        buttons = ipywidgets.HBox([self._guess, self._reveal])
        super().__init__([ipywidgets.HTML(f"<b>{escape(question)}</b>"), self._field, buttons, self._said])
        self.layout.padding = "8px"

    def guess(self, guess: Answer) -> None:
        """Writes `guess` down and lets the answer be revealed. RequestError for what is no possible answer."""
        if self.measured is not None:
            raise RequestError("the answer is out, so the guess stays as it was; run the cell again to start over.")
        self.guessed = self._checked(guess)
        self._field.value = self.guessed
        self._reveal.disabled = False
        self._say(f"You guessed <b>{escape(self.shown(self.guessed))}</b>. Reveal it when you are ready.")

    def reveal(self) -> Answer:
        """What was measured, shown beside the guess. RequestError before there is a guess."""
        if self.guessed is None:
            raise RequestError("guess first: choose an answer, or .guess(...) from Python.")
        if self.measured is None:
            self.measured = self._checked(self._answer() if callable(self._answer) else self._answer)
            for control in (self._field, self._guess, self._reveal):
                control.disabled = True
        self._say(self._verdict())
        return self.measured

    def _checked(self, answer: Answer | None) -> Answer:
        if self._is_choice:
            if answer not in self.options:
                raise RequestError(f"choose one of: {', '.join(self.options)}; got {answer!r}.")
            return answer
        low, high = self.options
        if isinstance(answer, bool) or not isinstance(answer, Real) or not low <= answer <= high:
            raise RequestError(f"a number from {low} to {high} is needed; got {answer!r}.")
        return answer

    def _verdict(self) -> str:
        guessed, measured = escape(self.shown(self.guessed)), escape(self.shown(self.measured))
        said = f"You guessed <b>{guessed}</b>. Measured: <b>{measured}</b>"
        if self.guessed == self.measured:
            said += ", as you said."
        elif self._is_choice:
            said += ". A surprise is worth a second look."
        else:
            said += f": off by {escape(f'{abs(self.guessed - self.measured):.3g}')}."
        return said + (f"<br>{escape(self.because)}" if self.because else "")

    def shown(self, answer: Answer | None) -> str:
        """An answer with its unit; nothing for None."""
        if answer is None:
            return ""
        return f"{answer if isinstance(answer, str) else f'{answer:.6g}'} {self.unit}".strip()

    def _say(self, html: str) -> None:
        self._said.value = html

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except WorkbenchError as error:
            self._say(f"<i>{escape(str(error))}</i>")

    def __repr__(self) -> str:
        return f"<Prediction {self.question!r}: guessed {self.guessed!r}, measured {self.measured!r}>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and for where it cannot run the question with its possible answers."""
        if self._is_choice:
            possible = self.options
        else:
            possible = (f"a number from {self.options[0]} to {self.options[1]} {self.unit}".strip(),)
        lines = [f"Predict: {self.question}", *(f"- {option}" for option in possible)]
        items = "".join(f"<li>{escape(option)}</li>" for option in possible)
        html = f"<section><p><b>Predict:</b> {escape(self.question)}</p><ul>{items}</ul>{self._said.value}</section>"
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": "\n".join(lines), "text/html": html}


def predict(
    question: str,
    options: Sequence[str] | tuple[float, float],
    answer: Answer | Callable[[], Answer],
    unit: str = "",
    because: str = "",
) -> Prediction:
    """Asks for a guess before `answer` can be seen; the last expression of a cell shows it. See Prediction."""
    return Prediction(question, options, answer, unit, because)


def scorecard(*predictions: Prediction) -> pd.DataFrame:
    """The questions with guess and measurement, as text; what was not answered or revealed is left empty."""
    rows = [(each.question, each.shown(each.guessed), each.shown(each.measured)) for each in predictions]
    return pd.DataFrame(rows, columns=["question", "guessed", "measured"]).set_index("question")


def _choice(options: Sequence[str]) -> ipywidgets.RadioButtons:
    return ipywidgets.RadioButtons(options=options, value=None, layout={"width": "max-content"})


def _number(low: float, high: float, unit: str) -> ipywidgets.BoundedIntText | ipywidgets.BoundedFloatText:
    whole = isinstance(low, int) and isinstance(high, int)
    field = ipywidgets.BoundedIntText if whole else ipywidgets.BoundedFloatText
    return field(value=low, min=low, max=high, description=unit, layout={"width": "16em"})
