"""Answers that are given, and how an edited model takes them: what each costs, and how far its probabilities move.

N questions, T tokens of the longest one with its answer, A tokens of all answers, V vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import pandas as pd
import torch

from workbench.config import Config
from workbench.editing import Editing
from workbench.edits import Edit, describe
from workbench.errors import RequestError
from workbench.probe import OFF, Probe, both
from workbench.recorder import Recorder


class Reader(Protocol):
    """What is asked of a model."""

    config: Config
    device: torch.device

    def __call__(self, tokens: torch.Tensor, *, probe: Probe) -> torch.Tensor: ...


class Answers:
    """`pairs` of (question, answer), as token ids, are read in one padded batch; nothing is generated.

    An edit of one phase takes the question for "prefill" and the answer for "decode". RequestError for no pairs, or an
    empty question or answer.
    """

    def __init__(self, model: Reader, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        if not pairs or not all(question and answer for question, answer in pairs):
            raise RequestError("give at least one (question, answer), as lists of token ids, none of them empty.")
        self.model = model
        self.questions = [len(question) for question, _ in pairs]
        rows = [[*question, *answer] for question, answer in pairs]
        longest = max(map(len, rows))
        self.tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # [N, T]
        place = torch.arange(longest)[None]
        self.read = place < torch.tensor([len(row) for row in rows])[:, None]  # [N, T], false for the padding
        told = place >= torch.tensor(self.questions)[:, None]
        self.answered = (self.read & told)[:, 1:]  # [N, T - 1]: places whose next token belongs to the answer

    def under(self, edits: Sequence[Edit] = ()) -> pd.DataFrame:
        """A row a question, for the model with these edits.

        nats    surprise of the answer, -ln p, mean over its tokens
        change  nats less those without edits: what the edits cost. Below 0 where they help
        kl      KL(without edits || with them) of the next token, mean over the answer's tokens, in nats
        same    share of its tokens where the likeliest next token stays the same
        exact   whether the likeliest tokens, one after the other, are this very answer

        RequestError for an edit that the model has no place for, or that no token met.
        """
        before, after = self._before, self._logprobs(edits)
        target = self.tokens[:, 1:][self.answered][:, None].to(after.device)
        surprise, was = (-x.gather(1, target)[:, 0] for x in (after, before))
        likeliest, usual = after.argmax(1), before.argmax(1)
        table = pd.DataFrame(
            {
                "nats": surprise.double().cpu(),
                "change": (surprise - was).double().cpu(),
                "kl": (before.exp() * (before - after)).sum(1).clamp(min=0.0).double().cpu(),
                "same": (likeliest == usual).double().cpu(),
                "exact": (likeliest == target[:, 0]).cpu(),
            }
        )
        each = table.groupby(torch.nonzero(self.answered)[:, 0].numpy())
        return each.mean().assign(exact=each["exact"].all()).rename_axis("question")

    def use(self, edits: Sequence[Edit] = ()) -> pd.DataFrame:
        """Layers x experts: the share of all tokens, questions and answers, that each expert reads."""
        recorder = Recorder("moe.experts")
        self._run(edits, recorder)
        experts = range(self.model.config.n_routed_experts)
        shares = {}
        for layer in recorder.layers_of("moe.experts"):
            chosen = recorder["moe.experts", layer].cpu()[self.read]
            counts = torch.bincount(chosen[chosen >= 0], minlength=len(experts))
            shares[layer] = (counts / len(chosen)).tolist()
        table = pd.DataFrame.from_dict(shares, orient="index", columns=pd.RangeIndex(len(experts), name="expert"))
        return table.rename_axis(index="layer")

    @cached_property
    def _before(self) -> torch.Tensor:
        return self._logprobs(())

    def _logprobs(self, edits: Sequence[Edit]) -> torch.Tensor:
        """[A, V] of the next token, where that belongs to an answer."""
        logits = self._run(edits)[:, :-1]
        return logits[self.answered.to(logits.device)].float().log_softmax(-1)

    @torch.inference_mode()
    def _run(self, edits: Sequence[Edit], probe: Probe = OFF) -> torch.Tensor:
        editing = Editing(edits, self.model.config, self.questions, self.model.device) if edits else None
        logits = self.model(self.tokens, probe=both(editing, probe) if editing else probe)
        silent = editing.silent() if editing else []
        if silent:
            raise RequestError(f"no token met {'; '.join(map(describe, silent))}: all texts end before.")
        return logits
