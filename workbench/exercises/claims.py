"""An exercise about claims: whether a measurement supports a number as it is printed."""

from collections.abc import Callable
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from typing import NamedTuple

from workbench.exercises.feedback import Feedback


class Case(NamedTuple):
    claim: str
    measured: float
    what: str


SUPPORTS = (
    Case("93.3", 93.277, "the latent in 6 bits against DeepSeek-67B, in percent"),
    Case("93.3", 93.03, "the same with a rotary key of 8 bits"),
    Case("93.3", 93.34, "exactly 6 bits, without scales"),
    Case("93.3", 93.36, "a little less than 6 bits: more than was claimed, and not what was claimed"),
    Case("236", 235.741, "parameters of V2, in billions"),
    Case("236", 236.7, "another model: 236.7 would be printed as 237"),
    Case("5.76", 5.764, "two bars of the paper's figure, measured"),
    Case("5.76", 5.749, "two bars a little closer"),
    Case("16", 471.5, "the weights of V2 in bf16, against the gigabytes of a video card"),
    Case("80.0", 80.04, "a claim that prints a zero means it"),
    Case("80.0", 80.4, "a claim that prints a zero means it"),
)


def check_supports(supports: Callable[[str, float], bool]) -> Feedback:
    """For `supports(claim, measured)`: whether `measured`, printed with as many decimals as `claim`, is `claim`."""
    for done, case in enumerate(SUPPORTS):
        answer = supports(case.claim, case.measured)
        call = f'supports("{case.claim}", {case.measured})'
        if answer is None or answer is ...:
            return Feedback(False, f"{call} returned nothing. End the function with `return`, and True or False.")
        if not isinstance(answer, bool):
            return Feedback(False, f"{call} returned {answer!r}. True or False is expected.")
        if answer != _supported(case):
            so_far = f" Right so far: {done} of {len(SUPPORTS)} cases." if done else ""
            return Feedback(False, f"{call} ({case.what}) is {not answer}: {_why(case)}.{so_far}")
    return Feedback(True, f"All {len(SUPPORTS)} cases are right. A claim is as exact as the digits that it prints.")


def _printed(case: Case, rounding: str) -> str:
    return str(Decimal(str(case.measured)).quantize(Decimal(case.claim), rounding))


def _supported(case: Case) -> bool:
    return _printed(case, ROUND_HALF_EVEN) == case.claim


def _why(case: Case) -> str:
    printed, cut = _printed(case, ROUND_HALF_EVEN), _printed(case, ROUND_DOWN)
    places = len(case.claim.partition(".")[2])
    digits = f"{places} decimal{'' if places == 1 else 's'}"
    if printed != case.claim:
        near = f". Cut off instead of rounded it would be {cut}" if cut == case.claim else ""
        return f"with {digits} it prints as {printed}{near}"
    return f"with {digits} it prints as {printed}, and more digits were not claimed"
