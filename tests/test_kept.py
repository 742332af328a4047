"""What was measured before is read as it was kept."""

import json
from math import isnan

import pytest

from workbench.benchmarks.kept import KERNELS, OFFLOADS, PEERS, SPEEDS, kernels, offloads, peers, speeds
from workbench.errors import RequestError


def keep(folder, within, device="cpu", speeds=(3.0, 1.0, 8.0), hits=(0.25, 0.5, 0.75), synthetic=True):
    about = {"model": "shape", "parameters": 235_741_434_880, "within": within, "synthetic": synthetic}
    about |= {"date": "2026-11-25T14:00:00+00:00", "cpu": "a processor, 2 cores"}
    runs = [[{"traffic": {"hit_rate": hit}}] for hit in hits] or [[{"seconds": []}]] * len(speeds)
    rounds = [{"tokens_per_second": s, "runs": run, "plan": {"device": device}} for s, run in zip(speeds, runs)]
    path = folder / f"offload-{within}-2026-11-25.json"
    path.write_text(json.dumps({"about": about, "rounds": rounds}))
    return path


def test_a_run_is_a_row(tmp_path):
    keep(tmp_path, "16GiB-96GiB")
    table = offloads(tmp_path)
    assert table.index.tolist() == ["shape"] and tuple(table.columns) == OFFLOADS
    assert table.iloc[0].tolist() == [
        "random", 235.74143488, "CPU in place of a GPU", "16GiB", "96GiB", 3.0, 0.5, "2026-11-25",
        "a processor, 2 cores",
    ]  # fmt: skip


def test_where_it_was_computed(tmp_path):
    keep(tmp_path, "4GB", hits=(), synthetic=False)
    keep(tmp_path, "8GiB-32GiB", device="cuda")
    table = offloads(tmp_path).set_index("main memory")
    assert table["computed on"].to_dict() == {"4GB": "CPU", "32GiB": "GPU"}
    assert table["near"].to_dict() == {"4GB": "", "32GiB": "8GiB"}
    assert isnan(table.loc["4GB", "hit rate"]) and table["weights"].tolist() == ["trained", "random"]


def test_nothing_kept_is_no_row(tmp_path):
    (tmp_path / "cache-2026-11-25.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert offloads(folder).empty and tuple(offloads(folder).columns) == OFFLOADS


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"about": {}, "rounds": []}'])
def test_what_is_no_result_is_named(tmp_path, text):
    keep(tmp_path, "4GB").write_text(text)
    with pytest.raises(RequestError, match="offload-4GB-2026-11-25.json"):
        offloads(tmp_path)


def put(folder, kind, rows, **more):
    about = {"model": "pocket", "dtype": "float32", "threads": 2, "date": "2026-11-25T14:00:00+00:00"}
    about |= {"cpu": "a processor, 2 cores", "device": "a device"} | more
    path = folder / f"{kind}-2026-11-25-pocket-float32-2t.json"
    path.write_text(json.dumps({"about": about, "rows": rows}))
    return path


def test_a_row_beside_others_is_a_row(tmp_path):
    alone = {"name": "whole engine at 1", "ours": [4.0], "theirs": []}
    put(
        tmp_path, "cpu", [{"name": "decode at 0", "ours": [3.0, 9.0, 1.0], "theirs": [2.0], "llama": [1.0, 2.0]}, alone]
    )
    table = peers(tmp_path)
    assert tuple(table.columns) == PEERS and table.index.tolist() == ["pocket"] * 2
    assert table.iloc[0].tolist() == [
        "decode at 0", "float32", 2, 3.0, 2.0, 1.5, "2026-11-25", "a processor, 2 cores",
    ]  # fmt: skip
    assert table.iloc[1][["transformers", "llama.cpp"]].isna().all() and table["workbench"].tolist() == [3.0, 4.0]


def test_a_way_of_decoding_is_a_row_beside_its_bound(tmp_path):
    sides = {"workbench": [5.0, 1.0, 2.0], "operation by operation": [1.0]}
    put(tmp_path, "decode", [{"name": "decode at 0", "sides": sides, "bound": 8.0, "binds": "bytes a token reads"}])
    put(tmp_path, "batch", [{"name": "batch of 4", "sides": {"workbench": [3.0]}, "bound": 4.0, "binds": "operations"}])
    table = speeds("decode", tmp_path)
    assert tuple(table.columns) == SPEEDS and table["side"].tolist() == list(sides)
    assert table["share"].tolist() == [0.25, 0.125] and set(table["device"]) == {"a device"}
    assert speeds("batch", tmp_path)["what"].tolist() == ["batch of 4"] and speeds("prefill", tmp_path).empty


def test_a_shape_of_a_kernel_is_a_row(tmp_path):
    row = {"kernel": "rms_norm", "shape": "a token", "least": 2.0, "binds": "bytes", "wrong": ""}
    rows = [row | {"ours": [8.0, 3.0, 4.0], "peer": [6.0]}, row | {"ours": [], "peer": [], "wrong": "WRONG: far"}]
    put(tmp_path, "kernels", rows)
    table = kernels(tmp_path)
    assert tuple(table.columns) == KERNELS and table.index.tolist() == ["rms_norm"] * 2
    assert table.iloc[0].tolist() == ["a token", 2.0, "bytes", 4.0, 0.5, 6.0, "", "2026-11-25", "a device"]
    assert isnan(table.iloc[1]["share"]) and table["wrong"].tolist() == ["", "WRONG: far"]


@pytest.mark.parametrize("kind", ["cpu", "decode", "batch", "kernels"])
@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"about": {}, "rows": [{}]}', '{"about": {}, "rows": [1]}'])
def test_a_result_of_another_kind_is_named(tmp_path, kind, text):
    put(tmp_path, kind, []).write_text(text)
    read = {"cpu": peers, "kernels": kernels}.get(kind, lambda folder: speeds(kind, folder))
    with pytest.raises(RequestError, match=f"{kind}-2026-11-25.*bench {kind}"):
        read(tmp_path)


def test_what_is_kept_in_the_project_is_read():
    assert all(len(table.columns) for table in (offloads(), peers(), speeds("decode"), speeds("batch"), kernels()))
    assert (peers()["workbench"] > 0).all() and not peers().empty
