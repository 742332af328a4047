"""What a generation is to its caller: a Stream of steps, or the whole as a Completion."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from workbench.chat import Prompt
from workbench.reply import Stats, Step
from workbench.trace import Trace
from workbench.watching import Watched


@dataclass
class Completion:
    """A whole answer. `tokens` leave out the end mark, which is in `steps`. `watched` holds the sites asked for."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    steps: list[Step]
    stats: Stats
    watched: Watched = field(repr=False)

    @property
    def trace(self) -> Trace:
        """What was seen: every token, and the experts it went to."""
        return self.watched.trace(self.steps)


class Stream:
    """Steps of one generation, to be iterated once. The prompt is read at the first step."""

    def __init__(self, steps: Iterator[Step], prompt: Prompt, watched: Watched):
        self._steps, self.prompt, self.watched = steps, prompt, watched
        self.stats = watched.reply.stats
        self.steps: list[Step] = []  # so far

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Step:
        step = next(self._steps)
        self.steps.append(step)
        return step

    def trace(self) -> Trace:
        """What was seen up to now. Tokens that are not read yet have no routing."""
        return self.watched.trace(self.steps)

    def close(self) -> None:
        """Ends the generation; the cache keeps what was read."""
        self._steps.close()


def completion(steps: list[Step], watched: Watched) -> Completion:
    stats = watched.reply.stats
    tokens = [step.token for step in steps if step.finish != "eos"]
    text = "".join(step.text for step in steps) + stats.tail
    return Completion(stats.prompt_tokens, tokens, text, steps, stats, watched)
