"""What a check says of an attempt."""

from typing import NamedTuple


class Feedback(NamedTuple):
    """Whether the exercise is solved, and one thing to do next."""

    passed: bool
    text: str

    def __repr__(self) -> str:
        return f"{'Solved' if self.passed else 'Not yet'}. {self.text}"
