"""What was measured before is read as it was kept."""

import json
from math import isnan

import pytest

from workbench.benchmarks.kept import OFFLOADS, offloads
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
