"""Exercises about a model larger than its memory: what a packed matrix takes, and how many hits a speed needs."""

from collections.abc import Callable
from math import isclose
from numbers import Integral, Real

from workbench.exercises.feedback import Feedback
from workbench.recipe import WEIGHT_FORMATS

GROUP = WEIGHT_FORMATS["int4"].group
# V2's two shapes, one that is all whole, then one thing to round at a time: the last group, the last code, both
MATRICES = ((1536, 5120), (5120, 1536), (3, 128), (4, 96), (5, 65), (7, 1))


def check_packed_bytes(packed_bytes: Callable[[int, int], int]) -> Feedback:
    """For `packed_bytes(rows, width)`: bytes of a matrix [rows, width] in int4, every scale included."""
    for done, (rows, width) in enumerate(MATRICES):
        answer, call = packed_bytes(rows, width), f"packed_bytes({rows}, {width})"
        if wrong := _no_number(answer, Integral, "Bytes come in whole numbers: `-(-a // b)` divides and rounds up."):
            return Feedback(False, f"{call} {wrong}")
        right = rows * sum(dtype.itemsize * size for dtype, size in WEIGHT_FORMATS["int4"].layout(width))
        if answer != right:
            said = f"{call} returned {answer:,}; the matrix takes {right:,}"
            return Feedback(False, f"{said}: {_mispacked(int(answer), rows, width)}.{_so_far(done, len(MATRICES))}")
    return Feedback(True, f"All {len(MATRICES)} are right. Files and slots hold the same: `Groups` in codec.py.")


def _mispacked(answer: int, rows: int, width: int) -> str:
    codes, groups = -(-width // 2), -(-width // GROUP)
    right = codes + groups + 2
    causes = (
        (rows * codes, "these are the codes; the scales are missing"),
        (rows * (codes + groups), "the scale of 2 bytes is missing, one for each row"),
        (rows * (codes + 2), f"the scales of the groups are missing, a byte for every {GROUP} weights of a row"),
        (right, "that is one row"),
        (rows * (codes + groups) + 2, "every row has its scale of 2 bytes"),
        (rows * (codes + 2 * groups), "a group's scale has one byte, and the 2 bytes are there once for each row"),
        (rows * (codes + 3 * groups), "the 2 bytes are there once for each row, not for each group"),
        (rows * (codes + 2 * groups + 2), "the scale of a group has one byte"),
        (rows * (width // 2 + groups + 2), "a row of codes fills whole bytes in the end: round up"),
        (rows * (codes + width // GROUP + 2), "a last group that is not full has a scale as well: round up"),
        (rows * (width // 2 + width // GROUP + 2), "round up twice: the codes, and the groups"),
        (-(-rows * width // 2) + rows * (groups + 2), "each row is packed by itself, and fills whole bytes"),
        (-(-rows * width // 2) + -(-rows * width // GROUP) + 2 * rows, "groups end with their row; none goes on into "
         "the next"),
        (rows * (width + groups + 2), "that gives each code a byte of its own; two share one"),
        (2 * rows * width, "that is the matrix in bf16"),
        (8 * rows * right, "those are bits"),
    )  # fmt: skip
    of_a_row = f"a row has {codes:,} bytes of codes, {groups} of group scales, and 2"
    return next((cause for wrong, cause in causes if wrong == answer), of_a_row)


# tokens a second, bytes of experts a token, bytes a second
SPEEDS = ((10, 4e9, 30e9), (60, 4.3e9, 63e9), (2, 4e9, 7.9e9), (5, 4e9, 20e9), (1, 4e9, 20e9), (1000, 4e9, 63e9))


def check_hits_needed(hits_needed: Callable[[float, float, float], float]) -> Feedback:
    """For `hits_needed(tokens_per_second, nbytes, bandwidth)`: the least hit rate, 0 to 1, at which the link allows it.

    nbytes: of the experts of a token, hits included; bandwidth: bytes a second that the misses may come at.
    """
    for done, (speed, nbytes, bandwidth) in enumerate(SPEEDS):
        answer = hits_needed(speed, nbytes, bandwidth)
        call = f"hits_needed({speed}, {nbytes:g}, {bandwidth:g})"
        if wrong := _no_number(answer, Real, "A share from 0 to 1 is expected."):
            return Feedback(False, f"{call} {wrong}")
        right = max(0.0, 1 - bandwidth / (speed * nbytes))
        if not isclose(answer, right, rel_tol=1e-6, abs_tol=1e-9):
            said = f"{call} returned {answer:.4g}; {right:.4g} is needed"
            cause = _mislimited(float(answer), speed * nbytes / bandwidth)
            return Feedback(False, f"{said}: {cause}.{_so_far(done, len(SPEEDS))}")
    return Feedback(
        True, f"All {len(SPEEDS)} are right. `speed_limit` in lens/capacity.py says the same the other way."
    )


def _mislimited(answer: float, wanted: float) -> str:
    """`wanted`: bytes a second that would be needed without a hit, over those there are."""
    if wanted <= 1 and isclose(answer, 1 - 1 / wanted, rel_tol=1e-6, abs_tol=1e-9):
        return "the link brings everything in time, so no hit is needed: never less than 0"
    causes = (
        (1 / wanted, "that is the share that may miss; the rest must hit"),
        (wanted, "that is how often the link would have to be there; the share that may miss is one over that"),
        (100 * (1 - 1 / wanted), "that is in percent; a share from 0 to 1 is expected"),
        (1 - wanted, "the fraction is upside down: what may miss is what the link brings, over what a second needs"),
        (wanted - 1, "what may miss is what the link brings, over what a second needs; the rest must hit"),
        (0.0, "the link does not bring everything in time, so some must hit"),
        (1.0, "some may miss: what the link brings in a second, over what a second needs"),
    )
    near = (cause for wrong, cause in causes if isclose(answer, wrong, rel_tol=1e-6, abs_tol=1e-9))
    return next(near, "bandwidth = tokens a second x (1 - hit rate) x bytes; solve it for the hit rate")


def _no_number(answer: object, kind: type, wanted: str) -> str:
    """What is wrong with an answer that should be a number; nothing if it is one."""
    if answer is None or answer is ...:
        return "returned nothing. End the function with `return`, and a number."
    if isinstance(answer, bool) or not isinstance(answer, kind):
        return f"returned {answer!r}. {wanted}"
    return ""


def _so_far(done: int, of: int) -> str:
    return f" Right so far: {done} of {of}." if done else ""
