"""The check of notebook 09 passes what is right, however it is written, and names each typical mistake."""

import pytest
import torch

from workbench.exercises import check_zero_head


def on_a_copy(z, head):
    z = z.clone()
    z[:, :, head] = 0
    return z


def by_a_mask(z, head):
    return z * (torch.arange(z.shape[2]) != head)[:, None]


def by_index(z, head):
    return z.index_fill(2, torch.tensor(head), 0)


@pytest.mark.parametrize("attempt", [on_a_copy, by_a_mask, by_index])
def test_what_is_right_is_solved(attempt):
    feedback = check_zero_head(attempt)
    assert feedback.passed and "Scale" in feedback.text


def in_place(z, head):
    z[:, :, head] = 0
    return z


def in_place_and_silent(z, head):
    z[:, :, head] = 0


def zeroed(*axes):
    """An attempt that writes 0 at z[axes], "head" standing for the head."""

    def attempt(z, head):
        z = z.clone()
        z[tuple(head if axis == "head" else axis for axis in axes)] = 0
        return z

    return attempt


every = slice(None)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda z, head: None, "returned nothing. Return"),
        (lambda z, head: ..., "returned nothing. Return"),
        (in_place_and_silent, "It wrote into z instead"),
        (in_place, "z itself was changed. A recorder"),
        (lambda z, head: z.tolist(), "A tensor is expected"),
        (lambda z, head: z[:, :, [n for n in range(4) if n != head]], "The head was taken out"),
        (lambda z, head: z[:, :, head], "That is one head alone"),
        (lambda z, head: on_a_copy(z, head).flatten(2), "an axis of their own"),
        (lambda z, head: on_a_copy(z, head).transpose(2, 3), "in another order"),
        (lambda z, head: on_a_copy(z, head).sum(), "that of z is expected"),
        (lambda z, head: z, "came back as it was"),
        (lambda z, head: z * 0, "only one should be"),
        (lambda z, head: z - on_a_copy(z, head), "the other way round"),
        (zeroed("head"), "row 1 of the batch is 0"),
        (zeroed(every, "head"), "token 1 is 0, with all its heads"),
        (zeroed(every, every, every, "head"), "number 1 of every head is 0"),
        (zeroed(every, -1, "head"), "only the last token"),
        (zeroed(0, every, "head"), "only the first row"),
        (lambda z, head: on_a_copy(z, head - 1), "head 0 is 0 in its place"),
        (lambda z, head: on_a_copy(z, 1), "head 1 is 0 in its place. Use `head`, counted from 0. (It was right"),
        (lambda z, head: on_a_copy(z, head) * 2, "the other heads have changed too"),
        (lambda z, head: on_a_copy(z, head) + 1e-3 * (z - on_a_copy(z, head)), "head 1 is not 0 everywhere"),
        (lambda z, head: on_a_copy(z, head).double(), "torch.float32 is expected"),
    ],
)
def test_a_mistake_is_named(attempt, says):
    feedback = check_zero_head(attempt)
    assert not feedback.passed and says in feedback.text, feedback
