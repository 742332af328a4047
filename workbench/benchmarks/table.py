"""The measured rows of README.md, written anew from kernels/results by `python -m workbench.benchmarks.table`.

Wording is fixed here, figures come from the files: the newest one of each kind, model, type, number of threads and GPU.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import NamedTuple

from workbench.benchmarks.measure import RESULTS
from workbench.errors import RequestError

README = RESULTS.parent.parent / "README.md"
START = "<!-- measured: written by python -m workbench.benchmarks.table -->"
END = "<!-- measured: end -->"
HEAD = ("what was measured", "figures", "command", "where and when")

# KIND-DAY-MODEL-TYPE-THREADS, as `measure.keep` names them
NAME = re.compile(r"(?P<kind>[a-z]+)(?P<within>.*?)-\d{4}-\d\d-\d\d-(?P<what>.+)\.json")

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
SHAPES = {
    "v2-lite": "V2-Lite's shape",
    "v2": "V2's shape",
    "v2-shared": "V2's shape, one file of experts for all layers",
}

# what `make bench-gpu` measures, by the kind of file it leaves; a kind stays open until one of a GPU is there
AWAITED = {
    "kernels": "each kernel beside its limit and torch's own, `mla_decode` and the experts by share of the bandwidth",
    "decode": "tokens/s of one conversation, end to end",
    "prefill": "of a prompt",
    "batch": "of many conversations at once",
}


class Row(NamedTuple):
    """Cells of Markdown."""

    what: str
    figures: str
    command: str
    where: str

    def __str__(self) -> str:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in self)
        return f"| {' | '.join(cells)} |"


def current(text: str, results: Path = RESULTS) -> str:
    """The README `text` with its measured rows as the files in `results` have them.

    RequestError where `text` has no place for them, or a file is of no known kind or lacks a figure.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise RequestError(f"README.md has no place for the measured rows: one line {START}, and below it one {END}.")
    before, rest = text.split(START)
    lines = [Row(*HEAD), "|---|---|---|---|", *rows(results)]
    return "\n".join([f"{before}{START}", "", *map(str, lines), "", f"{END}{rest.split(END)[1]}"])


def rows(results: Path = RESULTS) -> list[Row]:
    """One of each newest file, by kind and name, and one of what no GPU has been asked yet. Errors as in `current`."""
    newest: dict[tuple, tuple[Path, dict]] = {}
    for path in sorted(results.glob("*.json")):
        result, named = _read(path), NAME.fullmatch(path.name)
        key = named["kind"], named["within"], named["what"], gpu(result)
        if key not in newest or _date(newest[key][1]) < _date(result):
            newest[key] = path, result
    order = sorted(newest, key=lambda key: (list(KINDS).index(key[0]), key[2], key[1]))
    made = [_row(key[0], *newest[key]) for key in order]
    awaited = [what for kind, what in AWAITED.items() if not any(key[0] == kind and key[3] for key in newest)]
    if awaited:
        made.append(Row("GPU: not yet measured", f"open: {'; '.join(awaited)}", "`make bench-gpu`", "not yet run"))
    return made


def gpu(result: dict) -> str:
    """The name of the GPU a result is of, or nothing."""
    about = result["about"]
    plans = [one["plan"]["device"] for one in result.get("rounds", ())]
    named = [about.get("gpu") or "", about.get("device") or ""]
    if found := [name for name in named if name.startswith("NVIDIA")]:
        return found[0]
    return "a GPU" if any(name.startswith("cuda") for name in [*named, *plans]) else named[0]


def _read(path: Path) -> dict:
    named = NAME.fullmatch(path.name)
    if named is None or named["kind"] not in KINDS:
        raise RequestError(
            f"{path.name}: no row of README.md is known for such a result. Add a function for its kind to KINDS in "
            f"workbench/benchmarks/table.py, which has {', '.join(KINDS)}; or take the file away."
        )
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _date(result)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path.name} is no result with a date ({error}): measure again with --save.") from error
    return result


