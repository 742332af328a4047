"""Replaying: a saved trace opened without the model that made it, as a notebook of the widgets or as text."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.edits import describe, from_dict
from workbench.errors import RequestError
from workbench.lens.difference import diff
from workbench.lens.load import load
from workbench.trace import Trace

SHOWN = 12  # tokens in the text
COLUMNS = 6  # layers beside them
KEY = "workbench_replay"  # in the metadata of a notebook: the files it opens

Cell = tuple[str, str]  # kind, source


def open_traces(paths: Sequence[Path]) -> list[Trace]:
    """One trace, or two to be compared. RequestError for a bad file, or two without a layer in common."""
    if len(paths) > 2:
        raise RequestError(f"one trace is replayed, or two are compared; got {len(paths)} files.")
    traces = [Trace.load(path) for path in paths]
    if len(traces) == 2:
        diff(*traces)
    return traces


def as_text(traces: Sequence[Trace], paths: Sequence[Path]) -> str:
    """What is in them; of two also what differs."""
    parts = [_summary(trace, path) for trace, path in zip(traces, paths, strict=True)]
    if len(traces) == 2:
        parts.append(f"a is {paths[0]}, b is {paths[1]}\n{diff(*traces).summary()}")
    return "\n\n".join(parts)


def _summary(trace: Trace, path: Path) -> str:
    """Where it comes from, how evenly each layer used its experts, and the strongest expert of the first tokens."""
    parts = [f"{path}: {repr(trace).removeprefix('Trace(').removesuffix(')')}", *_facts(trace.header)]
    if (trace.experts >= 0).any():
        parts += ["", "load of the experts (workbench.lens.load says what the figures are)"]
        parts.append(load(trace).to_string(float_format="{:.3f}".format))
        parts += ["", _tokens(trace)]
    return "\n".join(parts)


def _facts(header: dict) -> list[str]:
    created = sorted(filter(None, _all(header, "created")))
    lines = [f"recorded {' to '.join(dict.fromkeys((created[0], created[-1])))}"] if created else []
    for name in ("versions", "sampling"):
        for said in _all(header, name):
            lines += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in said.items())] if said else []
    edits = [edit for edits in _all(header, "edits") for edit in edits or ()]
    lines += dict.fromkeys(f"edited: {describe(from_dict(edit))}" for edit in edits)
    labels = [sequence["label"] for sequence in header["sequences"] if sequence.get("label")]
    if labels:
        lines.append("labels: " + ", ".join(f"{name} {labels.count(name)}" for name in dict.fromkeys(labels)))
    return lines


def _all(header: dict, name: str) -> list:
    """What all sequences have, or else what each of them has, without repetition."""
    if header[name] is not None:
        return [header[name]]
    each = [sequence.get(name) for sequence in header["sequences"]]
    return [value for number, value in enumerate(each) if value not in each[:number]]


def _tokens(trace: Trace) -> str:
    """The first tokens, each with its strongest expert in some layers from first to last."""
    count = len(trace.layers)
    chosen = np.unique(np.linspace(0, count - 1, min(count, COLUMNS)).round().astype(int))
    table = trace.tokens.head(SHOWN)[["sequence", "position", "phase", "text"]]
    table = table.assign(text=[_short(text) for text in table["text"]])
    for column in chosen.tolist():
        ids = trace.experts[: len(table), column, 0].tolist()
        table[f"layer {trace.layers[column]}"] = [str(expert) if expert >= 0 else "" for expert in ids]
    return f"strongest expert of the first {len(table)} tokens\n{table.to_string(index=False)}"


def _short(text: str) -> str:
    said = repr(text)
    return said if len(said) <= 16 else said[:13] + "..."


def write_notebook(folder: Path, paths: Sequence[Path], traces: Sequence[Trace]) -> Path:
    """A notebook that opens these files, named after them. One that is there already for the same files stays as it is,
    with what was written in it; one for others is not replaced.
    """
    files = [str(path.resolve()) for path in paths]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be made: {error.strerror or error}.") from None
    stem = "-vs-".join(path.stem for path in paths)
    number = 1
    while True:
        target = folder / f"{stem}{'' if number == 1 else f'-{number}'}.ipynb"
        if not target.exists():
            break
        if _opens(target) == files:
            return target
        number += 1
    document = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            KEY: files,
        },
        "cells": [_cell(number, *cell) for number, cell in enumerate(_cells(files, traces))],
    }
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return target


def _opens(notebook: Path) -> list[str] | None:
    """The files of a notebook that was written here; None for any other."""
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get(KEY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _cell(number: int, kind: str, source: str) -> dict:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source} | code


def _cells(files: Sequence[str], traces: Sequence[Trace]) -> list[Cell]:
    several = [len(trace.header["sequences"]) > 1 for trace in traces]
    name = Path(files[0]).name
    if len(files) == 1:
        what = f"{name}, recorded by `{traces[0].header['model']}`"
        return [
            ("markdown", f"# {what}\n\nRun all cells (menu *Run*). No model is loaded: everything is in the file."),
            ("code", f"import workbench as wb\n\ntrace = wb.Trace.load({files[0]!r})\ntrace"),
            *_replay("trace", several[0]),
            ("code", "from workbench.lens.load import load\n\nload(trace).round(3)"),
            ("code", "trace.routing"),
        ]
    other = Path(files[1]).name
    one_a, one_b = (f"{name}.sequence(n)" if more else name for name, more in zip("ab", several))
    return [
        (
            "markdown",
            f"# {name} and {other}\n\nRun all cells (menu *Run*). No model is loaded: everything is in the files.",
        ),
        (
            "code",
            "import workbench as wb\n\n"
            f"a = wb.Trace.load({files[0]!r})\nb = wb.Trace.load({files[1]!r})\nwb.diff(a, b)",
        ),
        (
            "code",
            "from workbench.widgets.compare import SideBySide\n\n"
            + ("n = 0  # which of the sequences\n" if any(several) else "")
            + f"SideBySide({one_a}, {one_b}, labels=({name!r}, {other!r}))",
        ),
        *_replay("a", several[0]),
        *_replay("b", several[1]),
    ]


def _replay(name: str, several: bool) -> list[Cell]:
    if not several:
        return [("code", f"wb.replay({name})")]
    listed = f'import pandas as pd\n\npd.DataFrame({name}.header["sequences"])'
    return [("code", listed), ("code", f"wb.replay({name}.sequence(0))  # 0: the first of those listed")]
