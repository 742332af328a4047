"""The measured rows of README.md: current, and every figure in them from the results files."""

import json
import random
import re
import shutil
from math import prod
from pathlib import Path
from statistics import median

import pytest

from workbench.benchmarks import table
from workbench.benchmarks.measure import RESULTS
from workbench.errors import WorkbenchError

README = Path(__file__).parent.parent / "README.md"
NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?")  # not that of fp32, V2 or Q4_0
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def results(tmp_path):
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def change(path: Path, edit, to: Path | None = None) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    edit(result)
    (to or path).write_text(json.dumps(result), encoding="utf-8")


def of(results: Path, *words: str) -> list[table.Row]:
    return [row for row in table.rows(results) if all(word in str(row) for word in words)]


def newest(kind: str) -> list[tuple[Path, table.Row]]:
    """Each file that a row of this kind links to, with the row."""
    linked = [(re.search(r"\(kernels/results/(.+)\)", row.where), row) for row in table.rows()]
    return [(RESULTS / name[1], row) for name, row in linked if name and name[1].startswith(kind)]


def test_the_readme_is_current():
    text = README.read_text(encoding="utf-8")
    assert text == table.current(text), "say: python -m workbench.benchmarks.table"


def test_no_result_is_quoted_by_hand():
    """What links to a results file stands between the marks, where it is written anew."""
    text = README.read_text(encoding="utf-8")
    outside = text[: text.index(table.START)] + text[text.index(table.END) :]
    assert not re.findall(r"kernels/results/\S+\.json", outside)


def test_a_figure_edited_by_hand_is_put_right():
    text = README.read_text(encoding="utf-8")
    start, end = text.index(table.START), text.index(table.END)
    places = [match.start() for match in re.finditer(r"\d", text[start:end])]
    at = start + random.choice(places)
    edited = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    assert edited != text == table.current(edited)


def test_the_rest_of_the_page_stays_as_it_is():
    page = f"before | it\n\n{table.START}\nanything\n{table.END}\n\nafter | it\n"
    made = table.current(page)
    assert made.startswith("before | it\n\n<!--") and made.endswith("-->\n\nafter | it\n")
    assert "anything" not in made and table.current(made) == made


@pytest.mark.parametrize("page", ["", table.START, table.END, f"{table.END}\n{table.START}", 2 * table.START])
def test_a_page_without_a_place_is_refused(page):
    with pytest.raises(WorkbenchError, match="no place for the measured rows"):
        table.current(page)


def test_the_table_is_sound_markdown():
    text = README.read_text(encoding="utf-8")
    lines = text[text.index(table.START) : text.index(table.END)].splitlines()
    assert lines[1] == lines[-1] == ""  # a comment that touched a table would be part of it, or end it
    cells = [re.split(r"(?<!\\)\|", line) for line in lines[2:-1]]
    assert {len(row) for row in cells} == {len(table.HEAD) + 2}
    for row in cells[2:]:
        assert not row[0] and not row[-1] and all(cell.strip() for cell in row[1:-1])
        assert all(cell.count("`") % 2 == 0 for cell in row)
    for name in re.findall(r"\((kernels/results/\S+?)\)", text):
        assert (README.parent / name).is_file()


def test_what_a_file_says_cannot_break_the_table():
    assert str(table.Row("a|b", "c\n  d", "`e`", "f")) == r"| a\|b | c d | `e` | f |"


def test_a_changed_figure_changes_its_row(results):
    path = next(path for path, _ in newest("cpu"))
    [before] = of(results, path.name)
    change(path := results / path.name, lambda result: result["rows"][2].update(ours=[123456.0] * 5))
    [after] = of(results, path.name)
    assert "123,456" in after.figures and "123,456" not in before.figures
    theirs = median(json.loads(path.read_text(encoding="utf-8"))["rows"][2]["theirs"])
    assert f"123,456, {123456 / theirs:.1f}x" in after.figures


def test_a_newer_file_takes_the_place_of_an_older_one(results):
    path = next(path for path, _ in newest("offload-4GB"))
    newer = results / re.sub(r"\d{4}-\d\d-\d\d", "2031-02-03", path.name)
    count = len(table.rows(results))
    change(path, lambda result: result["about"].update(date="2031-02-03T04:05:06+00:00"), newer)
    assert len(table.rows(results)) == count
    assert not of(results, path.name) and "3 February 2031" in of(results, newer.name)[0].where
    change(newer, lambda result: result["about"].update(date="2001-02-03T04:05:06+00:00"))
    assert of(results, path.name) and not of(results, newer.name), "it is the date inside that counts"