def _date(result: dict) -> datetime:
    return datetime.fromisoformat(result["about"]["date"])


def _row(kind: str, path: Path, result: dict) -> Row:
    try:
        what, figures, command = KINDS[kind](result)
        return Row(what, figures, command, _where(path, result))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RequestError(
            f"{path.name} lacks what its row needs ({error!r}): measure again with --save, or take the file away."
        ) from error


def _where(path: Path, result: dict) -> str:
    about, day = result["about"], _date(result)
    cores = _cores(about)
    some = f"{about['threads']} of {cores}" if about["threads"] < cores else cores
    place = gpu(result) or f"{some} shared CPU cores"
    return f"[{place}, {day.day} {day:%B %Y}](kernels/results/{path.name})"


def _cores(about: dict) -> int:
    return int(re.search(r"(\d+) cores|$", about["cpu"])[1] or about["threads"])


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def number(value: float) -> str:
    """Of three digits or, from 100 on, whole; below 1 two."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f} %"


def between(values: Iterable[float], form: Callable[[float], str] = number) -> str:
    values = list(values)
    return " to ".join(dict.fromkeys((form(min(values)), form(max(values)))))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the medians, with the smallest and largest of a round: rounds were taken in turns."""
    each = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{times(median(ours) / median(theirs))} ({between(each, times)})"


def _change(found: dict) -> str:
    """A mean change as percent, with its interval."""
    low, high = (f"{100 * found[end]:+.3f}" for end in ("low", "high"))
    return f"{percent(found['mean'], 3, '+')} ({low} to {high})"


def _model(about: dict) -> str:
    size = about["parameters"]
    size = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
    name = SHAPES.get(about["model"], about["model"].replace("random ", "random weights, shape "))
    return f"{name} ({size} parameters)"


def _command(what: str, result: dict) -> str:
    about = result["about"]
    words = ["workbench bench", what]
    words += [f"--shape {about['model'].removeprefix('random ')}"] * about["model"].startswith("random ")
    words += ["--dtype bfloat16"] * (about["dtype"] == "bfloat16")
    words += [f"--threads {about['threads']}"] * (about["threads"] < _cores(about))
    return f"`{' '.join(words)}`"


# a kind of file: what was measured, figures, command


def _cpu(result: dict) -> tuple[str, str, str]:
    about = result["about"]
    compared = [row for row in result["rows"] if row["theirs"]]
    each = (f"{row['name']}: {number(median(row['ours']))}, {_ratio(row['ours'], row['theirs'])}" for row in compared)
    figures = f"tokens/s, and how many times transformers': {'; '.join(each)}"
    llama = [median(row["ours"]) / median(row["llama"]) for row in compared if row.get("llama")]
    if llama:
        figures += (
            f". Beside llama.cpp with the same weights {times(geometric_mean(llama))}, the geometric mean of these "
            f"{len(llama)} ({between(llama, times)})"
        )
    engine = [f"{row['name']}: {number(median(row['ours']))}" for row in result["rows"] if not row["theirs"]]
    if engine:
        figures += f". Sampling, alternatives and text included: {', '.join(engine)} tokens/s"
    what = f"{_model(about)}, {DTYPES[about['dtype']]}, in turns with transformers at its fastest setting for each"
    return what, figures, _command("cpu --llama PYTHON" if llama else "cpu", result)


def _speeds(kind: str, title: str, result: dict) -> tuple[str, str, str]:
    """Rows of `speeds.Row`: the first side is ours."""
    lines = []
    for row in result["rows"]:
        sides = row["sides"]
        ours = next(iter(sides.values()))
        line = f"{row['name']} {number(median(ours))} tokens/s ({between(ours)}), {percent(row['share'])} of the limit"
        if theirs := [speeds for side, speeds in sides.items() if side.startswith("transformers")]:
            line += f", {_ratio(ours, max(theirs, key=median))} transformers"
        if recorded := sides.get("routing recorded"):
            line += f", with routing recorded {percent(median(recorded) / median(ours))} of that speed"
        lines.append(line)
    what = f"{_model(result['about'])}, {DTYPES[result['about']['dtype']]}: {title}, beside the limit of the same run"
    return what, "; ".join(lines), "`make bench-gpu`" if gpu(result) else _command(kind, result)


