"""Rotary positions with YaRN (arXiv 2309.00071; DeepSeek-V2 section 3.1.4), on interleaved pairs as in the checkpoints.

R rotary width, T tokens, P positions.
"""

import math

import torch

from workbench.config import Config, Yarn


def mscale(factor: float, strength: float) -> float:
    """Growth of the attention logits' temperature with the extension factor: 0.1 m ln s + 1."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def softmax_scale(config: Config) -> float:
    """qk_head_dim^-1/2, times mscale_all_dim's square when YaRN is on: at every length, short prompts included."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def frequencies(config: Config) -> torch.Tensor:
    """Radians per position of each pair, [R/2] float32. YaRN keeps the fast pairs and slows the rest by its factor."""
    width = config.qk_rope_head_dim
    fast = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    yarn = config.rope_scaling
    if yarn is None:
        return fast
    low, high = _corrected_pairs(yarn, config.rope_theta, width)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return fast / yarn.factor * ramp + fast * (1 - ramp)


def _corrected_pairs(yarn: Yarn, theta: float, width: int) -> tuple[float, float]:
    def pair(rotations: float) -> float:
        return (
            width * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001


class Rope:
    """The table of rotations for every position of the context, fp32 whatever the model computes in."""

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies(config))
        yarn = config.rope_scaling
        size = 1.0 if yarn is None else mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
        self.table = torch.polar(torch.full_like(angles, size), angles).to(device)  # [P, R/2] complex

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations of these positions: [..., R/2] complex."""
        return self.table[positions]


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of x [..., R] by rotations (broadcast over [..., R/2]); computed in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)