def test_models_types_threads_and_budgets_have_rows_of_their_own(results):
    path = next(path for path, _ in newest("offload-4GB"))
    for name in (path.name.replace("4GB", "5GB"), path.name.replace("-2t", "-3t"), path.name.replace("v2-lite", "v9")):
        shutil.copy(path, results / name)
        assert of(results, name) and of(results, path.name)


@pytest.mark.parametrize("name", ["sorcery-2026-11-25-pocket-float32-1t.json", "notes.json"])
def test_an_unknown_kind_is_a_clear_error(results, name):
    (results / name).write_text(json.dumps({"about": {"date": "2026-11-25T00:00:00+00:00"}}))
    with pytest.raises(WorkbenchError, match=rf"{name}: no row .* Add a function for its kind to KINDS"):
        table.rows(results)


def test_a_file_that_lacks_a_figure_is_named(results):
    path = results / next(path for path, _ in newest("probes")).name
    change(path, lambda result: result.pop("decode"))
    with pytest.raises(WorkbenchError, match=f"{path.name} lacks .*decode"):
        table.rows(results)
    path.write_text("{")
    with pytest.raises(WorkbenchError, match=f"{path.name} is no result"):
        table.rows(results)


def figures(text: str) -> list[str]:
    return NUMBER.findall(text)


def about(result: dict) -> set[float]:
    return {result["about"]["parameters"] / 1e9, result["about"]["parameters"] / 1e6}


def unexplained(text: str, known: set[float]) -> list[str]:
    """Figures of `text` that are none of the `known`, rounded as they are written."""
    lost = []
    for figure in figures(text):
        digits = len(figure.partition(".")[2])
        if float(figure.replace(",", "")) not in {round(abs(one), digits) for one in known}:
            lost.append(figure)
    return lost


def test_every_figure_of_cpu_is_in_its_file():
    found = newest("cpu")
    assert found
    for path, row in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        known, llama = about(result), []
        for one in result["rows"]:
            ours, theirs = one["ours"], one["theirs"]
            known |= {median(ours), *(float(word.replace(",", "")) for word in figures(one["name"]))}
            if theirs:
                each = [a / b for a, b in zip(ours, theirs, strict=True)]
                known |= {median(ours) / median(theirs), min(each), max(each)}
            if one.get("llama"):
                llama.append(median(ours) / median(one["llama"]))
        known |= {len(llama), min(llama), max(llama), prod(llama) ** (1 / len(llama))}
        spoken = row.what.replace(" 28m ", " ") + row.figures
        assert unexplained(spoken, known) == [], path.name
        assert result["ratio_to_llama"] == pytest.approx(prod(llama) ** (1 / len(llama)))


def test_every_figure_of_offload_is_in_its_file():
    found = newest("offload")
    assert found
    for path, row in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        rounds, plan = result["rounds"], result["rounds"][-1]["plan"]
        runs = [run for one in rounds for run in one["runs"]]
        known = about(result) | {result["about"]["threads"], plan["ram"] / 1e9, (plan["vram"] or 0) / 2**30}
        known |= {8 * sum(plan["disk"].values()) / result["about"]["parameters"], result["about"]["context"]}
        known |= {plan["slots"], plan["experts"], len(runs), len(runs[0]["seconds"])}
        known |= {100 * max(map(abs, result["errors"].values()))}
        known |= {max(one[name] for one in result["fences"]) / 1e9 for name in ("peak", "limit")}
        for speeds in ([one[f"{kind}tokens_per_second"] for one in rounds] for kind in ("", "bare_")):
            known |= {min(speeds), median(speeds), max(speeds)}
        speed = median(one["tokens_per_second"] for one in rounds)
        read = [run["traffic"]["phases"]["answer"] for run in runs if "traffic" in run]
        needs = [plan["bytes_per_token"] / result["rates"]["memory"]]
        if read:
            disk = sum(one["disk_bytes"] for one in read) / sum(one["tokens"] for one in read)
            needs.append(disk / result["rates"]["disk"])
            if link := result["rates"]["link"]:
                needs.append(sum(one["link_bytes"] for one in read) / sum(one["tokens"] for one in read) / link)
            for name in ("hit_rate", "oracle", "chance"):
                known.add(100 * median(run["traffic"][name] for run in runs))
        known.add(100 * max(needs) * speed)
        held = f"{plan['slots']:,} of" if read else "all"
        assert f"residents, {held} {plan['experts']:,} experts" in row.figures, path.name
        if result["llama"]:
            bare, theirs = [one["bare_tokens_per_second"] for one in rounds], result["llama"]["speeds"]
            each = [a / b for a, b in zip(bare, theirs, strict=True)]
            known |= {median(bare) / median(theirs), min(each), max(each)}
        assert unexplained(row.what + row.figures, known) == [], path.name


