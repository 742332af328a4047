"""A trace comes back from its file as it was, or not at all; and a wrong one cannot be made."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from traces import random_trace

from workbench.errors import RequestError
from workbench.trace import FORMAT, VERSION, Trace, new_header
from workbench.tracefile import CHECK, KEY, ROWS

SHAPES = {
    "several sequences": {},
    "one slot": {"k": 1, "experts": 1},
    "many experts": {"k": 7, "experts": 300, "layers": (0, 5, 59), "scores": True},
    "one token": {"lengths": (1,), "scores": True},
    "no token": {"lengths": (0,)},
    "an empty sequence among others": {"lengths": (2, 0, 3), "events": 4},
    "all read but the last": {"unread": 0.0, "events": 9},
    "none read": {"unread": 1.0, "scores": True},
    "no such layer": {"layers": (), "k": 4, "lengths": (3,)},
    "more than one row group": {"lengths": (ROWS, 3), "layers": (3,), "events": 50},
}


@pytest.fixture
def trace():
    return random_trace(scores=True, events=6)


def parts(trace, **changes):
    names = ("header", "tokens", "layers", "experts", "gates", "margins", "scores", "events")
    found = {name: getattr(trace, name) for name in names}
    return {name: value.copy() if hasattr(value, "copy") else value for name, value in found.items()} | changes


def bits(trace):
    """Everything as bytes: NaN and -0 are told apart from other NaNs and 0."""
    arrays = [trace.experts, trace.gates, trace.margins, *([] if trace.scores is None else [trace.scores])]
    frames = [frame[c] for frame in (trace.tokens, trace.events) for c in frame if frame[c].dtype != object]
    words = [trace.tokens["text"].tolist(), trace.tokens["phase"].tolist(), trace.events["kind"].tolist()]
    return [(str(a.dtype), a.shape, np.asarray(a).tobytes()) for a in (*arrays, *frames)], words, trace.header


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_trace_comes_back_bit_for_bit(tmp_path, shape):
    trace = random_trace(**shape)
    trace.save(tmp_path / "a.trace")
    again = Trace.load(str(tmp_path / "a.trace"))
    assert again == trace and bits(again) == bits(trace)
    assert (again.k, again.n_experts, again.layers) == (trace.k, trace.n_experts, trace.layers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_odd_numbers_come_back_bit_for_bit(tmp_path, trace):
    odd = np.array([0x7FC00001, 0xFFC00000, 0x80000000, 0x7F800000, 1], np.uint32).view(np.float32)
    tokens = trace.tokens.copy()
    for column in ("logprob", "entropy"):
        tokens[column] = np.resize(odd, len(tokens))
    scores = np.resize(odd, trace.scores.shape)
    made = Trace(**parts(trace, tokens=tokens, scores=scores))
    made.save(tmp_path / "t")
    assert bits(Trace.load(tmp_path / "t")) == bits(made)


def test_any_text_comes_back_and_other_readers_can_read_the_file(tmp_path, trace):
    texts = ["\ud83d\ude00", "a\x00\udfff🦊", "\\ud800", "", "\r\n", "ok", "ok", "ok"]
    made = Trace(**parts(trace, tokens=trace.tokens.assign(text=pd.Series(texts, dtype=object))))
    made.save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").tokens["text"].tolist() == texts
    assert pd.read_parquet(tmp_path / "t")["text"].tolist()[:3] == ["\\ud83d\\ude00", "a\x00\\udfff🦊", "\\ud800"]


def test_pandas_reads_the_columns(tmp_path, trace):
    trace.save(tmp_path / "t")
    table = pd.read_parquet(tmp_path / "t")
    assert table["id"].tolist() == trace.tokens["id"].tolist()
    for t in range(len(trace)):
        unread = (trace.experts[t] < 0).all()
        for name in ("experts", "gates", "margins", "scores"):
            row = table[name][t]
            assert row is None if unread else row.tolist() == getattr(trace, name)[t].ravel().tolist()
    assert [len(row) for row in table["events"]] == np.bincount(trace.events["token"], minlength=len(trace)).tolist()


def test_columns_without_content_are_absent(tmp_path):
    random_trace().save(tmp_path / "t")
    assert not {"scores", "events"} & set(parquet.read_schema(tmp_path / "t").names)


def test_routing_is_the_used_slots_in_long_form(trace):
    rows = trace.routing
    assert len(rows) == (trace.experts >= 0).sum() > 0
    for row in rows.itertuples():
        at = row.token, trace.layers.index(row.layer), row.slot
        assert (row.expert, row.gate, row.margin) == (trace.experts[at], trace.gates[at], trace.margins[at])
    assert rows.equals(rows.sort_values(["token", "layer", "slot"])) and trace.routing is rows
    assert list(map(str, rows.dtypes)) == ["int64", "int32", "int8", "int16", "float32", "float32"]


def test_types_are_converted_and_nothing_is_shared_with_the_caller(trace):
    wide = trace.experts.astype(np.int64)
    made = Trace(**parts(trace, experts=wide, gates=trace.gates.astype(np.float64), tokens=trace.tokens[::1]))
    assert made == trace and (made.experts.dtype, made.gates.dtype) == (np.int16, np.float32)
    wide[:] = 0
    assert made == trace
    with pytest.raises(ValueError, match="read-only"):
        made.experts[0] = 1


def first_read(trace):
    return int(np.flatnonzero((trace.experts >= 0).all((1, 2)))[0])


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


WRONG = {
    "tokens lack the column entropy": lambda t: {"tokens": t.tokens.drop(columns="entropy")},
    "tokens have no column extra": lambda t: {"tokens": t.tokens.assign(extra=1)},
    "phase is 'prefill' or 'decode', not 'sung'": lambda t: {"tokens": t.tokens.assign(phase="sung")},
    "text of tokens must be text": lambda t: {"tokens": t.tokens.assign(text=5)},
    "id of tokens must be whole numbers that int32": lambda t: {"tokens": t.tokens.assign(id=1 << 40)},
    "id of tokens must be whole": lambda t: {"tokens": t.tokens.assign(id=0.5)},
    "position of tokens must be whole": lambda t: {"tokens": t.tokens.assign(position=np.nan)},
    "ms of tokens must be numbers": lambda t: {"tokens": t.tokens.assign(ms="fast")},
    "positions must rise": lambda t: {"tokens": t.tokens.assign(position=0)},
    "sequences must follow one another.* describes 2": lambda t: {"tokens": t.tokens.assign(sequence=2)},
    "sequences must follow": lambda t: {"tokens": t.tokens[::-1]},
    r"layers must be ascending, not \(2, 1, 4\)": lambda t: {"layers": (2, 1, 4)},
    r"experts must be \[8 tokens, 2 layers, K\], not \[8, 3, 3\]": lambda t: {"layers": (1, 2)},
    r"experts must be \[8 tokens, 3 layers, K\], not \[8, 3\]": lambda t: {"experts": t.experts[..., 0]},
    r"gates \[7, 3, 3\] must be as experts \[8, 3, 3\]": lambda t: {"gates": t.gates[1:]},
    r"margins \[8, 3, 2\] must be as experts": lambda t: {"margins": t.margins[..., 1:]},
    r"scores must be \[8, 3, 8\], not \[8, 3, 7\]": lambda t: {"scores": t.scores[..., 1:]},
    "from 0 to 7, as the config has them": lambda t: {"experts": np.where(t.experts == 0, 8, t.experts)},
    "experts must be -1": lambda t: {"experts": np.where(t.experts == 0, -2, t.experts)},
    "experts must be whole numbers that int16": lambda t: {"experts": t.experts.astype(int) + (1 << 16)},
    "an expert is there twice": lambda t: {"experts": changed(t.experts, (first_read(t), 0), 5)},
    "gates must be 0 where": lambda t: {"gates": np.ones_like(t.gates)},
    "margins must be NaN where": lambda t: {"margins": np.zeros_like(t.margins)},
    "events must be of tokens 0 to 7": lambda t: {"events": t.events.assign(token=8)},
    "events lack the column bytes": lambda t: {"events": t.events.drop(columns="bytes")},
    "the header must be JSON values": lambda t: {"header": t.header | {"sampling": {"seed": object()}}},
    "the header must be JSON": lambda t: {"header": t.header | {"sampling": {"top_p": float("nan")}}},
    "the header lacks fingerprint, config": lambda t: {"header": t.header | {"fingerprint": 3, "config": None}},
    "the header is of a 'recipe', not of a 'workbench trace'": lambda t: {"header": t.header | {"format": "recipe"}},
    "the header is of version 2": lambda t: {"header": t.header | {"version": 2}},
    "the header describes 1 of them": lambda t: {"header": t.header | {"sequences": [{}]}},
    "the header must be a dict": lambda t: {"header": [1]},
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_trace_cannot_be_made(trace, words):
    with pytest.raises(RequestError, match=words):
        Trace(**parts(trace, **WRONG[words](trace)))


def test_a_missing_folder_is_said_and_not_made(tmp_path, trace):
    with pytest.raises(RequestError, match="there is no folder .*nowhere"):
        trace.save(tmp_path / "nowhere" / "t")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path, trace, monkeypatch):
    trace.save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()

    def full(table, where, *args, **options):
        Path(where).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(RequestError, match=r"saving failed \(no space left on device\)"):
        random_trace(seed=5).save(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_not_replaced_by_a_file(tmp_path, trace):
    (tmp_path / "t").mkdir()
    with pytest.raises(RequestError, match="saving failed"):
        trace.save(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def rewritten(change):
    """As another program would: the table of a good file changed, metadata kept."""

    def write(path):
        table = parquet.read_table(path)
        parquet.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)

    return write


def column(name, values, kind):
    def change(table):
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(values(table[name].to_pylist()), kind or table[name].type))

    return rewritten(change)


def header(change, check=True):
    def write(path):
        table = parquet.read_table(path)
        facts = json.loads(table.schema.metadata[KEY])
        change(facts)
        text = json.dumps(facts).encode()
        metadata = {KEY: text, CHECK: str(zlib.crc32(text)) if check else table.schema.metadata[CHECK]}
        parquet.write_table(table.replace_schema_metadata(metadata), path)

    return write


def first_list(change):
    def values(lists):
        at = next(n for n, each in enumerate(lists) if each is not None)
        return [change(each) if n == at else each for n, each in enumerate(lists)]

    return values


MALFORMED = {
    "there is no such file": lambda path: path.unlink(),
    "t: there is no such file": lambda path: (path.unlink(), path.mkdir()),
    "no parquet file, or a damaged one": lambda path: path.write_text("token,expert\n1,2\n"),
    "no parquet file": lambda path: path.write_bytes(b""),
    "a parquet file, but not one of a trace": lambda path: pd.DataFrame({"a": [1]}).to_parquet(path),
    "written in version 2 .* reads up to 1. Update it": header(lambda f: f["header"].update(version=2)),
    "not whole: the header is of version 0": header(lambda f: f["header"].update(version=0)),
    "the header is of a 'note'": header(lambda f: f["header"].update(format="note")),
    "the header of this trace is damaged": header(lambda f: f["header"].update(model="another"), check=False),
    "header of this trace is damaged": header(lambda f: f.pop("layers")),
    "of this trace is damaged": header(lambda f: f.update(k="three")),
    "this trace is damaged": header(lambda f: f.update(lone={"99": [55296]})),
    "header lacks sequences": header(lambda f: f["header"].pop("sequences")),
    "layers must be ascending": header(lambda f: f["layers"].reverse()),
    "experts are not 2 layers x 3": header(lambda f: f["layers"].pop()),
    "experts are not 3 layers x 4": header(lambda f: f.update(k=4)),
    r"scores must be .8, 3, 4., not .8, 3, 8.": header(lambda f: f["header"]["config"].update(n_routed_experts=4)),
    "scores are not 3 layers x 7": header(lambda f: f.update(experts=7)),
    "lacks the column gates; another program": rewritten(lambda table: table.drop_columns("gates")),
    "lacks the column phase": rewritten(lambda table: table.drop_columns("phase")),
    "has a column mood": rewritten(lambda table: table.append_column("mood", table["id"])),
    "margins are not 3 layers x 3": column("margins", first_list(lambda each: each[1:]), None),
    "gates are not 3 layers": column("gates", first_list(lambda each: [None, *each[1:]]), None),
    "experts is list.*int64": column("experts", lambda lists: lists, pa.list_(pa.int64())),
    "from 0 to 7": column("experts", first_list(lambda each: [8, *each[1:]]), None),
    "column id has double, not int32": column("id", lambda ids: ids, pa.float64()),
    "column text has 8 nulls": column("text", lambda texts: [None] * len(texts), None),
    "events are string here": column("events", lambda lists: ["hit"] * len(lists), pa.string()),
    "events.kind has": column(
        "events", lambda lists: [[each | {"kind": None} for each in row] for row in lists], None
    ),
    "gates must be 0 where a slot": column("experts", first_list(lambda each: [-1, *each[1:]]), None),
}  # fmt: skip


@pytest.mark.parametrize("words", MALFORMED)
def test_a_file_that_is_no_whole_trace_is_refused_by_name(tmp_path, trace, words):
    path = tmp_path / "t"
    trace.save(path)
    MALFORMED[words](path)
    with pytest.raises(RequestError, match=words) as found:
        Trace.load(path)
    assert str(found.value).startswith(f"{path}: ")


def test_a_file_cut_anywhere_is_refused(tmp_path, trace):
    trace.save(tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "t").write_bytes(whole[:length])
        with pytest.raises(RequestError, match="no parquet file, or a damaged one"):
            Trace.load(tmp_path / "t")


def test_a_file_with_a_bad_byte_is_refused_or_the_same(tmp_path, trace):
    trace.save(tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        (tmp_path / "t").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert Trace.load(tmp_path / "t") == trace
        except RequestError:
            refused += 1
    assert refused > 100


def test_a_sequence_stands_alone(trace):
    one = trace.sequence(1)
    assert one.tokens["text"].tolist() == trace.tokens["text"].tolist()[5:] and set(one.tokens["sequence"]) == {0}
    assert one.header["sequences"] == [{"label": "text 1", "seed": 1}]
    assert np.array_equal(one.experts, trace.experts[5:]) and np.array_equal(one.scores, trace.scores[5:], True)
    assert one.events["token"].tolist() == [t - 5 for t in trace.events["token"] if t >= 5]
    for number in (-1, 2):
        with pytest.raises(RequestError, match=f"no sequence {number}: this trace has 2"):
            trace.sequence(number)


def test_joined_traces_can_be_taken_apart_again(tmp_path):
    settings = [{"edits": [{"kind": "TopK", "k": 1}]}, {"sampling": {"seed": 3}}, {}]
    traces = [random_trace((n + 1,), seed=n, events=n, **each) for n, each in enumerate(settings)]
    joined = Trace.join(traces)
    assert joined.tokens["sequence"].tolist() == [0, 1, 1, 2, 2, 2]
    assert (joined.header["edits"], joined.header["sampling"], joined.header["model"]) == (None, None, "chance")
    assert [entry["edits"] for entry in joined.header["sequences"]] == [[{"kind": "TopK", "k": 1}], [], []]
    assert [joined.sequence(n) for n in range(3)] == traces
    twice = Trace.join([joined, *traces])
    assert [twice.sequence(n) for n in range(6)] == traces * 2
    twice.save(tmp_path / "t")
    assert Trace.load(tmp_path / "t") == twice


def test_what_all_have_stays_in_the_header():
    traces = [random_trace(seed=n, edits=[{"kind": "TopK"}]) for n in range(2)]
    header = Trace.join(traces).header
    assert header["edits"] == [{"kind": "TopK"}] and "edits" not in header["sequences"][0]


def test_scores_that_only_some_have_are_nan_for_the_others():
    with_scores, without = random_trace(scores=True), random_trace(seed=1)
    joined = Trace.join([with_scores, without])
    assert np.array_equal(joined.sequence(0).scores, with_scores.sequence(0).scores, True)
    assert np.isnan(joined.sequence(3).scores).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (1, 2, 5)}, r"different layers .*\(1, 2, 4\) and \(1, 2, 5\)"),
        ({"k": 2}, r"different number of slots .*\(3 and 2\)"),
        ({"experts": 9}, "different config"),
    ],
)
def test_traces_of_different_form_are_not_joined(trace, options, words):
    with pytest.raises(RequestError, match=words):
        Trace.join([trace, random_trace(**options)])


def test_traces_of_other_weights_are_not_joined(trace):
    other = Trace(**parts(trace, header=trace.header | {"fingerprint": "1" * 8}))
    with pytest.raises(RequestError, match="weights .*00000000 and 11111111"):
        Trace.join([trace, other])
    with pytest.raises(RequestError, match="no trace to join"):
        Trace.join([])


@pytest.mark.parametrize("name", ["tokens", "experts", "gates", "scores", "events", "header", "layers"])
def test_traces_that_differ_in_anything_are_not_equal(trace, name):
    at = first_read(trace)
    change = {
        "tokens": trace.tokens.assign(ms=1.0),
        "experts": changed(trace.experts, at, trace.experts[at, :, ::-1]),
        "gates": changed(trace.gates, at, 0.5),
        "scores": None,
        "events": trace.events.assign(bytes=1),
        "header": trace.header | {"model": "another"},
        "layers": (1, 2, 5),
    }[name]
    assert trace == Trace(**parts(trace)) and trace != Trace(**parts(trace, **{name: change})) and trace != 1


def test_it_says_what_it_is_in_one_line_and_in_html(trace):
    shape = "3 layers of 3 from 8 experts, router scores, 6 events"
    assert repr(trace) == f"Trace(chance, 2 sequences, 5 prompt tokens and 3 generated, {shape})"
    page = Trace(**parts(trace, tokens=trace.tokens.assign(text="<b>"), header=trace.header | {"model": "<i>"}))
    assert "&lt;b&gt;" in page._repr_html_() and "<b>" not in page._repr_html_() and "<i>" not in page._repr_html_()
    assert "and 88 more tokens" in random_trace((100,))._repr_html_()


def test_a_new_header_says_what_wrote_it():
    header = new_header("m", "f", {"n_routed_experts": 2}, sampling={"stop": ("a",)})
    assert (header["format"], header["version"]) == (FORMAT, VERSION)
    assert {"workbench", "python", "numpy"} <= set(header["versions"]) and header["created"].endswith("+00:00")
    assert json.loads(json.dumps(header)) | {"sampling": {"stop": ("a",)}} == header


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
from traces import random_trace
from workbench.lens.difference import diff
from workbench.lens.load import counts, load, null_load
from workbench.lens.reuse import hit_rates, reuse_distances
from workbench.trace import Trace
trace = random_trace(scores=True, events=3)
trace.save(sys.argv[2])
again = Trace.load(sys.argv[2])
assert again == trace and "torch" not in again.header["versions"]
print(diff(again, trace), len(load(again)), len(counts(again)), len(null_load(again, rounds=2)))
print(len(hit_rates(again, [1, 5])), len(reuse_distances(again)) == len(again.routing))
"""


def test_all_of_it_works_without_torch(tmp_path):
    arguments = [sys.executable, "-c", WITHOUT_TORCH, str(Path(__file__).parent), str(tmp_path / "t")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout and done.stdout.split()[-2:] == ["2", "True"]
