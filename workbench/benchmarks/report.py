"""What a run over the cache formats found, as data, as a table for the Pareto plot, and as text."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from workbench.benchmarks.measure import RESULTS, keep, scatter
from workbench.benchmarks.needle import Found, Needle
from workbench.benchmarks.paired import Interval, interval
from workbench.benchmarks.quality import Summary
from workbench.config import Config
from workbench.formats import Format, Row
from workbench.lens.baselines import DEEPSEEK_67B, baselines

PUBLISHED = Row(512, 64)  # the row of every released V2
V2 = Config.preset("v2")

UNDERSTOOD = (
    "The texts are the curriculum's own, drawn with a seed that no training used: what a model like pocket talks of.",
    "KL and agreement compare each format with the same model's own precision, fed the same text through its cache.",
    "Where the reference itself does not find a needle, no format can lose it: what counts is what was kept, and the "
    "change of the needle's log-probability.",
)


class Held(NamedTuple):
    """Bytes of a cache of `tokens` tokens: `allocated` of its storages, `computed` from the format's layout. A window
    of recent tokens is in both, and weighs less per token the longer the cache. bits: of one element of a packed
    row."""

    tokens: int
    allocated: int
    computed: int
    bits: float

    @property
    def per_token(self) -> float:
        """Allocated, in all layers."""
        return self.allocated / self.tokens


class Recalled(NamedTuple):
    """Needles in haystacks. said: how many answers greedy decoding would say whole; kept, gained: of those that the
    reference says, and of the others. nats: mean log-probability of the needle; change: less the reference's, with an
    interval over needles; without: of the reference, where another value was told. cells: by length and depth, (said,
    asked, nats)."""

    said: int
    asked: int
    kept: int
    gained: int
    nats: float
    change: Interval
    without: float
    cells: dict[tuple[int, float], tuple[int, int, float]]

    @classmethod
    def of(
        cls, asked: Sequence[Needle], found: Sequence[Found], base: Sequence[Found], without: Sequence[Found]
    ) -> "Recalled":
        both = list(zip(found, base, strict=True))
        places: dict[tuple[int, float], list[Found]] = {}
        for one, answer in zip(asked, found, strict=True):
            places.setdefault((one.length, one.depth), []).append(answer)
        return cls(
            said=sum(one.said for one in found),
            asked=len(found),
            kept=sum(one.said and other.said for one, other in both),
            gained=sum(one.said and not other.said for one, other in both),
            nats=statistics.fmean(one.nats for one in found),
            change=interval([one.nats - other.nats for one, other in both]),
            without=statistics.fmean(one.nats for one in without),
            cells={
                place: (sum(one.said for one in each), len(each), statistics.fmean(one.nats for one in each))
                for place, each in places.items()
            },
        )

    def to_dict(self) -> dict:
        cells = [
            {"length": length, "depth": depth, "said": said, "asked": asked, "nats": nats}
            for (length, depth), (said, asked, nats) in self.cells.items()
        ]
        return self._asdict() | {"change": self.change._asdict(), "cells": cells}


class Examined(NamedTuple):
    """The exam, greedily: passed of total, by the reference too. difference: of the shares, with an interval over
    questions. same: answers that are letter for letter the reference's."""

    passed: int
    total: int
    reference: int
    difference: Interval
    gained: int
    lost: int
    same: int

    def to_dict(self) -> dict:
        return self._asdict() | {"difference": self.difference._asdict()}


class Measured(NamedTuple):
    """One format. decode: tokens per second in every round, by tokens in the cache."""

    format: Format
    held: Held
    quality: Summary
    needles: Recalled
    exam: Examined | None
    decode: dict[int, tuple[float, ...]]

    def to_dict(self, config: Config) -> dict:
        quality = self.quality
        return {
            "format": self.format.name,
            "doc": self.format.doc,
            "bytes": self.held._asdict() | {"per_token": self.held.per_token},
            "ratios": _ratios(self.held.per_token, config),
            "v2": {
                "row": self.format.nbytes(PUBLISHED),
                "per_token": (of_v2 := self.format.nbytes(PUBLISHED) * V2.num_hidden_layers),
                "ratios": _ratios(of_v2, V2) | {DEEPSEEK_67B.name: DEEPSEEK_67B.ratio(of_v2).reduction},
            },
            "quality": quality._asdict()
            | {name: getattr(quality, name)._asdict() for name in ("nats", "perplexity", "said")},
            "needles": self.needles.to_dict(),
            "exam": self.exam and self.exam.to_dict(),
            "decode": {
                str(context): {"median": statistics.median(each), "rounds": list(each)}
                for context, each in self.decode.items()
            },
        }


def _ratios(per_token: float, config: Config) -> dict[str, float]:
    """The reduction against each baseline of the same model."""
    return {name: one.ratio(per_token).reduction for name, one in baselines(config).items() if one.own}


