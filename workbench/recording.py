"""Recording: the answers to a file of prompts as one trace. What can be refused is refused before anything is run."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from workbench.edits import Edit, from_dict
from workbench.errors import RequestError
from workbench.sampling import Sampling
from workbench.trace import Trace
from workbench.workbench import Workbench

LIVE, SELDOM = 0.2, 10.0  # seconds between two lines of progress: on a terminal, where each replaces the last, and else


class Asked(NamedTuple):
    """One prompt of the file: text to continue, or messages to answer."""

    prompt: str | list[dict]
    label: str | None
    line: int


def read_prompts(path: Path, chat: bool = True, label: str | None = None) -> list[Asked]:
    """What `path` asks, a prompt a line: text, or in a .jsonl file {"prompt": text} or {"messages": [...]}.

    A line of JSON may have a "label", what the person who records says the prompt is (a language, a subject); `label`
    is that of all others. With `chat` a text is a user's message, else it is continued as it stands; messages are
    always answered. Empty lines are passed over. RequestError names the line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text in UTF-8 ({error}).") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    lines = [(number, line.strip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    parse = _parsed if path.suffix == ".jsonl" else lambda line: (line, None)
    asked = []
    for number, line in lines:
        try:
            prompt, own = parse(line)
        except RequestError as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        asked.append(Asked(prompt, label if own is None else own, number))
    if not asked:
        raise RequestError(f"{path} has no prompt: write one a line.")
    missing = [one.line for one in asked if one.label is None]
    if missing and len(missing) < len(asked):
        raise RequestError(f"{path}, line {missing[0]}: no label, and others have one. Add it, or give --label for it.")
    return asked


def _parsed(line: str) -> tuple[str | list[dict], str | None]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise RequestError(f"not JSON ({error}).") from None
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise RequestError('must be {"prompt": ...} or {"messages": [...]}, one of the two, and may have a "label".')
    prompt, label = data.get("prompt", data.get("messages")), data.get("label")
    if "prompt" in data and not (isinstance(prompt, str) and prompt.strip()):
        raise RequestError(f"prompt must be text, and not empty; got {prompt!r}.")
    if "messages" in data and not (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(each, dict) and isinstance(each.get("content"), str) and "role" in each for each in prompt)
    ):
        raise RequestError('messages must be a list of {"role": ..., "content": text}, and not empty.')
    if label is not None and not isinstance(label, str):
        raise RequestError(f"label must be text; got {label!r}.")
    return prompt, label


def read_edits(texts: Sequence[str]) -> list[Edit]:
    """Edits, each written in JSON as `workbench.edits.from_dict` reads it."""
    edits = []
    for text in texts:
        try:
            edits.append(from_dict(json.loads(text)))
        except ValueError as error:
            raise RequestError(f"--edit {text}: not JSON ({error}).") from None
        except RequestError as error:
            raise RequestError(f"--edit {text}: {error}") from None
    return edits


def check_target(path: Path, prompts: Path, force: bool) -> None:
    """RequestError where the trace could not be saved there in the end, or would replace something."""
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}. Make it first, or choose another place.")
    if path.is_dir() or path.exists() and path.samefile(prompts):
        raise RequestError(f"{path} is {'a folder' if path.is_dir() else 'the file of prompts'}: name another --out.")
    if path.exists() and not force:
        raise RequestError(f"{path} is there already: name another --out, or replace it with --force.")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"{path}: nothing may be written in {path.parent}.")


@dataclass(frozen=True)
class Summary:
    """What was recorded. `seconds` are those of reading and answering."""

    path: str
    sequences: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of all tokens, those of the prompts included."""
        return (self.prompt_tokens + self.generated_tokens) / self.seconds

    def to_dict(self) -> dict:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        tokens = self.prompt_tokens + self.generated_tokens
        return (
            f"{self.path}: {self.sequences:,} answers, {tokens:,} tokens ({self.prompt_tokens:,} of prompts and "
            f"{self.generated_tokens:,} generated)\n"
            f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s; {self.bytes:,} bytes, "
            f"{self.bytes / tokens:.0f} a token"
        )


def record(
    bench: Workbench,
    prompts: Path,
    asked: Sequence[Asked],
    out: Path,
    sampling: Sampling,
    *,
    edits: Sequence[Edit] = (),
    scores: bool = False,
    slots: int = 8,
    progress: Callable[[Trace], None] = lambda trace: None,
) -> Summary:
    """Answers all, `slots` at a time, and saves one Trace. Only what goes into it is kept of an answer that has ended.

    RequestError names the line of a prompt that the model cannot be asked; then nothing is run.
    """
    for one in asked:
        try:
            bench.engine.prompt(one.prompt)
        except RequestError as error:
            raise RequestError(f"{prompts}, line {one.line}: {error}") from None
    started = time.perf_counter()
    labels = None if asked[0].label is None else [one.label for one in asked]
    trace = bench.trace(
        [one.prompt for one in asked],
        sampling,
        labels=labels,
        slots=slots,
        edits=edits,
        scores=scores,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    trace.save(out)
    generated = int((trace.tokens["phase"] == "decode").sum())
    return Summary(str(out), len(asked), len(trace) - generated, generated, seconds, out.stat().st_size)


class Progress:
    """Says how far a recording is: on one line that is replaced where it is `live`, else on a line now and then."""

    def __init__(self, total: int, write: Callable[[str], object], live: bool):
        self.total, self.write, self.live = total, write, live
        self.answers = self.tokens = 0
        self._started = self._said = time.monotonic()

    def __call__(self, trace: Trace) -> None:
        self.answers, self.tokens = self.answers + 1, self.tokens + len(trace)
        now = time.monotonic()
        if self.answers < self.total and now - self._said < (LIVE if self.live else SELDOM):
            return
        self._said = now
        speed = self.tokens / max(now - self._started, 1e-9)
        line = f"{self.answers:,} of {self.total:,} answers, {self.tokens:,} tokens, {speed:,.0f} tokens/s"
        if not self.live:
            self.write(line + "\n")
        else:
            self.write(f"\r{line}\x1b[K" + ("\n" if self.answers == self.total else ""))