def _kernels(result: dict) -> tuple[str, str, str]:
    figures, untimed = [], [row for row in result["rows"] if not row["ours"]]
    for name in dict.fromkeys(row["kernel"] for row in result["rows"] if row["ours"]):
        timed = [row for row in result["rows"] if row["kernel"] == name and row["ours"]]
        line = f"`{name}` {between((row['share'] for row in timed), percent)}, shapes: {len(timed)}"
        if beside := [row["peer_median"] / row["median"] for row in timed if row["peer"]]:
            line += f", {between(beside, times)} torch's own"
        figures.append(line)
    figures += [f"NOT timed: `{row['kernel']}` {row['shape']}, {row['wrong']}" for row in untimed]
    what = "kernels on shapes of V2-Lite and V2: share of what bandwidth and products allow, measured in the same run"
    return what, "; ".join(figures), "`make bench-gpu`"


def _offload(result: dict) -> tuple[str, str, str]:
    about, bound, rounds, plan = result["about"], result["bound"], result["rounds"], result["rounds"][-1]["plan"]
    speeds = [one["tokens_per_second"] for one in rounds]
    bits = 8 * sum(plan["disk"].values()) / about["parameters"]
    card = plan["vram"] is not None
    limit = f"{plan['ram'] / 1e9:g} GB of memory"
    limit = f"{plan['vram'] / 2**30:g} GiB, with {limit} beside them" if card else limit
    what = f"{_model(about)}, {'random ' if about['synthetic'] else ''}weights of {bits:.2f} bits, in {limit}"
    off = max(map(abs, result["errors"].values()))
    whole = plan["slots"] + plan["far"] >= plan["experts"]
    held = f"all {plan['experts']:,}" if whole else f"{plan['slots']:,} of {plan['experts']:,}"
    figures = f"{number(median(speeds))} tokens/s ({between(speeds)}), "
    allow = [name for name in ("disk", "memory", "link") if bound[f"{name}_ms"]]
    figures += f"{percent(bound['share'])} of what {' and '.join(allow)} allow{'s' * (len(allow) == 1)}; "
    figures += f"residents, {held} experts, cache for {about['context']:,} tokens and workspace, "
    figures += f"weights, tables and slots within {percent(off, 4)} of the plan"
    peak, limit = (max(fence[name] for fence in result["fences"]) / 1e9 for name in ("peak", "limit"))
    figures += f"; peak {peak:.2f} of {limit:.2f} GB"
    runs = [run for one in rounds for run in one["runs"]]
    if seen := [run["traffic"] for run in runs if "traffic" in run]:
        rates = [percent(median(one[name] for one in seen), 1) for name in ("hit_rate", "oracle", "chance")]
        figures += "; hits {} where a perfect cache has {} and chance {}".format(*rates)
    figures += f"; {len(runs)} runs of {median(len(run['seconds']) for run in runs):g} tokens"
    if card and not gpu(result):
        figures += f". Main memory stands in for the card: the speed is that of {about['threads']} CPU cores and a disk"
    if llama := result["llama"]:
        bare = [one["bare_tokens_per_second"] for one in rounds]
        figures += f". Without drawing tokens {number(median(bare))} ({between(bare)}), "
        figures += f"{_ratio(bare, llama['speeds'])} llama.cpp's Q4_0 in the same run"
    make = "`make bench-offload-gpu`" if gpu(result) else "`make bench-offload`"
    return what, figures, f"{make}, inside a cgroup{', with `LLAMA=`' if llama else ''}"


