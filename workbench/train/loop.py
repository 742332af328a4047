"""Training: rows of packed conversations in, a model that answers out. The model code is the one that generates.

B rows per step, L tokens per row.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from workbench.chat import render
from workbench.model import Model
from workbench.recorder import Recorder
from workbench.tokenizer import Tokenizer
from workbench.train.balance import Weights, losses


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, on what. AdamW as in the paper (3.1.2); warm-up, constant, then linear to zero, because a
    short run gains most from its descent."""

    steps: int = 3000
    rows: int = 4
    length: int = 512
    long_rows: int = 1
    long_length: int = 2048
    long_share: float = 0.1  # of the steps, at the end, on long rows: the paper's context stage, 3.1.4
    rate: float = 3e-3
    warm_up: int = 100
    descent: float = 0.4  # of the steps
    decay: float = 0.1
    clip: float = 1.0
    others: float = 0.1  # weight of tokens the assistant did not write
    balance: Weights = Weights()

    def learning_rate(self, step: int) -> float:
        falling = self.steps * self.descent
        return self.rate * min(1.0, (step + 1) / self.warm_up, (self.steps - step) / falling)

    def shape(self, step: int) -> tuple[int, int]:
        long = step >= self.steps * (1 - self.long_share)
        return (self.long_rows, self.long_length) if long else (self.rows, self.length)


class Progress(NamedTuple):
    step: int
    loss: float  # nats per assistant token
    expert: float  # balance losses per layer: 1 is balanced
    device: float
    communication: float
    tokens: int  # so far
    seconds: float  # so far


def rows(
    conversations: Iterable[list[dict]], tokenizer: Tokenizer, others: float
) -> Iterator[tuple[list[int], list[float]]]:
    """Each conversation as tokens and the weight of each token as a target: 1 for what the assistant says."""
    for messages in conversations:
        prompt = render(messages, tokenizer)
        weights = [others] * len(prompt.tokens)
        for span in prompt.spans:
            if span.role == "assistant":
                end = span.end + (span.end < len(prompt.tokens))  # the end of a turn is the assistant's to say
                weights[span.start : end] = [1.0] * (end - span.start)
        yield prompt.tokens, weights


def batches(
    source: Iterator[tuple[list[int], list[float]]], recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and weights [B, L + 1] of every step. Each row starts with a conversation; the last one is cut."""
    for step in range(recipe.steps):
        count, length = recipe.shape(step)
        tokens, weights = [], []
        for _ in range(count):
            row: list[int] = []
            weight: list[float] = []
            while len(row) <= length:
                more, of_more = next(source)
                row += more
                weight += of_more
            tokens.append(row[: length + 1])
            weights.append(weight[: length + 1])
        yield torch.tensor(tokens), torch.tensor(weights)


def train(model: Model, source: Iterator[tuple[list[int], list[float]]], recipe: Recipe) -> Iterator[Progress]:
    """Trains in place, yielding after every step. Matrices decay; norms do not."""
    model.requires_grad_(True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), foreach=True)
    started, seen = perf_counter(), 0
    layers = sum(model.config.is_moe(layer) for layer in range(model.config.num_hidden_layers))
    try:
        for step, (tokens, weights) in enumerate(batches(source, recipe)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            recorder = Recorder("moe.router_probs", "moe.experts")
            logits = model(tokens[:, :-1], probe=recorder)
            targets, weight = tokens[:, 1:].to(logits.device), weights[:, 1:].to(logits.device)
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weight)
            terms = losses(recorder, model.config) if layers else ()
            loss = (nats * weight).sum() / weight.sum()
            for term, strength in zip(terms, recipe.balance, strict=False):
                loss = loss + strength * term
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            seen += targets.numel()
            said = weight == 1
            of_layer = [float(term.detach()) / layers for term in terms] or [math.nan] * 3
            yield Progress(step, float(nats[said].detach().mean()), *of_layer, seen, perf_counter() - started)
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
