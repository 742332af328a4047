"""The file of a trace: parquet, a row a token. Any reader of parquet sees the columns; nothing is repaired in silence.

Beside the token columns: experts, gates and margins, a list of L x K a token, null where the token was never read;
scores, a list of L x E, where they were recorded; events, a list of structs, where there are any. The rest (header,
layers, K, text that UTF-8 cannot hold) is JSON under "workbench.trace" in the metadata of the schema.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from workbench.errors import RequestError

FORMAT, VERSION = "workbench trace", 1
KEY, CHECK = b"workbench.trace", b"workbench.trace.crc32"  # parquet's own checksums are of the columns only
ROWS = 8192  # tokens of a row group: one can be read without the others

TOKENS = {
    "sequence": np.int32, "position": np.int32, "id": np.int32, "text": str, "phase": str, "logprob": np.float32,
    "probability": np.float32, "entropy": np.float32, "ms": np.float32, "cache_bytes": np.int64,
}  # fmt: skip
EVENTS = {"token": np.int64, "kind": str, "layer": np.int32, "expert": np.int32, "bytes": np.int64, "ms": np.float32}
LISTS = {  # what a list holds, and what stands in the array for a token without one
    "experts": (np.int16, -1),
    "gates": (np.float32, 0.0),
    "margins": (np.float32, np.nan),
    "scores": (np.float32, np.nan),
}
OPTIONAL = ("scores", "events")
LONE = re.compile("[\ud800-\udfff]")  # a half of a surrogate pair


class Parts(NamedTuple):
    """What a Trace is made of."""

    header: dict
    tokens: pd.DataFrame
    layers: Sequence[int]
    experts: np.ndarray
    gates: np.ndarray
    margins: np.ndarray
    scores: np.ndarray | None
    events: pd.DataFrame


def write(path: Path, parts: Parts) -> None:
    """Writes beside the target and renames, so that what is there stays whole until all is written."""
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}. Make it first, or choose another place.")
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        parquet.write_table(
            _table(parts), staging, ROWS, compression="zstd", use_dictionary=["text", "phase"], write_page_checksum=True
        )
        staging.replace(path)
    except OSError as error:
        raise RequestError(f"{path}: saving failed ({error}). What was there is as it was.") from None
    finally:
        staging.unlink(missing_ok=True)


def read(path: Path) -> Parts:
    """RequestError says what is wrong with a file that is missing, damaged, foreign, newer, or not whole."""
    if not path.is_file():
        raise RequestError(f"{path}: there is no such file. A trace is saved by trace.save or `workbench trace`.")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            facts = _facts(path, file.schema_arrow.metadata or {})
            table = file.read()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        line = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"{path}: no parquet file, or a damaged one ({line}). Save or copy the trace again."
        ) from None
    known = [*TOKENS, *LISTS, "events"]
    missing = [name for name in known if name not in table.column_names and name not in OPTIONAL]
    unknown = [name for name in table.column_names if name not in known]
    if missing or unknown:
        words = f"lacks the column {', '.join(missing)}" if missing else f"has a column {', '.join(unknown)}"
        raise RequestError(f"{path}: this trace {words}; another program changed it. Take the original.")
    header, layers, slots = facts["header"], facts["layers"], facts["k"]
    widths = {"scores": facts["experts"]} | dict.fromkeys(("experts", "gates", "margins"), slots)
    arrays = [
        _array(path, table[name], name, (len(layers), widths[name])) if name in table.column_names else None
        for name in LISTS
    ]
    return Parts(header, _tokens(path, table, facts["lone"]), layers, *arrays, _events(path, table))


def _facts(path: Path, metadata: dict[bytes, bytes]) -> dict:
    if KEY not in metadata:
        raise RequestError(f"{path}: a parquet file, but not one of a trace. pandas.read_parquet reads it.")
    damaged = f"{path}: the header of this trace is damaged. Take the original."
    if metadata.get(CHECK) != str(zlib.crc32(metadata[KEY])).encode():
        raise RequestError(damaged)
    try:
        facts = json.loads(metadata[KEY])
        version = facts["header"]["version"]
        if isinstance(version, int) and version > VERSION:
            raise RequestError(
                f"{path}: written in version {version} of the format; this workbench reads up to {VERSION}. Update it."
            )
        numbers = (facts["k"], facts["experts"], *facts["layers"])
        if isinstance(facts["lone"], dict) and all(type(n) is int and n >= 0 for n in numbers):
            return facts
    except (KeyError, TypeError, ValueError):
        pass
    raise RequestError(damaged)


def _tokens(path: Path, table: pa.Table, lone: dict[str, list[int]]) -> pd.DataFrame:
    columns = {name: _column(path, table[name], name, kind) for name, kind in TOKENS.items()}
    try:
        for n, codes in lone.items():
            columns["text"][int(n)] = "".join(map(chr, codes))
    except (IndexError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: the header of this trace is damaged ({error}). Take the original.") from None
    return pd.DataFrame({n: pd.Series(v, dtype=object if TOKENS[n] is str else None) for n, v in columns.items()})


def _events(path: Path, table: pa.Table) -> pd.DataFrame:
    if "events" not in table.column_names:
        return pd.DataFrame(columns=list(EVENTS))
    column = table["events"].combine_chunks()
    fields = {name: _arrow(kind) for name, kind in EVENTS.items() if name != "token"}
    if column.type != pa.list_(pa.struct(fields)) or column.null_count:
        raise RequestError(f"{path}: events are {column.type} here; another program changed it. Take the original.")
    structs = column.flatten()
    frame = {"token": np.repeat(np.arange(len(column)), column.value_lengths())}
    frame |= {name: _column(path, structs.field(name), f"events.{name}", EVENTS[name]) for name in fields}
    return pd.DataFrame(frame)


def _column(path: Path, column: pa.ChunkedArray | pa.Array, name: str, kind: type) -> list | np.ndarray:
    if column.type != _arrow(kind) or column.null_count:
        kinds = f"{column.null_count} nulls" if column.null_count else f"{column.type}"
        raise RequestError(f"{path}: column {name} has {kinds}, not {_arrow(kind)}; another program changed it.")
    return column.to_pylist() if kind is str else np.asarray(column)


def _array(path: Path, column: pa.ChunkedArray, name: str, shape: tuple[int, int]) -> np.ndarray:
    kind, empty = LISTS[name]
    if column.type != pa.list_(_arrow(kind)):
        raise RequestError(f"{path}: column {name} is {column.type}, not a list; another program changed it.")
    out = np.full((len(column), *shape), empty, kind)
    start = 0
    for chunk in column.chunks:
        read = np.asarray(chunk.is_valid())
        flat = chunk.flatten()
        lengths = np.asarray(chunk.drop_null().value_lengths())
        if flat.null_count or (lengths != shape[0] * shape[1]).any():
            raise RequestError(
                f"{path}: a token's {name} are not {shape[0]} layers x {shape[1]}; another program changed it."
            )
        out[start : start + len(chunk)][read] = np.asarray(flat).reshape(len(lengths), *shape)
        start += len(chunk)
    return out


def _arrow(kind: type) -> pa.DataType:
    return pa.string() if kind is str else pa.from_numpy_dtype(kind)


def _table(parts: Parts) -> pa.Table:
    texts = parts.tokens["text"].tolist()
    lone = {n: [ord(c) for c in text] for n, text in enumerate(texts) if LONE.search(text)}
    for n in lone:  # readers of parquet want valid UTF-8; `read` puts the text back
        texts[n] = texts[n].encode("utf-8", "backslashreplace").decode()
    tokens = parts.tokens.assign(text=texts)
    columns = {name: _arrow_array(tokens[name], kind) for name, kind in TOKENS.items()}
    unread = (parts.experts < 0).all((1, 2))
    for name in ("experts", "gates", "margins"):
        columns[name] = _lists(getattr(parts, name), unread)
    experts = 0
    if parts.scores is not None:
        experts = parts.scores.shape[2]
        columns["scores"] = _lists(parts.scores, np.isnan(parts.scores).all((1, 2)))
    if len(parts.events):
        names = [name for name in EVENTS if name != "token"]
        structs = pa.StructArray.from_arrays([_arrow_array(parts.events[n], EVENTS[n]) for n in names], names)
        ends = np.searchsorted(parts.events["token"], np.arange(len(texts) + 1)).astype(np.int32)
        columns["events"] = pa.ListArray.from_arrays(pa.array(ends), structs)
    facts = {"header": parts.header, "layers": list(parts.layers), "k": parts.experts.shape[2], "experts": experts}
    text = json.dumps(facts | {"lone": lone}).encode()
    return pa.table(columns, metadata={KEY: text, CHECK: str(zlib.crc32(text))})


def _arrow_array(column: pd.Series, kind: type) -> pa.Array:
    return pa.array(column.tolist() if kind is str else column.to_numpy(), _arrow(kind))


def _lists(array: np.ndarray, empty: np.ndarray) -> pa.ChunkedArray:
    """[T, ...] as one list a token, null where `empty`. In chunks, because offsets are of 32 bits."""
    width = math.prod(array.shape[1:])
    chunks = []
    for start in range(0, len(array), ROWS):
        rows, mask = array[start : start + ROWS], empty[start : start + ROWS]
        ends = np.concatenate([[0], np.cumsum(~mask) * width]).astype(np.int32)
        values = pa.array(rows[~mask].ravel())
        chunks.append(pa.ListArray.from_arrays(pa.array(ends), values, mask=pa.array(mask)))
    return pa.chunked_array(chunks, pa.list_(_arrow(array.dtype)))
