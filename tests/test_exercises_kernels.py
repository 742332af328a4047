"""The check of notebook 15 passes what is right, however it is written, and names each typical mistake."""

import pytest
import torch

from workbench.exercises import check_merge
from workbench.exercises.kernels import PAIRS, Part


def kept(a, b):
    largest = torch.maximum(a.largest, b.largest)
    now = torch.where(largest.isinf(), 0.0, largest)
    return largest, (a.largest - now).exp(), (b.largest - now).exp()


def merge(a, b):
    largest, of_a, of_b = kept(a, b)
    return largest, a.total * of_a + b.total * of_b, a.out * of_a[:, None] + b.out * of_b[:, None]


def by_cases(a, b):
    """Head by head, in Python."""
    rows = []
    for la, ta, oa, lb, tb, ob in zip(*a, *b):
        if lb > la:
            la, ta, oa, lb, tb, ob = lb, tb, ob, la, ta, oa
        scale = 0.0 if lb.isinf() else (lb - la).exp()
        rows.append((la, ta + scale * tb, oa + scale * ob))
    return [torch.stack(column) for column in zip(*rows)]


def single(a, b):
    """In fp32, in which a kernel would."""
    return tuple(x.float() for x in merge(a, b))


@pytest.mark.parametrize("attempt", [merge, by_cases, lambda a, b: merge(b, a), single])
def test_right_parts_are_solved(attempt):
    feedback = check_merge(attempt)
    assert feedback.passed, feedback


def changed(**columns):
    """`merge`, with some of its three columns made by other functions of (a, b, largest, kept of a, kept of b)."""

    def attempt(a, b):
        given = a, b, *kept(a, b)
        return tuple(Part(*merge(a, b))._replace(**{name: make(*given) for name, make in columns.items()}))

    return attempt


def in_place(a, b):
    largest, total, out = merge(a, b)
    a.total.copy_(total)
    return largest, total, out


def unguarded(a, b):
    largest = torch.maximum(a.largest, b.largest)
    of_a, of_b = (a.largest - largest).exp(), (b.largest - largest).exp()
    return largest, a.total * of_a + b.total * of_b, a.out * of_a[:, None] + b.out * of_b[:, None]


def overflowing(a, b):
    largest = torch.maximum(a.largest, b.largest)
    total = (a.total * a.largest.exp() + b.total * b.largest.exp()) / largest.exp()
    return changed(total=lambda *_: total.nan_to_num(nan=torch.inf))(a, b)


def undone_after(a, b):
    largest = torch.maximum(a.largest, b.largest)
    return changed(total=lambda *_: (a.total * a.largest.exp() + b.total * b.largest.exp()) / largest.exp())(a, b)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda a, b: None, "returned nothing"),
        (lambda a, b: a.largest, "three things"),
        (lambda a, b: (1.0, a.total, a.out), "float for largest"),
        (changed(out=lambda a, *_: a.out.T), "shape [7, 5]"),
        (in_place, "in place"),
        (changed(largest=lambda a, b, *_: torch.minimum(a.largest, b.largest)), "the smaller"),
        (changed(largest=lambda a, *_: a.largest), "of a alone"),
        (changed(largest=lambda a, b, *_: b.largest), "of b alone"),
        (changed(largest=lambda a, b, *_: a.largest + b.largest), "their sum"),
        (changed(total=lambda a, b, *_: a.total + b.total), "added as they are, but"),
        (changed(total=lambda a, b, m, of_a, of_b: a.total * of_a + b.total), "b's is not rescaled"),
        (changed(total=lambda a, b, m, of_a, of_b: a.total + b.total * of_b), "a's is not rescaled"),
        (changed(total=lambda a, b, m, of_a, of_b: a.total / of_a + b.total / of_b), "sign in exp"),
        (changed(total=lambda a, b, m, of_a, of_b: a.total * of_b + b.total * of_a), "what the other"),
        (changed(total=lambda a, b, m, of_a, of_b: (a.total + b.total) * of_a * of_b), "rescaled by both"),
        (changed(total=lambda a, *_: a.total * 0 + 0.1), "added up"),
        (changed(out=lambda a, b, *_: a.out + b.out), "has to be done to out"),
        (changed(out=lambda a, b, m, of_a, of_b: a.out * of_a[:, None] + b.out), "b's is not rescaled"),
        (changed(out=lambda a, b, m, of_a, of_b: a.out + b.out * of_b[:, None]), "a's is not rescaled"),
        (lambda a, b: (*merge(a, b)[:2], merge(a, b)[2] / merge(a, b)[1][:, None]), "divide at the end"),
        (overflowing, "infinity"),
        (undone_after, "Subtract before exp"),
        (unguarded, "-inf less -inf"),
    ],
)  # fmt: skip
def test_wrong_parts_are_told_why(attempt, says):
    feedback = check_merge(attempt)
    assert not feedback.passed and says in feedback.text, feedback


def test_what_is_right_already_is_counted():
    assert "Right so far: 5 of 7." in check_merge(unguarded).text


def test_a_merge_that_is_right_for_pairs_only_is_found():
    calls = []

    def forgetful(a, b):
        calls.append(a)
        return merge(a, b) if len(calls) <= len(PAIRS) else a

    assert "one after the other" in check_merge(forgetful).text
