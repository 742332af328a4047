"""The cache formats: bytes of a token beside what they cost in quality, all on one model and in one run.

Whatever is compared was computed through a cache of the format, packed rows included; the reference is the same model
with the cache in its own precision.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

from workbench.benchmarks import needle, quality
from workbench.benchmarks.measure import DTYPES, about, checkpoint_of, computing_with, load_average
from workbench.benchmarks.paired import interval
from workbench.benchmarks.report import Examined, Held, Measured, Recalled, Result
from workbench.benchmarks.rivals import CACHE
from workbench.cache import BLOCK, LatentCache
from workbench.config import Config
from workbench.engine import Engine
from workbench.errors import RequestError
from workbench.evals.exam import Marked, examine, questions
from workbench.formats import CACHE_FORMATS, Format, Row, cache_format
from workbench.model import Model
from workbench.workbench import Workbench, load

FORMATS = (*CACHE_FORMATS, "q6+128")
STEPS = 16  # tokens of one decode measurement


class Size(NamedTuple):
    """How much is measured. `every`: of the exam, each question whose number it divides; 0 leaves it out."""

    texts: int = 32
    length: int = 1024  # tokens of a text
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)  # of a haystack, as far as the context reaches
    needles: int = 5  # of each length and depth
    every: int = 1
    contexts: tuple[int, ...] = (64, 1024)  # tokens in the cache while decoding
    rounds: int = 9


FULL = Size()
QUICK = Size(texts=4, length=256, lengths=(128, 512), needles=2, every=12, contexts=(64, 512), rounds=3)


def measure(
    checkpoint: Path | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    dtype: str = "float32",
    threads: int | None = None,
    rounds: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Result:
    """Every format on `checkpoint` or pocket, in the size FULL or QUICK. `progress` is told what begins.

    RequestError for an unknown format, or one that is named twice.
    """
    size = QUICK if quick else FULL
    size = size if rounds is None else size._replace(rounds=rounds)
    if size.rounds < 1:
        raise RequestError("rounds and threads must be at least 1.")
    chosen = [cache_format(name) for name in formats]
    if len({format.name for format in chosen}) < len(chosen) or not chosen:
        raise RequestError(f"formats are named once each, and at least one; got {', '.join(formats) or 'none'}.")
    average = load_average()
    with computing_with(threads), checkpoint_of(checkpoint, None) as path, torch.inference_mode():
        bench = load(str(path), dtype=str(DTYPES[dtype]).removeprefix("torch."))
        reference = cache_format(CACHE[bench.model.dtype])
        length = min(size.length, bench.context)
        progress("texts")
        texts = quality.held_out(bench.tokenizer, size.texts, length)
        through = {one.name: partial(quality.through, bench.model, format=one) for one in chosen}
        base = partial(quality.through, bench.model, format=reference)
        nats, changes = quality.compared(texts, base, through)
        progress("needles")
        recalled = _recall(bench, reference, chosen, size)
        progress("exam")
        exams = _exam(bench, reference, chosen, size.every)
        progress("decoding")
        speeds = decode(bench.model, chosen, size.contexts, size.rounds)
        rows = [
            Measured(
                one,
                held(bench.config, one),
                quality.summary(texts, changes[one.name]),
                recalled[one.name],
                exams.get(one.name),
                speeds[one.name],
            )
            for one in chosen
        ]
        run = {
            "dtype": dtype,
            "device": str(bench.model.device),
            "reference": reference.name,
            "load": average,
            "texts": size.texts,
            "length": length,
            "nats": nats,
            "seed": quality.SEED,
            "rounds": size.rounds,
        }
        return Result(about(bench.config, path, None) | run, bench.config, recalled[""], tuple(rows))


def held(config: Config, format: str | Format, tokens: int = 1024) -> Held:
    """Bytes of a cache with `tokens` tokens, whole blocks, as really allocated, beside what the format's layout
    says."""
    format = cache_format(format)
    tokens = min(tokens, config.max_position_embeddings) // BLOCK * BLOCK or BLOCK
    cache = LatentCache(config, format=format)
    row = Row(config.kv_lora_rank, config.qk_rope_head_dim)
    draw = torch.Generator().manual_seed(0)
    cache.reserve(tokens)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, torch.randn(1, tokens, row.width, generator=draw))
    cache.advance(tokens)
    wide = cache.pool.recent * row.width * torch.bfloat16.itemsize
    return Held(tokens, cache.nbytes, config.num_hidden_layers * (tokens * format.nbytes(row) + wide), format.bits(row))


def _recall(bench: Workbench, reference: Format, formats: Iterable[Format], size: Size) -> dict[str, Recalled]:
    """By format; of the reference under the name ""."""
    lengths = [length for length in size.lengths if length <= bench.context]
    asked = needle.needles(bench.tokenizer, lengths, count=size.needles, seed=quality.SEED)
    base = [needle.ask(bench.model, reference, one.prompt, one) for one in asked]
    without = [needle.ask(bench.model, reference, one.other, one) for one in asked]
    found = {"": Recalled.of(asked, base, base, without)}
    for format in formats:
        answers = [needle.ask(bench.model, format, one.prompt, one) for one in asked]
        found[format.name] = Recalled.of(asked, answers, base, without)
    return found


def _exam(bench: Workbench, reference: Format, formats: Iterable[Format], every: int) -> dict[str, Examined]:
    if not every:
        return {}
    asked = questions()[::every]

    def marks(format: Format) -> tuple[Marked, ...]:
        return examine(Engine(bench.model, bench.tokenizer, format.name), asked).marked

    base = marks(reference)
    found = {}
    for format in formats:
        given = marks(format)
        difference = [one.passed - other.passed for one, other in zip(given, base, strict=True)]
        found[format.name] = Examined(
            passed=sum(one.passed for one in given),
            total=len(given),
            reference=sum(one.passed for one in base),
            difference=interval(difference),
            gained=difference.count(1),
            lost=difference.count(-1),
            same=sum(one.answer == other.answer for one, other in zip(given, base, strict=True)),
        )
    return found


def decode(
    model: Model, formats: Sequence[Format], contexts: Iterable[int], rounds: int
) -> dict[str, dict[int, tuple[float, ...]]]:
    """Tokens per second of every round by format and context, without sampling. Formats take turns in every round, so
    that a busy moment of the machine falls on all of them; contexts that the model does not have are left out."""
    speeds: dict[str, dict[int, tuple[float, ...]]] = {format.name: {} for format in formats}
    for context in contexts:
        if context + STEPS > model.config.max_position_embeddings:
            continue
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (1, context + STEPS), generator=draw)
        caches = [LatentCache(model.config, format=format, device=model.device) for format in formats]
        for cache in caches:
            model(tokens[:, :context], cache, logits="last")
        taken = [[_decode(model, cache, tokens, context) for cache in caches] for _ in range(rounds + 1)][1:]
        for format, each in zip(formats, zip(*taken, strict=True), strict=True):
            speeds[format.name][context] = each
    return speeds


def _decode(model: Model, cache: LatentCache, tokens: torch.Tensor, context: int) -> float:
    started = perf_counter()
    for position in range(context, context + STEPS):
        logits = model(tokens[:, position : position + 1], cache, logits="last")
    logits.cpu()  # a GPU may still be at work
    seconds = perf_counter() - started
    cache.truncate(context)
    return STEPS / seconds
