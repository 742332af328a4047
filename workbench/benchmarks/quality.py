"""What a model loses on text when something inside it is stored with less: against itself, token by token.

N texts of L tokens. The texts are the curriculum's, drawn with a seed that no training used: unseen combinations of
what was taught, as in a conversation with pocket, and no test of knowledge.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from workbench.benchmarks.paired import Interval, interval
from workbench.cache import LatentCache
from workbench.errors import RequestError
from workbench.formats import Format, cache_format
from workbench.model import Model
from workbench.tokenizer import Tokenizer
from workbench.train.curriculum import conversations
from workbench.train.loop import rows

SEED = 99_991
FED = 64  # tokens of a pass through the cache
FED_RECENT = 8  # where recent tokens are kept wide: which those are is settled once a pass, after its last token
TOGETHER = 4  # texts of a pass


class Texts(NamedTuple):
    tokens: torch.Tensor  # [N, L] int64
    said: torch.Tensor  # [N, L] bool: written by the assistant, the end of its turn included


class Change(NamedTuple):
    """What changed at every prediction, [N, L - 1] each."""

    nats: torch.Tensor  # negative log-probability of the next token, less that of the reference
    kl: torch.Tensor  # from the reference's distribution to this one, nats
    same: torch.Tensor  # bool: the likeliest token is the reference's


class Summary(NamedTuple):
    """nats, said: change of the mean negative log-probability over all tokens, and over what the assistant says, with
    intervals over texts. perplexity: relative change, exp(nats) - 1, interval likewise. kl: mean and 99th percentile
    over predictions. same: share of predictions whose likeliest token stays."""

    nats: Interval
    perplexity: Interval
    said: Interval
    kl_mean: float
    kl_p99: float
    same: float


def held_out(tokenizer: Tokenizer, count: int, length: int, seed: int = SEED) -> Texts:
    """`count` texts of `length` tokens, each whole conversations one after the other, the last one cut, as in
    training."""
    source = rows(conversations(seed), tokenizer, others=0.0)
    tokens, said = [], []
    for _ in range(count):
        row: list[int] = []
        weight: list[float] = []
        while len(row) < length:
            more, of_more = next(source)
            row += more
            weight += of_more
        tokens.append(row[:length])
        said.append(weight[:length])
    return Texts(torch.tensor(tokens), torch.tensor(said) > 0)


@torch.inference_mode()
def through(model: Model, tokens: torch.Tensor, format: str | Format) -> torch.Tensor:
    """Log-probabilities [B, L, vocab] of a text that is read through a cache of that format, a few tokens a pass.

    A pass appends its rows before it attends, so every token attends to packed rows only, its own among them.
    """
    format = cache_format(format)
    cache = LatentCache(model.config, tokens.shape[0], format, model.device)
    passes = tokens.split(FED_RECENT if format.recent else FED, 1)
    return torch.cat([model(each, cache).log_softmax(-1) for each in passes], 1)


def batches(texts: Texts) -> Iterator[torch.Tensor]:
    """The tokens, a few texts at a time: what is compared is held in full only for these."""
    yield from texts.tokens.split(TOGETHER)


def change(reference: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor) -> Change:
    """Of log-probabilities [B, L, vocab], where `tokens` [B, L] is the text. RequestError where one is not finite."""
    a, b = reference[:, :-1], other[:, :-1]
    if not torch.isfinite(b).all():
        raise RequestError("the logits are not finite: this format breaks the model, and nothing can be compared.")
    following = tokens[:, 1:, None].to(a.device)
    nats = (a - b).gather(-1, following)[..., 0]
    kl = (a.exp() * (a - b)).sum(-1).clamp(min=0)  # rounding may leave a little less than 0
    return Change(nats.cpu(), kl.cpu(), (a.argmax(-1) == b.argmax(-1)).cpu())


def joined(changes: list[Change]) -> Change:
    return Change(*(torch.cat(parts) for parts in zip(*changes, strict=True)))


def summary(texts: Texts, changed: Change) -> Summary:
    said = texts.said[:, 1:]
    weights = said.sum(1)
    of_said = (changed.nats * said).sum(1) / weights.clamp(min=1)
    nats = interval(changed.nats.mean(1).tolist())
    return Summary(
        nats,
        Interval(*torch.tensor(nats).double().expm1().tolist()),
        interval(of_said.tolist(), weights.tolist()),
        float(changed.kl.mean()),
        float(changed.kl.flatten().quantile(0.99)),
        float(changed.same.float().mean()),
    )


def compared(
    texts: Texts, reference: Callable[[torch.Tensor], torch.Tensor], others: dict[str, Callable]
) -> tuple[float, dict[str, Change]]:
    """Nats per token of the reference, and the change under each of the others; all functions of tokens [B, L] to
    log-probabilities. Batch by batch, so that the reference is computed once and never held as a whole."""
    nats, found = [], {name: [] for name in others}
    for tokens in batches(texts):
        base = reference(tokens)
        nats.append(-base[:, :-1].gather(-1, tokens[:, 1:, None].to(base.device)).cpu())
        for name, other in others.items():
            found[name].append(change(base, other(tokens), tokens))
    return float(torch.cat(nats).mean()), {name: joined(parts) for name, parts in found.items()}
