"""The weight recipes: bits of a weight beside what they cost in quality, all on one model and in one run.

Each recipe is packed to disk and opened from there, so what is measured is what would be used; the reference is the
same checkpoint, plain. "+compensated" after a recipe rounds as rounding.py does.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from workbench.benchmarks.measure import (
    DTYPES,
    RESULTS,
    about,
    checkpoint_of,
    computing_with,
    keep,
    load_average,
    scatter,
)
from workbench.benchmarks.paired import Interval, interval
from workbench.benchmarks.quality import SEED, Summary, compared, held_out, summary
from workbench.benchmarks.report import Examined
from workbench.calibration import Calibration, read_by
from workbench.errors import RequestError
from workbench.evals.exam import Marked, examine, questions
from workbench.matrix import dense
from workbench.model import Model
from workbench.packing import pack
from workbench.quantising import nearest
from workbench.recipe import Recipe
from workbench.recorder import Recorder
from workbench.rounding import compensated
from workbench.workbench import Workbench, load

COMPENSATED = "+compensated"
RECIPES = ("bf16", "fp8", "int8", "int6", "int4", "int4+compensated", "int3", "int3+compensated")
CALIBRATING = 77_003  # seed of the texts that are calibrated on; no training had it

UNDERSTOOD = (
    "Calibration and measured texts are drawn from one curriculum with different seeds, which no training used: real "
    "text differs from what a model was calibrated on by more, and may show less of the gain.",
    "Errors are relative: squared error over squared value, mean over matrices, each of which counts once; of outputs "
    "with the inputs of the plain model on the measured texts.",
    "pocket is stored in bf16, which therefore loses nothing here. Its rows are short, 192 and 64 weights in experts "
    "where published models have 2,048 to 5,120 and 1,408 to 1,536, and its words are a sixth of all: scales, padding "
    "to whole pages and 8-bit words weigh more. An expert of V2-Lite in int4 has 4.14 bits, in int3 3.14.",
)


class Size(NamedTuple):
    """How much is measured. `every`: of the exam, each question whose number it divides; 0 leaves it out."""

    texts: int = 32
    calibrated: int = 64  # texts of calibration
    length: int = 512  # tokens of a text
    every: int = 1


FULL = Size()
QUICK = Size(texts=4, calibrated=8, length=256, every=12)


class Measured(NamedTuple):
    """One recipe.

    bits           of a weight, all told: scales, padding, and what is kept plain
    disk, memory   bytes of the packed files, and of the weights once they are opened
    rerouted       share of choices of an expert that another took the place of, with an interval over texts
    weights, outputs   relative squared errors, see UNDERSTOOD
    over_nearest   of a compensated one: mean KL less that of the same recipe, with an interval over texts
    """

    recipe: str
    bits: float
    disk: int
    memory: int
    quality: Summary
    rerouted: Interval
    weights: float
    outputs: float
    exam: Examined | None
    over_nearest: Interval | None

    def to_dict(self) -> dict:
        quality = self.quality
        return self._asdict() | {
            "quality": quality._asdict()
            | {name: getattr(quality, name)._asdict() for name in ("nats", "perplexity", "said")},
            "rerouted": self.rerouted._asdict(),
            "exam": self.exam and self.exam.to_dict(),
            "over_nearest": self.over_nearest and self.over_nearest._asdict(),
        }


@dataclass(frozen=True)
class Result:
    """One run: where, on what, and every recipe."""

    about: dict
    rows: tuple[Measured, ...]

    def table(self) -> pd.DataFrame:
        """Bits of a weight and mean KL by recipe, for a Pareto plot."""
        rows = {row.recipe: (row.bits, row.quality.kl_mean) for row in self.rows}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["bits of a weight", "KL, nats"])
        return frame.rename_axis("recipe")

    def to_dict(self) -> dict:
        return {
            "about": self.about,
            "understood": list(UNDERSTOOD),
            "recipes": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        about = self.about
        lines = [
            f"{about['model']}: {about['parameters'] / 1e6:.1f}M parameters, {about['dtype']} on {about['device']}, "
            f"threads: {about['threads']}; {about['cpu']}",
            f"against the plain weights: {about['texts']} texts of {about['length']:,} tokens, {about['nats']:.3f} "
            f"nats a token; calibrated on {about['calibrated']} others",
            scatter(about["load"]).rstrip(),
        ]
        lines = [line for line in lines if line]
        lines += ["", *self._size(), "", *self._quality(), "", *self._exam(), "", *UNDERSTOOD]
        return "\n".join(lines)

    def _size(self) -> list[str]:
        head = (
            f"{'size':22}{'bits':>7}{'on disk, MB':>13}{'in memory, MB':>15}{'error of weights':>18}{'of outputs':>12}"
        )
        return [head] + [
            f"{row.recipe:22}{row.bits:7.2f}{row.disk / 1e6:13.2f}{row.memory / 1e6:15.2f}{row.weights:18.1e}"
            f"{row.outputs:12.1e}"
            for row in self.rows
        ]

    def _quality(self) -> list[str]:
        lines = [
            f"{'quality':22}{'KL mean':>10}{'KL 99 %':>10}{'top 1':>9}{'perplexity':>12}{'95 %':>21}{'rerouted':>10}"
            f"{'KL over nearest, 95 %':>30}"
        ]
        for row in self.rows:
            seen, over = row.quality, row.over_nearest
            span = f"{seen.perplexity.low:+.3%} to {seen.perplexity.high:+.3%}"
            beside = f"{f'{over.low:+.1e} to {over.high:+.1e}':>30}" if over else ""
            lines.append(
                f"{row.recipe:22}{seen.kl_mean:10.2e}{seen.kl_p99:10.2e}{seen.same:9.3%}{seen.perplexity.mean:+12.3%}"
                f"{span:>21}{row.rerouted.mean:10.2%}{beside}"
            )
        return lines

    def _exam(self) -> list[str]:
        if not all(row.exam for row in self.rows):
            return ["no exam"]
        lines = [f"{'exam':22}{'passed':>10}{'gained':>8}{'lost':>6}{'share, change and 95 %':>34}{'same text':>12}"]
        for row in self.rows:
            one = row.exam
            lines.append(
                f"{row.recipe:22}{f'{one.passed}/{one.total}':>10}{one.gained:8}{one.lost:6}{one.difference!s:>34}"
                f"{f'{one.same}/{one.total}':>12}"
            )
        return lines

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, "weights", self.to_dict())


def measure(
    checkpoint: Path | None = None,
    *,
    recipes: Sequence[str] = RECIPES,
    dtype: str = "float32",
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Result:
    """Every recipe on `checkpoint` or pocket, in the size FULL or QUICK. `progress` is told what begins.

    RequestError for an unknown recipe, or one that is named twice.
    """
    size = QUICK if quick else FULL
    named = {name: Recipe.named(name.removesuffix(COMPENSATED)) for name in recipes}
    if len(named) < len(recipes) or not named:
        raise RequestError(f"recipes are named once each, and at least one; got {', '.join(recipes) or 'none'}.")
    average = load_average()
    computing = torch.inference_mode(), tempfile.TemporaryDirectory()
    with computing_with(threads), checkpoint_of(checkpoint, None) as path, computing[0], computing[1] as folder:
        kind = str(DTYPES[dtype]).removeprefix("torch.")
        plain = load(str(path), device="cpu", dtype=kind)
        length = min(size.length, plain.context)
        progress("calibrating")
        read = held_out(plain.tokenizer, size.calibrated, length, CALIBRATING).tokens
        texts = held_out(plain.tokenizer, size.texts, length)
        calibration, seen = (Calibration.collect(plain.model, [tokens]) for tokens in (read, texts.tokens))
        asked = questions()[:: size.every] if size.every else []
        benches, disk = {}, {}
        for name, recipe in named.items():
            progress(f"packing {name}")
            round = compensated(calibration) if name.endswith(COMPENSATED) else nearest
            disk[name] = pack(path, Path(folder) / name, recipe, round=round).nbytes
            benches[name] = load(str(Path(folder) / name), device="cpu", dtype=kind)
        progress("texts")
        watched = {name: _Watched(bench.model) for name, bench in {"": plain, **benches}.items()}
        nats, changes = compared(texts, watched[""], {name: watched[name] for name in benches})
        base = _marks(plain, asked)
        rows = []
        for name, bench in benches.items():
            progress(f"exam {name}")
            of_weights, of_outputs = errors(plain.model, bench.model, seen)
            rows.append(
                Measured(
                    name,
                    8 * disk[name] / bench.config.parameters().total,
                    disk[name],
                    sum(one.nbytes for one in bench.model.tensors.values()),
                    summary(texts, changes[name]),
                    rerouted(watched[""].chosen, watched[name].chosen),
                    of_weights,
                    of_outputs,
                    _examined(_marks(bench, asked), base),
                    _over_nearest(name, changes),
                )
            )
        run = {
            "dtype": dtype,
            "device": str(plain.model.device),
            "load": average,
            "texts": size.texts,
            "calibrated": size.calibrated,
            "length": length,
            "nats": nats,
            "seed": SEED,
            "calibrating": CALIBRATING,
        }
        return Result(about(plain.config, path, None) | run, tuple(rows))


class _Watched:
    """A model that keeps which experts it chose: [B, layers, T, K] of every batch it read."""

    def __init__(self, model: Model):
        self.model, self.batches = model, []

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        look = Recorder("moe.experts")
        found = self.model(tokens, probe=look).log_softmax(-1)
        self.batches.append(torch.stack(list(look.seen.values()), 1))
        return found

    @property
    def chosen(self) -> torch.Tensor:
        return torch.cat(self.batches)


def rerouted(before: torch.Tensor, after: torch.Tensor) -> Interval:
    """Share of choices that are other experts, of ids [texts, ..., K], with an interval over texts."""
    kept = (before[..., None] == after[..., None, :]).any(-1)
    return interval((~kept).float().flatten(1).mean(1).tolist())


def errors(plain: Model, other: Model, calibration: Calibration) -> tuple[float, float]:
    """Of weights and of outputs: squared error over squared value, mean over the matrices that are multiplied with."""
    found = []
    for name, exact in plain.tensors.items():
        if read_by(name) is None:
            continue
        exact = exact.float()
        wrong, moment = dense(other.tensors[name], torch.float32) - exact, calibration.of(name, exact.shape[-1])
        of_outputs = float((wrong @ moment * wrong).sum() / (exact @ moment * exact).sum())
        found.append((float(wrong.square().sum() / exact.square().sum()), of_outputs))
    of_weights, of_outputs = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return of_weights, of_outputs


def _marks(bench: Workbench, asked: list) -> tuple[Marked, ...]:
    return examine(bench, asked).marked if asked else ()


def _examined(given: Iterable[Marked], base: Iterable[Marked]) -> Examined | None:
    if not base:
        return None
    pairs = list(zip(given, base, strict=True))
    difference = [one.passed - other.passed for one, other in pairs]
    return Examined(
        passed=sum(one.passed for one, _ in pairs),
        total=len(pairs),
        reference=sum(other.passed for _, other in pairs),
        difference=interval(difference),
        gained=difference.count(1),
        lost=difference.count(-1),
        same=sum(one.answer == other.answer for one, other in pairs),
    )


def _over_nearest(name: str, changes: dict) -> Interval | None:
    other = name.removesuffix(COMPENSATED)
    if other == name or other not in changes:
        return None
    return interval((changes[name].kl.mean(1) - changes[other].kl.mean(1)).tolist())