def test_what_stands_in_and_what_was_missed_is_said(results):
    card, probes = (next(row for _, row in newest(kind)) for kind in ("offload-16GiB", "probes"))
    assert "Main memory stands in for the card" in card.figures
    path = results / next(path for path, _ in newest("probes")).name
    recorder = "routing of every token recorded"
    said = {"MISSED": "misses", "met": "keeps", "open: run more rounds": "open around"}
    for verdict, words in said.items():
        change(path, lambda result, verdict=verdict: result["decode"][3].update(verdict=verdict))
        assert re.search(rf"{recorder} \S+ % \(.+?\), {words} its aim of 2 %", of(results, path.name)[0].figures)
    assert probes.where.startswith("[1 of 2 shared CPU cores")


def speeds(device: str, kind: str) -> dict:
    facts = {"date": "2031-01-02T03:04:05+00:00", "model": "v2-lite", "dtype": "bfloat16", "threads": 8}
    facts |= {"cpu": "Some, 16 cores", "parameters": 15_706_484_224, "device": device}
    if kind == "kernels":
        timed = {"kernel": "mla_decode", "shape": "a", "ours": [20.0], "peer": [50.0], "median": 20.0}
        timed |= {"peer_median": 50.0, "share": 0.75, "wrong": ""}
        wrong = timed | {"shape": "b", "ours": [], "peer": [], "median": None, "share": None, "wrong": "WRONG: x | y"}
        return {"about": facts, "rows": [timed, timed | {"share": 0.5}, wrong]}
    sides = {"workbench": [100.0, 120.0, 110.0], "routing recorded": [99.0, 99.0, 99.0]}
    sides |= {"transformers, slow": [5.0, 5.0, 5.0], "transformers, fast": [50.0, 60.0, 44.0]}
    return {"about": facts, "rows": [{"name": f"{kind} at 7", "sides": sides, "share": 0.41}]}


def test_what_no_gpu_was_asked_yet_stays_open(tmp_path):
    [row] = table.rows(tmp_path)
    assert row.what == "GPU: not yet measured" and "mla_decode" in row.figures and row.command == "`make bench-gpu`"
    for number, kind in enumerate(table.AWAITED):
        path = tmp_path / f"{kind}-2031-01-02-v2-lite-bfloat16-8t.json"
        path.write_text(json.dumps(speeds("Some, 16 cores", kind)))
        assert table.rows(tmp_path)[-1].what == "GPU: not yet measured", "a CPU measured it"
        assert table.AWAITED[kind] in table.rows(tmp_path)[-1].figures
        path.write_text(json.dumps(speeds(H100, kind)))
        assert len(of(tmp_path, f"[{H100}, 2 January 2031](kernels/results/{path.name})")) == 1
        assert not of(tmp_path, table.AWAITED[kind])
        assert len(of(tmp_path, "not yet measured")) == (number + 1 < len(table.AWAITED))


def test_speeds_are_beside_the_fastest_setting_of_transformers(tmp_path):
    (tmp_path / "decode-2031-01-02-v2-lite-bfloat16-8t.json").write_text(json.dumps(speeds(H100, "decode")))
    assert table.rows(tmp_path)[0].figures == (
        "decode at 7 110 tokens/s (100 to 120), 41 % of the limit, 2.20x (2.00x to 2.50x) transformers, "
        "with routing recorded 90 % of that speed"
    )


def test_a_kernel_that_was_wrong_is_not_passed_over(tmp_path):
    (tmp_path / "kernels-2031-01-02-kernels-bfloat16-8t.json").write_text(json.dumps(speeds(H100, "kernels")))
    row = table.rows(tmp_path)[0]
    assert row.figures == (
        "`mla_decode` 50 % to 75 %, shapes: 2, 2.50x torch's own; NOT timed: `mla_decode` b, WRONG: x | y"
    )
    assert r"WRONG: x \| y" in str(row)
