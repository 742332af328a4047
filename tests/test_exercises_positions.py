"""The check of notebook 07 passes what is right, however it is written, and names each typical mistake."""

import pytest
import torch

from workbench.exercises import check_rotate_pairs


def split(x, angles):
    return x[..., 0::2], x[..., 1::2], angles.cos(), angles.sin()


def joined(first, second):
    return torch.stack([first, second], -1).flatten(-2)


def stacked(x, angles):
    first, second, cos, sin = split(x, angles)
    return joined(first * cos - second * sin, first * sin + second * cos)


def written_into(x, angles):
    first, second, cos, sin = split(x, angles)
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = first * cos - second * sin, first * sin + second * cos
    return out


def complex_numbers(x, angles):
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


@pytest.mark.parametrize("attempt", [stacked, written_into, complex_numbers, lambda x, a: stacked(x.float(), a)])
def test_a_right_turn_is_solved_however_it_is_written(attempt):
    feedback = check_rotate_pairs(attempt)
    assert feedback.passed, feedback


def halves(x, angles):
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def rotate_half(x, angles):
    """As in Llama's code."""
    one, two = x.chunk(2, -1)
    angles = torch.cat([angles, angles])
    return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


def in_place(x, angles):
    first, second, cos, sin = split(x, angles)
    x[..., 0::2] = first * cos - second * sin
    x[..., 1::2] = x[..., 0::2] * sin + second * cos
    return x


def one_after_the_other(x, angles):
    first, second, cos, sin = split(x, angles)
    first = first * cos - second * sin
    return joined(first, first * sin + second * cos)


def wrong(make):
    def attempt(x, angles):
        first, second, cos, sin = split(x, angles)
        return joined(*make(first, second, cos, sin))

    return attempt


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda x, a: None, "returned nothing"),
        (lambda x, a: stacked(x, a).tolist(), "A tensor is expected"),
        (halves, "element i with element i + half"),
        (rotate_half, "element i with element i + half"),
        (lambda x, a: torch.cat([stacked(x, a)[..., 0::2], stacked(x, a)[..., 1::2]], -1), "in another layout"),
        (lambda x, a: stacked(x, -a), "the other way round"),
        (wrong(lambda f, s, c, n: (f * c - s * n, s)), "the second element of each pair is as it was"),
        (wrong(lambda f, s, c, n: (f * c - s * n, s * c)), "has lost first * sin"),
        (wrong(lambda f, s, c, n: (f * c - s * n, f * n)), "has lost second * cos"),
        (wrong(lambda f, s, c, n: (f * c - s * n, s * c - f * n)), "has the wrong sign"),
        (wrong(lambda f, s, c, n: (f, f * n + s * c)), "the first element of each pair is as it was"),
        (wrong(lambda f, s, c, n: (f * c, s * n)), "is not a turn"),
        (wrong(lambda f, s, c, n: (f * c, s * c)), "the sine is missing"),
        (wrong(lambda f, s, c, n: (f * n - s * c, f * c + s * n)), "have changed places"),
        (one_after_the_other, "from the turned first one"),
        (in_place, "changed x itself"),
        (lambda x, a: x, "nothing is turned"),
        (lambda x, a: stacked(x, torch.deg2rad(a)), "taken for degrees"),
        (lambda x, a: 2 * stacked(x, a), "the length of the vector changed"),
        (lambda x, a: stacked(x, a.flip(0)), "Try one pair first"),
        (lambda x, a: stacked(x, a).unflatten(-1, (-1, 2)), "flatten the last two"),
        (lambda x, a: torch.view_as_complex(stacked(x, a).unflatten(-1, (-1, 2))), "It is complex"),
        (lambda x, a: stacked(x, a)[..., :2], "that of x is expected"),
    ],
)
def test_a_wrong_turn_is_explained(attempt, says):
    feedback = check_rotate_pairs(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_one_vector_is_not_enough():
    """Right for a single vector, wrong for many."""
    feedback = check_rotate_pairs(lambda x, a: stacked(x, a) if x.dim() == 1 else halves(x, a))
    assert not feedback.passed and "[5, 6]" in feedback.text
