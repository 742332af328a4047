"""What was measured before and kept in kernels/results, read again. Nothing is measured here."""

import json
import statistics
from pathlib import Path

import pandas as pd

from workbench.benchmarks.measure import RESULTS
from workbench.errors import RequestError

OFFLOADS = ("weights", "parameters", "computed on", "near", "main memory", "tokens/s", "hit rate", "date", "machine")


def offloads(folder: Path = RESULTS) -> pd.DataFrame:
    """A row a run of `bench offload` that is kept in `folder`, by model; none where nothing was kept.

    parameters   in billions
    computed on  "CPU in place of a GPU" where `near` is a part of main memory
    near, main memory  the limits as they were given; `near` is empty where there was only the one
    tokens/s, hit rate  medians of the rounds; the hit rate is empty where all experts were near

    RequestError for a file that is no result of that kind.
    """
    rows = [_row(path) for path in sorted(folder.glob("offload-*.json"))]
    index = pd.Index([model for model, _ in rows], name="model", dtype=object)
    return pd.DataFrame([row for _, row in rows], index, OFFLOADS)


def _row(path: Path) -> tuple[str, tuple]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        about, rounds = kept["about"], kept["rounds"]
        hits = [run["traffic"]["hit_rate"] for one in rounds for run in one["runs"] if "traffic" in run]
        near, _, ram = about["within"].rpartition("-")
        gpu = rounds[0]["plan"]["device"] == "cuda"
        return about["model"], (
            "random" if about["synthetic"] else "trained",
            about["parameters"] / 1e9,
            "GPU" if gpu else "CPU in place of a GPU" if near else "CPU",
            near,
            ram,
            statistics.median(one["tokens_per_second"] for one in rounds),
            statistics.median(hits) if hits else float("nan"),
            about["date"][:10],
            about["cpu"],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RequestError(f"{path.name} is no result of `workbench bench offload` ({error!r}): remove it.") from None
