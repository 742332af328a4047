"""Two models on one text, position by position: where they begin to differ, and what it costs."""

import pandas as pd
import torch
from torch import Tensor

from workbench.errors import RequestError


def drift(logits: Tensor, reference: Tensor) -> pd.DataFrame:
    """One row a position of logits [T, V], beside those of the model that is right.

    largest  difference of two logits, absolute
    kl       KL(reference || logits) in nats: what is lost by believing these instead
    same     whether the likeliest token is the same
    """
    if logits.dim() != 2 or logits.shape != reference.shape:
        raise RequestError(f"need [positions, vocabulary] twice, alike; got {logits.shape} and {reference.shape}.")
    logits, reference = (x.detach().cpu().double() for x in (logits, reference))
    here, right = logits.log_softmax(-1), reference.log_softmax(-1)
    columns = {
        "largest": (logits - reference).abs().amax(-1),
        "kl": (right.exp() * (right - here)).sum(-1).clamp(min=0.0),
        "same": logits.argmax(-1) == reference.argmax(-1),
    }
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis("position")


def nats(logits: Tensor, tokens: list[int]) -> pd.Series:
    """Surprise of each token but the first, -ln p, by its position; `logits` [T, V] are of all of them."""
    if logits.dim() != 2 or len(logits) != len(tokens) or len(tokens) < 2:
        raise RequestError(f"need logits of each of two tokens or more; got {tuple(logits.shape)} for {len(tokens)}.")
    chosen = torch.tensor(tokens[1:], device=logits.device)[:, None]
    found = -logits[:-1].double().log_softmax(-1).gather(1, chosen)[:, 0].cpu()
    return pd.Series(found.numpy(), index=pd.RangeIndex(1, len(tokens), name="position"), name="nats")
