"""What every notebook keeps to, whatever it teaches. That they run is for nbmake to show."""

import json
import re
from pathlib import Path

import pytest

from workbench import exercises

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES, MAX_WIDTH = 12, 105
SOLUTION = re.compile(r"<summary>Solution</summary>\s+```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r"^(check_(\w+))\(\2\)$", re.MULTILINE)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def in_tests(cell: dict) -> str:
    """What nbmake runs after the cell, unseen by the reader."""
    return "\n".join(cell["metadata"].get("nbmake", {}).get("post_cell_execute", []))


notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_they_are_numbered_from_the_start():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n:02d}" for n in range(len(NOTEBOOKS))]


@notebook
def test_what_is_committed_has_no_trace_of_a_run(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 300_000 and "widgets" not in document["metadata"]
    assert document["metadata"]["kernelspec"]["name"] == "python3"
    for cell in document["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"nbmake", "tags"}
    names = [cell["id"] for cell in document["cells"]]
    assert len(set(names)) == len(names)


@notebook
def test_a_reader_learns_at_once_what_it_takes(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    first = document["cells"][0]
    assert first["cell_type"] == "markdown" and text(first).startswith("# ")
    header = "\n".join(text(cell) for cell in document["cells"][:3] if cell["cell_type"] == "markdown")
    for part in ("**Goals.**", "**Prerequisites:**", "**Time:**", "**Hardware:**", "**Model:**"):
        assert part in header
    assert len(re.findall(r"^- ", header, re.MULTILINE)) >= 3


@notebook
def test_a_model_answers_in_the_first_cell_that_runs(path):
    first = text(cells(path, "code")[0])
    assert "import workbench as wb" in first and "wb.load()" in first


def test_the_tour_begins_with_the_panel():
    first = text(cells(FOLDER / "00_start_here.ipynb", "code")[0])
    assert first.split("\n") == ["import workbench as wb", "", "bench = wb.load()", "panel = wb.chat(bench)", "panel"]


@notebook
def test_a_cell_fits_the_eye(path):
    for cell in cells(path, "code"):
        lines = [line for line in text(cell).split("\n") if line.strip()]
        assert len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_WIDTH, text(cell)
        assert not re.search(r"^\s*(class |[%!])", text(cell), re.MULTILINE), "logic and commands live in the package"


@notebook
def test_no_path_of_anyones_machine(path):
    for cell in cells(path, "code") + cells(path, "markdown"):
        assert not re.search(r"""["'(](/|~/|[A-Za-z]:\\)""", text(cell)), text(cell)


@notebook
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", text(cell)):
            assert target.startswith("https://") or (FOLDER / target).exists(), target


@notebook
def test_the_end_leads_to_the_next_or_back_to_the_tour(path):
    following = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :][:1] or NOTEBOOKS[:1]
    end = text(cells(path, "markdown")[-1])
    assert any(f"]({other.name})" in end for other in (*following, *NOTEBOOKS[:1]))


@notebook
def test_what_can_be_opened_is_closed(path):
    for cell in cells(path, "markdown"):
        said = text(cell)
        assert said.count("<details>") == said.count("</details>") == said.count("<summary>")


@notebook
def test_every_guess_is_made_in_the_tests_too(path):
    for cell in cells(path, "code"):
        for name in re.findall(r"^(\w+) = predict\(", text(cell), re.MULTILINE):
            assert f"{name}.guess(" in in_tests(cell) and f"{name}.reveal()" in in_tests(cell)


@notebook
def test_the_tests_look_at_what_was_computed(path):
    code = cells(path, "code")
    assert sum("assert " in in_tests(cell) or ".reveal()" in in_tests(cell) for cell in code) > len(code) / 2


def tasks() -> list[tuple[Path, str, str]]:
    """(notebook, name of the check, name of what is to be written), for every exercise with a check."""
    found = []
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            found += [(path, check, wanted) for check, wanted in CHECK.findall(text(cell))]
    return found


@pytest.mark.parametrize(("path", "check", "wanted"), tasks(), ids=lambda value: getattr(value, "stem", value))
def test_the_solution_in_the_notebook_solves_its_exercise(path, check, wanted):
    solutions = [code for cell in cells(path, "markdown") for code in SOLUTION.findall(text(cell))]
    names: dict = {}
    exec(next(code for code in solutions if f"def {wanted}(" in code), names)
    feedback = getattr(exercises, check)(names[wanted])
    assert feedback.passed, feedback


@pytest.mark.parametrize(("path", "check", "wanted"), tasks(), ids=lambda value: getattr(value, "stem", value))
def test_what_the_notebook_begins_with_does_not(path, check, wanted):
    [stub] = [text(cell) for cell in cells(path, "code") if f"def {wanted}(" in text(cell)]
    names: dict = {}
    exec(stub, names)
    assert not getattr(exercises, check)(names[wanted]).passed


def largest_first(probabilities):
    return sorted(range(len(probabilities)), key=lambda place: -probabilities[place])


def too_early(probabilities, p):
    kept, total = [], 0.0
    for place in largest_first(probabilities):
        if total + probabilities[place] >= p:
            break
        kept.append(place)
        total += probabilities[place]
    return kept


def too_late(probabilities, p):
    kept, total = [], 0.0
    for place in largest_first(probabilities):
        kept.append(place)
        if total >= p:
            break
        total += probabilities[place]
    return kept


def right_but_as_they_stand(probabilities, p):
    kept, total = [], 0.0
    for place in largest_first(probabilities):
        kept.append(place)
        total += probabilities[place]
        if total >= p:
            break
    return sorted(kept)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (too_early, "not before it"),
        (too_late, "too many"),
        (right_but_as_they_stand, "another order"),
        (lambda probabilities, p: None, "returned nothing"),
        (lambda probabilities, p: 3, "A list of indices is expected"),
        (lambda probabilities, p: [max(probabilities)], "A list of indices is expected"),
        (lambda probabilities, p: [1, 2, 3, 4], "not all places"),
        (lambda probabilities, p: largest_first(probabilities), "too many, stop as soon as p is reached"),
    ],
    ids="early late order nothing number value outside everything".split(),
)
def test_top_p_names_the_mistake(attempt, says):
    feedback = exercises.check_top_p(attempt)
    assert not feedback.passed and says in feedback.text


def test_top_p_counts_what_is_right_already():
    feedback = exercises.check_top_p(lambda probabilities, p: [0, 1])
    assert "Right so far: 1 of 5 cases." in feedback.text
