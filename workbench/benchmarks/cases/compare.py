"""How far a kernel may be from the truth."""

import torch


def close(made: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, allowed: float = 2.0) -> None:
    """AssertionError unless `made` is at most `allowed` times as far from `truth` (float64) as `reference` is.

    By the root mean square, and for the worst element by four times more; a reference that is exact allows one rounding
    of its type. NaN and infinity are never close.
    """
    assert made.shape == reference.shape, f"{tuple(made.shape)} where the reference gives {tuple(reference.shape)}"
    assert made.dtype == reference.dtype, f"{made.dtype} where the reference gives {reference.dtype}"
    assert bool(made.isfinite().all()), "not finite: something was left unwritten"
    ours, theirs = made.double() - truth, reference.double() - truth
    size = truth.square().mean().sqrt().item()
    step = torch.finfo(made.dtype).eps * size
    mean = ours.square().mean().sqrt().item()
    assert mean <= allowed * theirs.square().mean().sqrt().item() + step, (
        f"root mean square error {mean:.3g}, of the reference {theirs.square().mean().sqrt().item():.3g}"
    )
    worst = ours.abs().max().item()
    most = 4 * allowed * theirs.abs().max().item() + 8 * torch.finfo(made.dtype).eps * truth.abs().max().item()
    assert worst <= most, f"largest error {worst:.3g}, of the reference {theirs.abs().max().item():.3g}"