@dataclass(frozen=True)
class Result:
    """One run: where, on what, and every format. `needles` is what the reference recalls."""

    about: dict
    config: Config
    needles: Recalled
    rows: tuple[Measured, ...]

    def table(self) -> pd.DataFrame:
        """Bytes of a token and mean KL by format, for a Pareto plot."""
        return points(self.to_dict())

    def to_dict(self) -> dict:
        return {
            "about": self.about,
            "understood": list(UNDERSTOOD),
            "baselines": {
                name: {"bytes": one.nbytes, "doc": one.doc, "same model": one.own}
                for name, one in baselines(self.config).items()
            },
            "needles": self.needles.to_dict(),
            "formats": [row.to_dict(self.config) for row in self.rows],
        }

    def __str__(self) -> str:
        about = self.about
        lines = [
            f"{about['model']}: {about['parameters'] / 1e6:.1f}M parameters, {about['dtype']} on {about['device']}, "
            f"threads: {about['threads']}; {about['cpu']}",
            f"against the {about['reference']} cache: {about['texts']} texts of {about['length']:,} tokens, "
            f"{about['nats']:.3f} nats a token",
            scatter(about["load"]).rstrip(),
        ]
        lines = [line for line in lines if line]
        lines += ["", *self._bytes(), "", *self._quality(), "", *self._needles(), "", *self._tasks(), "", *UNDERSTOOD]
        return "\n".join(lines)

    def _bytes(self) -> list[str]:
        own = [one for one in baselines(self.config).values() if one.own]
        lines = [
            f"{'':36}{'bits':>6}   less than "
            + "".join(f"{one.name:>24}" for one in own)
            + f"{'row of 512 + 64:':>24} V2 less than {DEEPSEEK_67B.name}",
            f"{'bytes per token':16}{'allocated':>10}{'computed':>10}",
        ]
        for row in self.rows:
            held, published = row.held, row.format.nbytes(PUBLISHED)
            ratios = (one.ratio(held.per_token).reduction for one in own)
            of_v2 = DEEPSEEK_67B.ratio(published * V2.num_hidden_layers)
            lines.append(
                f"{row.format.name:16}{held.per_token:10,.1f}{held.computed / held.tokens:10,.1f}{held.bits:6.2f}"
                + 13 * " "
                + "".join(f"{ratio:24.1%}" for ratio in ratios)
                + f"{published:24,}{of_v2.reduction:10.1%}"
            )
        return lines

    def _quality(self) -> list[str]:
        lines = [
            f"{'quality':16}{'KL mean':>10}{'KL 99 %':>10}{'top 1':>9}{'perplexity':>12}{'95 %':>21}"
            f"{'of answers, nats':>18}"
        ]
        for row in self.rows:
            seen = row.quality
            span = f"{seen.perplexity.low:+.3%} to {seen.perplexity.high:+.3%}"
            lines.append(
                f"{row.format.name:16}{seen.kl_mean:10.2e}{seen.kl_p99:10.2e}{seen.same:9.3%}"
                f"{seen.perplexity.mean:+12.3%}{span:>21}{seen.said.mean:+18.5f}"
            )
        return lines

    def _needles(self) -> list[str]:
        base = self.needles
        depths = sorted({depth for _, depth in base.cells})
        lines = [
            f"needles recalled from the {self.about['reference']} cache: {base.said} of {base.asked}, "
            f"{base.nats:.2f} nats each; {base.without:.2f} where another value was told",
            f"{'  tokens, depth:':16}" + "".join(f"{depth:>14.0%}" for depth in depths),
        ]
        for length in sorted({length for length, _ in base.cells}):
            cells = [base.cells[length, depth] for depth in depths]
            lines.append(
                f"{length:15,} " + "".join(f"{f'{said}/{asked} {nats:.1f}':>14}" for said, asked, nats in cells)
            )
        lines += ["", f"{'needles':16}{'said':>10}{'kept':>12}{'gained':>8}{'nats, change and 95 %':>34}"]
        for row in self.rows:
            found = row.needles
            lines.append(
                f"{row.format.name:16}{f'{found.said}/{found.asked}':>10}{f'{found.kept}/{base.said}':>12}"
                f"{found.gained:8}{found.change!s:>34}"
            )
        return lines

    def _tasks(self) -> list[str]:
        contexts = sorted({context for row in self.rows for context in row.decode})
        lines = [
            f"{'exam, speed':16}{'passed':>10}{'gained':>8}{'lost':>6}{'share, change and 95 %':>34}{'same text':>12}"
            + "".join(f"{f'tokens/s at {context:,}':>20}" for context in contexts)
        ]
        for row in self.rows:
            one = row.exam
            tried = f"{'':70}"
            if one:
                tried = (
                    f"{f'{one.passed}/{one.total}':>10}{one.gained:8}{one.lost:6}{one.difference!s:>34}"
                    f"{f'{one.same}/{one.total}':>12}"
                )
            speeds = (statistics.median(row.decode[context]) for context in contexts)
            lines.append(f"{row.format.name:16}{tried}" + "".join(f"{speed:20,.0f}" for speed in speeds))
        return lines

    def save(self, folder: Path = RESULTS) -> Path:
        return keep(folder, "cache", self.to_dict())


def points(data: dict) -> pd.DataFrame:
    """Bytes and mean KL of a saved run, for a Pareto plot: of a token for the formats, of a row of 512 + 64 for
    schemes."""
    if "formats" in data:
        index, column = "format", "bytes per token"
        rows = {row["format"]: (row["bytes"]["per_token"], row["quality"]["kl_mean"]) for row in data["formats"]}
    else:
        index, column = "scheme", "bytes of a row of 512 + 64"
        rows = {row["name"]: (row["bytes"], row["kl_mean"]) for row in data["schemes"]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[column, "KL, nats"]).rename_axis(index)
