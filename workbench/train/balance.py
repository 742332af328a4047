"""The three balance losses of DeepSeek-V2 (paper, section 2.2.3), per sequence, read from what a Recorder saw.

B sequences, T tokens, E experts, K chosen, G groups of experts ("devices" in the paper), M groups a token may use.
"""

from typing import NamedTuple

import torch

from workbench.config import Config
from workbench.recorder import Recorder


class Weights(NamedTuple):
    """Strength of each loss; the paper's values for the 236B model."""

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02


def losses(recorder: Recorder, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert, device and communication loss (equations 23-31), each the sum over layers; 1 per layer when balanced.

    Needs the sites "moe.router_probs" and "moe.experts"; the gradient flows through the probabilities only.
    """
    layers = recorder.layers_of("moe.router_probs")
    each = [_of_layer(recorder["moe.router_probs", n], recorder["moe.experts", n], config) for n in layers]
    expert, device, communication = (torch.stack(terms).sum() for terms in zip(*each, strict=True))
    return expert, device, communication


def _of_layer(probs: torch.Tensor, ids: torch.Tensor, config: Config) -> tuple[torch.Tensor, ...]:
    experts, chosen, groups = config.n_routed_experts, config.num_experts_per_tok, config.n_group
    tokens = probs.shape[1]
    mean = probs.mean(1)  # [B, E]: P_i
    used = torch.zeros_like(probs).scatter_(-1, ids, 1.0)  # [B, T, E]
    share = used.sum(1) * (experts / (chosen * tokens))  # [B, E]: f_i
    expert = (share * mean).sum(-1).mean()
    by_group = mean.unflatten(-1, (groups, -1)).sum(-1)  # [B, G]: P'_i and P''_i
    device = (share.unflatten(-1, (groups, -1)).mean(-1) * by_group).sum(-1).mean()
    sent = used.unflatten(-1, (groups, -1)).amax(-1).sum(1) * (groups / (config.topk_group * tokens))  # [B, G]: f''_i
    communication = (sent * by_group).sum(-1).mean()
    return expert, device, communication
