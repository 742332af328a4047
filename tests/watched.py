"""What is said to pocket by several tests, the edits it is said under, and when two answers are the same."""

import numpy as np
import pytest

from workbench.edits import Ablate, Add, Bias, Force, Scale, TopK
from workbench.engine import Completion
from workbench.sampling import Sampling

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
PROMPTS = ["The cat sat on", HELLO, "One, two, three, four, five, six, seven, eight,", "北京是"]
GREEDY = Sampling(temperature=0, max_tokens=10)
EDITS = {
    "ablate": [Ablate(None, (1, 5, 9))],
    "wide": [TopK(1, 8), TopK(2, 1)],
    "decode": [Force(1, (3, 30), 0.5, phase="decode"), Bias(2, 4, 4.0, phase="decode")],
    "prefill": [Scale("attn.v", 0, 2, index=1, phase="prefill"), TopK(3, 7, phase="prefill")],
    "positions": [Add("resid.mid", 0.3, 3, positions=(2, 12)), Scale("attn.k_content", 0.1, 1, positions=(1, 3))],
}


def logprobs(completion: Completion) -> list[float]:
    return [step.choice.logprob for step in completion.steps]


def same(a: Completion, b: Completion) -> bool:
    """Tokens, what the model thought of them, and where every token went."""
    assert a.tokens == b.tokens and a.stats.finish == b.stats.finish
    assert logprobs(a) == pytest.approx(logprobs(b), abs=1e-4)
    one, other = a.trace, b.trace
    assert one.layers == other.layers and np.array_equal(one.experts, other.experts)
    for name in ("gates", "margins"):
        assert np.allclose(getattr(one, name), getattr(other, name), rtol=2e-3, atol=1e-4, equal_nan=True)
    told = ["sequence", "position", "id", "text", "phase"]
    assert one.tokens[told].equals(other.tokens[told])
    return True
