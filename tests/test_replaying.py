"""A saved trace is opened without a model: as text, or as a notebook that JupyterLab is started on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from traces import random_trace

from workbench import lab
from workbench.__main__ import main
from workbench.edits import Ablate, to_dict
from workbench.trace import Trace

ROOT = Path(__file__).parent.parent


@pytest.fixture
def saved(tmp_path):
    """The files of two traces of chance, the second with two sequences."""
    paths = tmp_path / "one trace.parquet", tmp_path / "b.parquet"
    random_trace((6,), edits=[to_dict(Ablate(2, (3,)))]).save(paths[0])
    random_trace((7, 4), seed=1).save(paths[1])
    return [str(path) for path in paths]


def test_a_saved_trace_is_told_in_text_without_torch_or_jupyter(saved):
    code = """import sys
for name in ("torch", "IPython", "ipywidgets", "jupyterlab"): sys.modules[name] = None
from workbench.__main__ import main
sys.exit(main(["replay", "--text", sys.argv[1]]))"""
    answer = subprocess.run([sys.executable, "-c", code, saved[0]], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "chance" in answer.stdout and "without expert 3 in layer 2" in answer.stdout
    assert "max_over_mean" in answer.stdout and "strongest expert of the first 6 tokens" in answer.stdout


def test_an_unknown_option_is_refused_where_jupyterlab_is_not_started(saved):
    with pytest.raises(SystemExit):
        main(["replay", "--text", saved[0], "--colour"])


def test_two_traces_are_compared_in_text(saved, capsys):
    assert main(["replay", "--text", *saved]) == 0
    text = capsys.readouterr().out
    assert f"a is {saved[0]}, b is {saved[1]}" in text and "parts at position" in text
    assert "labels: text 0 1, text 1 1" in text


def cells(notebook: Path) -> list[str]:
    return [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]


def test_replay_opens_a_notebook_whose_cells_show_the_trace(saved, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(lab, "serve", lambda *given: served.append(given) or 0)
    assert main(["replay", saved[0], "--folder", str(tmp_path / "mine"), "--no-browser"]) == 0
    assert served == [(tmp_path / "mine", ["--no-browser"], "one trace.ipynb")]
    sources = cells(tmp_path / "mine" / "one trace.ipynb")
    code = "\n".join(sources[1:])
    names = {}
    exec(code, names)
    assert names["trace"] == Trace.load(saved[0]) and "wb.replay(trace)" in code


def test_replay_of_two_shows_their_difference_side_by_side(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "serve", lambda *given: 0)
    assert main(["replay", *saved, "--folder", str(tmp_path / "mine")]) == 0
    code = "\n".join(cells(tmp_path / "mine" / "one trace-vs-b.ipynb")[1:])
    assert "wb.diff(a, b)" in code and "SideBySide(a, b.sequence(n)" in code and "wb.replay(b.sequence(0))" in code
    exec(code, {})


def test_what_was_written_in_a_replay_stays(saved, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(lab, "serve", lambda *given: served.append(given[2]) or 0)
    folder = tmp_path / "mine"
    main(["replay", saved[1], "--folder", str(folder)])
    edited = (folder / "b.ipynb").read_text().replace("Run all cells", "My notes")
    (folder / "b.ipynb").write_text(edited)
    main(["replay", saved[1], "--folder", str(folder)])
    assert (folder / "b.ipynb").read_text() == edited
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "b.parquet"
    random_trace((3,)).save(other)
    main(["replay", str(other), "--folder", str(folder)])
    assert (folder / "b.ipynb").read_text() == edited and served == ["b.ipynb", "b.ipynb", "b-2.ipynb"]
    (folder / "c.ipynb").write_text("not a notebook of ours")
    random_trace((3,)).save(tmp_path / "c.parquet")
    main(["replay", str(tmp_path / "c.parquet"), "--folder", str(folder)])
    assert (folder / "c.ipynb").read_text() == "not a notebook of ours" and served[-1] == "c-2.ipynb"


def test_a_bad_file_is_refused_before_anything_starts(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "serve", lambda *given: pytest.fail("served"))
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(Path(saved[0]).read_bytes()[:-100])
    foreign = tmp_path / "foreign.parquet"
    random_trace((4,), layers=(7, 9)).save(foreign)
    for files in (
        [str(bad)],
        [saved[0], str(bad)],
        [str(tmp_path / "no.parquet")],
        [saved[0], str(foreign)],
        saved * 2,
    ):
        assert main(["replay", *files, "--folder", str(tmp_path / "mine")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "mine").exists()


def test_the_notebook_of_a_replay_is_found_by_jupyterlab_whatever_its_name(tmp_path):
    command = lab.command(tmp_path / "my replays", [], "ö one.ipynb")
    assert "--LabApp.default_url=/lab/tree/my%20replays/%C3%B6%20one.ipynb" in command


def test_a_reader_that_has_seen_enough_is_no_error(saved):
    command = f'"{sys.executable}" -m workbench replay --text "{saved[0]}" | head -n 1'
    answer = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert answer.stderr == "" and len(answer.stdout.splitlines()) == 1