def _probes(result: dict) -> tuple[str, str, str]:
    about, rows = result["about"], {row["name"]: row for row in result["decode"]}
    bare = rows["no probes in the code"]

    def cost(name: str) -> str:
        row, (low, high) = rows[name], rows[name]["interval"]
        said = {"met": "keeps", "MISSED": "misses"}.get(row["verdict"], "open around")
        aim = f", {said} its aim of {row['limit']:g} %" if row["limit"] else ""
        return f"{row['percent']:+.1f} % ({low:+.1f} to {high:+.1f}){aim}"

    same = rows["probes off"]["ops"] == bare["ops"]
    figures = (
        f"of a decoding step of {number(bare['median_ms'])} ms, 95 % intervals: off {cost('probes off')}, with "
        f"{'the same' if same else 'OTHER'} operations and the same bits as code without probes; routing of every "
        f"token recorded {cost('static routing recorder')} on a model this small; the same code twice "
        f"{cost('the same again')}. Memory layout moves such figures too, more than the intervals say"
    )
    what = f"{_model(about)}, {DTYPES[about['dtype']]}: what looking costs, operation by operation, at a context of "
    return f"{what}{about['context']:,}", figures, _command("probes", result)


def _cache(result: dict) -> tuple[str, str, str]:
    about, [q6] = result["about"], [one for one in result["formats"] if one["format"] == "q6"]
    quality, exam = q6["quality"], q6["exam"]
    figures = f"{_change(quality['perplexity'])} perplexity, 95 % interval; {percent(1 - quality['same'], 1)} of the "
    figures += f"favourite tokens change, over {about['texts']} texts of {about['length']:,} tokens"
    if exam:
        figures += (
            f"; {exam['passed']} of {exam['total']} questions, where {about['reference']} has {exam['reference']}"
        )
    what = f"{_model(about)}, {DTYPES[about['dtype']]}: what the 6-bit cache costs beside one in {about['reference']}"
    return what, figures, _command("cache", result)


def _schemes(result: dict) -> tuple[str, str, str]:
    tried = [one for one in result["schemes"] if one["within_budget"]]
    [q6], best = [one for one in tried if one["name"] == "q6"], min(tried, key=lambda one: one["kl_mean"])
    figures = f"mean KL of the shipped q6 {q6['kl_mean']:.5f} nats, the least {best['kl_mean']:.5f} ({best['name']}); "
    figures += f"{len(tried)} of {len(result['schemes'])} schemes keep to the bytes. pocket's latent is narrow: what "
    figures += "this says of the published models is in the file"
    what = f"{_model(result['about'])}: ways to round the latent within the bytes of the 93.3 %"
    return what, figures, _command("schemes", result)


def _weights(result: dict) -> tuple[str, str, str]:
    lines = []
    for one in result["recipes"]:
        if one["recipe"] in ("int8", "int4", "int4+compensated"):
            line, exam = f"{one['recipe']}: {_change(one['quality']['perplexity'])}", one["exam"]
            if exam:
                line += f", {exam['passed']} of {exam['total']} questions where plain weights pass {exam['reference']}"
            lines.append(f"{line}, {one['bits']:.2f} bits a weight, all told")
    what = f"{_model(result['about'])}: what packed weights cost"
    return what, f"perplexity, 95 % intervals: {'; '.join(lines)}", _command("weights", result)


KINDS: dict[str, Callable[[dict], tuple[str, str, str]]] = {
    "cpu": _cpu,
    "kernels": _kernels,
    "decode": partial(_speeds, "decode", "decoding one sequence"),
    "prefill": partial(_speeds, "prefill", "reading a prompt"),
    "batch": partial(_speeds, "batch", "decoding many sequences at once"),
    "offload": _offload,
    "probes": _probes,
    "cache": _cache,
    "schemes": _schemes,
    "weights": _weights,
}


if __name__ == "__main__":
    try:
        README.write_text(current(README.read_text(encoding="utf-8")), encoding="utf-8")
    except (RequestError, FileNotFoundError) as error:  # there is no README outside a checkout
        sys.exit(str(error))
    sys.stdout.write(f"{README.name}: {len(rows())} measured rows\n")
