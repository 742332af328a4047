"""A conversation in a terminal: text appears as it is made, and Ctrl-C keeps what is there."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from workbench.errors import WorkbenchError
from workbench.reply import Stats
from workbench.sampling import Sampling
from workbench.workbench import Workbench

HELP = """\
/regenerate      another answer to the last message
/system TEXT     what the model is told first (empty: nothing); starts again
/clear           starts again
/quit            ends; so does Ctrl-D
Ctrl-C           stops the answer and keeps it"""


class Terminal:
    """One conversation. `write` receives pieces of text as they come; lines are read with `read`."""

    def __init__(self, bench: Workbench, sampling: Sampling, system: str = "", *, write: Callable[[str], object]):
        self.bench, self.sampling, self.write = bench, sampling, write
        self.system = system
        self.messages: list[dict] = []

    def send(self, text: str) -> Stats:
        """Asks, writes the answer as it comes, and keeps both."""
        self.messages.append({"role": "user", "content": text})
        return self._answer()

    def regenerate(self) -> Stats | None:
        """Answers the last message again; None where there is none."""
        if not self.messages:
            return None
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self._answer()

    def _answer(self) -> Stats:
        stop = threading.Event()
        opening = [{"role": "system", "content": self.system}] if self.system else []
        try:
            stream = self.bench.engine.stream([*opening, *self.messages], self.sampling, stop=stop)
            text, tokens = [], []
            with _interrupt_sets(stop):
                for step in stream:
                    text.append(step.text)
                    tokens += [] if step.finish == "eos" else [step.token]  # the prompt format closes a turn itself
                    self.write(step.text)
        except WorkbenchError:
            self.messages.pop()  # a question that could not be asked must not be in the way of the next
            raise
        self.messages.append({"role": "assistant", "content": "".join(text), "tokens": tokens})
        return stream.stats

    def run(self, read: Callable[[str], str] = input) -> None:
        """Until /quit or the end of input."""
        self.write(f"{self.bench.name}; /help lists the commands\n")
        while True:
            try:
                line = read("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.write("\n")
                return
            if line == "/quit":
                return
            if line:
                self._obey(line)

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        stats = None
        try:
            if word == "/regenerate":
                stats = self.regenerate()
            elif word in ("/system", "/clear"):
                self.system = rest.strip() if word == "/system" else self.system
                self.messages.clear()
            elif word.startswith("/"):
                self.write(HELP + "\n")
            else:
                stats = self.send(line)
        except WorkbenchError as error:
            self.write(f"{error}\n")
        if stats:
            self.write(f"\n[{stats.finish}, {stats.tokens} tokens, {stats.tokens_per_second:.0f} tokens/s]\n")


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C asks for a stop between tokens instead of tearing a forward pass, and the cache, in two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def once(bench: Workbench, prompt: str, sampling: Sampling, system: str, write: Callable[[str], object]) -> dict:
    """One question, one answer; what happened, ready for JSON."""
    terminal = Terminal(bench, sampling, system, write=write)
    stats = terminal.send(prompt)
    return {
        "model": bench.name,
        "prompt": prompt,
        "text": terminal.messages[-1]["content"],
        "tokens": terminal.messages[-1]["tokens"],
        "finish": stats.finish,
        "prompt_tokens": stats.prompt_tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "sampling": asdict(sampling) | {"seed": stats.seed},
    }
