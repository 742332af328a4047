"""Sampling and system prompt as controls; the values live in the conversation, the controls only show and set them."""

from collections.abc import Callable
from dataclasses import replace

import ipywidgets

from workbench.errors import RequestError
from workbench.sampling import Sampling

WIDE = {"description_width": "9.5em"}


def _slider(label: str, low: float, high: float, step: float, tip: str) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        description=label, min=low, max=high, step=step, readout_format=".2f", tooltip=tip, style=WIDE,
        continuous_update=False, layout={"width": "auto"},
    )  # fmt: skip


def _number(label: str, low: int, high: int, tip: str) -> ipywidgets.BoundedIntText:
    return ipywidgets.BoundedIntText(
        description=label, min=low, max=high, tooltip=tip, style=WIDE, layout={"width": "auto"}
    )


class Controls(ipywidgets.Accordion):
    """`changed` gets the new Sampling, `told` the new system prompt, `refused` what was wrong with an entry."""

    def __init__(
        self,
        sampling: Sampling,
        system: str,
        changed: Callable[[Sampling], None],
        told: Callable[[str], None],
        refused: Callable[[str], None],
    ) -> None:
        self.fields = {
            "temperature": _slider("temperature", 0, 2, 0.05, "0 always takes the likeliest token"),
            "top_p": _slider("top-p", 0.05, 1, 0.05, "keep the likeliest tokens that together have this probability"),
            "top_k": _number("top-k", 0, 10_000, "keep this many tokens; 0: all"),
            "min_p": _slider("min-p", 0, 1, 0.01, "keep tokens at least this likely, compared with the likeliest"),
            "repetition_penalty": _slider("repetition penalty", 1, 2, 0.05, "above 1: tokens seen before count less"),
            "max_tokens": _number("max tokens", 1, 1_000_000, "a reply ends after this many"),
        }
        self.seed = ipywidgets.Text(
            description="seed", placeholder="new for every reply", tooltip="the same seed gives the same reply",
            continuous_update=False, style=WIDE, layout={"width": "auto"},
        )  # fmt: skip
        self.system = ipywidgets.Textarea(
            value=system, placeholder="What the model is told before the conversation", rows=5,
            continuous_update=False, layout={"width": "auto", "min_height": "8em"},
        )  # fmt: skip
        self._sampling, self._changed, self._refused = sampling, changed, refused
        self._showing = False
        self.show(sampling)
        for name, field in self.fields.items():
            field.observe(lambda change, name=name: self._set(name, change["new"]), "value")
        self.seed.observe(lambda change: self._set("seed", change["new"]), "value")
        self.system.observe(lambda change: told(change["new"]), "value")
        hint = ipywidgets.HTML("<small>Settings count from the next reply on.</small>")
        fields = ipywidgets.VBox([*self.fields.values(), self.seed], layout={"flex": "1 1 320px"})
        prompt = ipywidgets.VBox(
            [ipywidgets.Label("System prompt"), self.system, hint],
            layout={"flex": "1 1 280px", "padding": "0 0 0 16px"},
        )
        columns = ipywidgets.HBox([fields, prompt], layout={"flex_flow": "row wrap"})
        super().__init__([columns], titles=("Sampling and system prompt",), selected_index=None)
        self.add_class("wbc-controls")

    def show(self, sampling: Sampling) -> None:
        """Shows `sampling` without changing it, also where it is beyond what a slider reaches."""
        self._sampling, self._showing = sampling, True
        try:
            for name, field in self.fields.items():
                field.value = getattr(sampling, name)
            self.seed.value = "" if sampling.seed is None else str(sampling.seed)
        finally:
            self._showing = False

    def _set(self, name: str, value: float | str) -> None:
        if self._showing:
            return
        try:
            if name == "seed":
                value = _seed(value)
            self._sampling = replace(self._sampling, **{name: value})
        except RequestError as error:
            self._refused(str(error))
        else:
            self._changed(self._sampling)


def _seed(text: str) -> int | None:
    text = text.strip()
    if not text:
        return None
    if not text.isdecimal():
        raise RequestError(f"the seed must be a whole number, or empty for a new one every time; got {text!r}.")
    return int(text)
