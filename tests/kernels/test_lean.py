"""A whole model on kernels: the same logits, cache, routing as operation by operation, and every kernel is in use."""

import pytest
import torch

from workbench import door
from workbench.cache import LatentCache
from workbench.door import listening
from workbench.editing import Editing
from workbench.edits import Ablate, Bias
from workbench.model import Model
from workbench.probe import both
from workbench.ring import RoutingRing

ALWAYS = {"append", "mla_decode", "route", "experts", "add_norm", "rms_norm"}


@pytest.fixture
def present(monkeypatch):
    """Kernels answer for tensors in main memory too: they are interpreted."""
    for place in ("workbench.door", "workbench.ops", "workbench.lean", "workbench.model"):
        monkeypatch.setattr(f"{place}.present", lambda x: True)
    return monkeypatch


def answers(model, tokens, format, edits):
    """Logits of a prompt and of tokens after it, the counts of who answered, and the routing of all of them."""
    cache, ring = LatentCache.for_model(model.config, len(tokens), format), RoutingRing(model.config)
    ring.to(*[ring.log() for _ in tokens])
    editing = Editing([], model.config, live=True)
    editing.update(edits)
    with torch.inference_mode(), listening() as heard:
        logits = [model(part, cache, both(editing, ring)) for part in tokens.split([10, 1], 1)]
    return torch.cat(logits, 1), heard, [log.rows() for log in ring._logs]


@pytest.mark.parametrize(("name", "format"), [("lite", "fp32"), ("v2", "q6")])
def test_a_model_on_kernels_is_the_model(name, format, model, present):
    model = model(name)
    tokens = torch.randint(model.config.vocab_size, (2, 11))
    edits = [Ablate(1, (0,)), Bias(None, 3, 1.0)]
    assert door.kernel("mla_decode") is not None
    ours, heard, routing = answers(model, tokens, format, edits)
    refused = {kernel: why for kernel, why in heard if why}
    assert (
        "widths" in refused.pop("mla_prefill", "widths") and not refused
    )  # values of the small checkpoints are 12 wide
    assert {kernel for kernel, _ in heard} >= ALWAYS | {"mla_prefill"}
    present.undo()
    present.setattr(Model, "fuse", False)
    theirs, _, expected = answers(model, tokens, format, edits)
    close = (ours - theirs).abs().amax(-1) < (1e-4 if format == "fp32" else 0.05) * theirs.std()
    assert close.float().mean() > 0.9  # a rounded cache, or a near tie of a router, may choose otherwise
    same = [(a.experts == b.experts).all((1, 2)).mean() for a, b in zip(routing, expected, strict=True)]
    assert min(same) > 0.8 and not any((one.experts[:, 0] == 0).any() for one in routing)
