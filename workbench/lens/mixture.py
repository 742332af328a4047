"""A feed-forward block in parts: cut up, and with some of its parts left out.

N tokens, D hidden, I width of the block, P parts.
"""

import pandas as pd
import torch
from torch import Tensor

from workbench.blocks import Bank
from workbench.errors import RequestError


def sliced(gate_up: Tensor, down: Tensor, parts: int) -> Bank:
    """A SwiGLU block, gate_up [2 I, D] and down [D, I], as P experts of width I / P, whose sum it is.

    gate_up [P, 2 I / P, D] and down [P, D, I / P], as ops.experts takes them. RequestError unless I can be divided.
    """
    width = down.shape[1]
    if parts < 1 or width % parts:
        raise RequestError(f"a block of width {width} cannot be cut into {parts} equal parts.")
    gate, up = gate_up.chunk(2)
    both = [torch.cat(pair) for pair in zip(gate.chunk(parts), up.chunk(parts), strict=True)]
    return Bank(torch.stack(both), torch.stack(down.chunk(parts, 1)))


def left_out(outputs: Tensor, seed: int = 0) -> pd.DataFrame:
    """How far the sum of some parts is from the sum of all, over the norm of that: a row a number of parts kept.

    outputs [N, P, D]. "best": the parts with the largest outputs, for each token its own; "at random": any, for each
    token anew. Means over tokens.
    """
    whole = outputs.sum(1)
    random = torch.rand(outputs.shape[:2], generator=torch.Generator().manual_seed(seed))
    table = {}
    for name, rank in (("best", outputs.norm(dim=2)), ("at random", random)):
        order = rank.argsort(1, descending=True)[..., None].expand_as(outputs)
        missing = whole[:, None] - outputs.gather(1, order).cumsum(1)
        table[name] = (missing.norm(dim=2) / whole.norm(dim=1, keepdim=True)).mean(0).tolist()
    return pd.DataFrame(table, index=pd.RangeIndex(1, outputs.shape[1] + 1, name="parts kept"))
