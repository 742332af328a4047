"""What was measured before and kept in kernels/results, read again. Nothing is measured here."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from workbench.benchmarks.measure import RESULTS
from workbench.errors import RequestError

OFFLOADS = ("weights", "parameters", "computed on", "near", "main memory", "tokens/s", "hit rate", "date", "machine")
PEERS = ("what", "type", "threads", "workbench", "transformers", "llama.cpp", "date", "machine")
SPEEDS = ("what", "type", "side", "tokens/s", "at most", "share", "bound by", "date", "device")
KERNELS = ("shape", "least, us", "bound by", "median, us", "share", "torch, us", "wrong", "date", "device")
NAN = float("nan")

Rows = Iterator[tuple[str, tuple]]  # what a row is called, and its cells


def offloads(folder: Path = RESULTS) -> pd.DataFrame:
    """A row a run of `bench offload` that is kept in `folder`, by model; none where nothing was kept.

    parameters   in billions
    computed on  "CPU in place of a GPU" where `near` is a part of main memory
    near, main memory  the limits as they were given; `near` is empty where there was only the one
    tokens/s, hit rate  medians of the rounds; the hit rate is empty where all experts were near

    RequestError for a file that is no result of that kind.
    """
    return _table(folder, "offload", "model", OFFLOADS, _offload)


def peers(folder: Path = RESULTS) -> pd.DataFrame:
    """A row a row of `bench cpu`, by model: tokens a second here and of the others, medians of rounds taken in turns.

    What was not run beside it is empty. RequestError for a file that is no result of that kind.
    """
    return _table(folder, "cpu", "model", PEERS, _peers)


def speeds(kind: str, folder: Path = RESULTS) -> pd.DataFrame:
    """A row a way of `bench decode`, `prefill` or `batch`, by model: the median of its rounds beside the bound that
    was measured in the same run, and the share of it. RequestError for a file that is no result of that kind.
    """
    return _table(folder, kind, "model", SPEEDS, _speeds)


def kernels(folder: Path = RESULTS) -> pd.DataFrame:
    """A row a shape of `bench kernels`, by kernel: microseconds of the median launch, of the bound that was measured in
    the same run, and of torch's own; `wrong` says why a shape was not timed. RequestError for a file of another kind.
    """
    return _table(folder, "kernels", "kernel", KERNELS, _kernels)


def _table(
    folder: Path, kind: str, index: str, columns: tuple[str, ...], rows_of: Callable[[dict], Rows]
) -> pd.DataFrame:
    rows: list[tuple[str, tuple]] = []
    for path in sorted(folder.glob(f"{kind}-*.json")):
        try:
            rows += rows_of(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise RequestError(
                f"{path.name} is no result of `workbench bench {kind}` ({error!r}): remove it."
            ) from None
    return pd.DataFrame([row for _, row in rows], pd.Index([n for n, _ in rows], name=index, dtype=object), columns)


def _offload(kept: dict) -> Rows:
    about, rounds = kept["about"], kept["rounds"]
    hits = [run["traffic"]["hit_rate"] for one in rounds for run in one["runs"] if "traffic" in run]
    near, _, ram = about["within"].rpartition("-")
    gpu = rounds[0]["plan"]["device"] == "cuda"
    yield (
        about["model"],
        (
            "random" if about["synthetic"] else "trained",
            about["parameters"] / 1e9,
            "GPU" if gpu else "CPU in place of a GPU" if near else "CPU",
            near,
            ram,
            statistics.median(one["tokens_per_second"] for one in rounds),
            statistics.median(hits) if hits else NAN,
            about["date"][:10],
            about["cpu"],
        ),
    )


def _peers(kept: dict) -> Rows:
    about = kept["about"]
    for row in kept["rows"]:
        medians = [statistics.median(row[side]) if row.get(side) else NAN for side in ("ours", "theirs", "llama")]
        yield (
            about["model"],
            (row["name"], about["dtype"], about["threads"], *medians, about["date"][:10], about["cpu"]),
        )


def _speeds(kept: dict) -> Rows:
    about = kept["about"]
    for row in kept["rows"]:
        for side, readings in row["sides"].items():
            median = statistics.median(readings)
            found = (median, row["bound"], median / row["bound"], row["binds"])
            yield about["model"], (row["name"], about["dtype"], side, *found, about["date"][:10], about["device"])


def _kernels(kept: dict) -> Rows:
    about = kept["about"]
    for row in kept["rows"]:
        ours, peer = (statistics.median(row[side]) if row[side] else NAN for side in ("ours", "peer"))
        found = (row["least"], row["binds"], ours, row["least"] / ours, peer, row["wrong"])
        yield row["kernel"], (row["shape"], *found, about["date"][:10], about["device"])
