"""Explaining: which body answers each operation of a pass on this machine, and why."""

import pandas as pd
import torch

from workbench.cache import LatentCache
from workbench.door import listening, present
from workbench.model import Model
from workbench.probe import OFF, Probe

COLUMNS = ("operation", "calls", "body", "why")


def explain(model: Model, format: str, new: int = 1, context: int = 64, probe: Probe = OFF) -> pd.DataFrame:
    """One row for each operation and answer in a pass of `new` tokens after `context`, with a cache of that format.

    Columns operation, calls, body ("kernel", "reference", or the file that carries out a whole pass) and why. The pass
    is really carried out, on tokens of no meaning.
    """
    cache = LatentCache(model.config, format=format, device=model.device)
    tokens = torch.zeros(1, context + new, dtype=torch.int64)
    with torch.inference_mode():
        if context:
            model(tokens[:, :context], cache, logits="last")
        begun = probe.begin(model.config, torch.full((1, new), context), model.dtype)
        why = model.explain(cache, begun, new)
        with listening() as heard:
            model(tokens[:, context:], cache, probe, logits="last")
    if why is None and not present(model.norm):
        return pd.DataFrame([("a whole pass", 1, "kernels/fused.c", "nobody looks into it")], columns=COLUMNS)
    rows = [
        (name, calls, "reference" if refused else "kernel", refused or "") for (name, refused), calls in heard.items()
    ]
    rows.insert(0, ("a whole pass", 1, "workbench/lean.py" if why is None else "workbench/model.py", why or ""))
    return pd.DataFrame(rows, columns=COLUMNS)
