"""The rules of the house, kept by reading the source: floors, sizes, names, and what may be committed."""

import ast
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).parent.parent

# imports go down or stay level, never up and never round
FLOORS = {
    9: ["__main__", "arguments", "doctor", "lab", "terminal", "recording", "replaying", "claims"],
    8: ["widgets", "exercises"],
    7: ["workbench", "session", "turns", "worker", "meter", "timeline", "evals", "train", "benchmarks"],
    6: ["engine", "stream", "watching", "warming"],
    5: [
        "checkpoint",
        "shards",
        "packfile",
        "pack",
        "packing",
        "synth",
        "plan",
        "speed",
        "workspace",
        "sizes",
        "residents",
        "progress",
        "noise",
        "traffic",
        "opening",
        "calibration",
        "rounding",
        "chat",
        "reply",
        "storages",
        "explaining",
    ],
    4: ["model", "graph"],
    3: ["experts", "fused", "lean", "weights", "offloaded", "fetching", "slots", "link", "transfers", "quantising"],
    2: ["ops", "steps", "packed", "lens", "footprint"],
    1: [
        "cache",
        "window",
        "matrix",
        "recipe",
        "blocks",
        "native",
        "compiled",
        "bandwidth",
        "diskspeed",
        "rope",
        "sampling",
        "tokenizer",
        "trace",
        "tracefile",
        "recorder",
        "hook",
        "edits",
        "editcheck",
        "editing",
        "ring",
        "machine",
        "door",
        "pages",
    ],  # fmt: skip
    0: ["errors", "config", "probe", "codec", "formats"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
CORE = range(7)  # runs in a script, a server or a test: no notebook needed

PUBLIC = [
    "Ablate",
    "Add",
    "Bias",
    "BudgetError",
    "CheckpointError",
    "Config",
    "Editing",
    "Force",
    "Hook",
    "LatentCache",
    "Probe",
    "Recorder",
    "ReplayRouting",
    "RequestError",
    "Sampling",
    "Scale",
    "TopK",
    "Trace",
    "Workbench",
    "WorkbenchError",
    "chat",
    "diff",
    "load",
    "replay",
]

MAX_LINES = 350
LONGER = {}  # path: why it is one noun all the same

MAX_NOTEBOOK = 300_000  # bytes

# where an error of any kind is carried to another thread and raised there again
CARRIES_ERRORS = {"workbench/session.py"}

IMPORT_NAME = {"huggingface-hub": "huggingface_hub", "pillow": "PIL"}
CARD = "jupyterlab ipywidgets torch triton safetensors plotly pandas tokenizers nbmake pytest".split()

# brackets, so that this file does not find itself
NOT_HERE = re.compile(
    r"/w[o]rk/|/f[a]rm/|/r[o]ot/|/home/[a-z]|/Users/[a-z]|/tmp/[e]nv|/[o]pt/wheels"
    r"|p[y]pi\.org|p[y]thonhosted\.org|n[p]mjs\.org|d[e]bian\.org|download\.p[y]torch\.org"
)


def tracked() -> list[Path]:
    """What is or would be committed; in an unpacked archive, everything outside hidden and build folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]
    skip = {"build", "dist", "__pycache__"}
    inside = (path for path in ROOT.rglob("*") if path.is_file())
    return [
        p
        for p in inside
        if not any(s in skip or s.startswith(".") or s.endswith(".egg-info") for s in rel(p).split("/")[:-1])
    ]


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = tracked()
SOURCES = [p for p in FILES if p.suffix == ".py" and rel(p).startswith(("workbench/", "kernels/"))]
PACKAGE = [p for p in SOURCES if rel(p).startswith("workbench/") and rel(p) != "workbench/__init__.py"]
KERNELS = [p for p in SOURCES if rel(p).startswith("kernels/")]
NOTEBOOKS = [p for p in FILES if p.suffix == ".ipynb"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Dotted names imported in a file; `from a.b import c` is a.b, `from workbench import c` is workbench.c."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{rel(path)}:{node.lineno}: imports are absolute"
            if node.module == "workbench":
                found |= {f"workbench.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def room(path: Path) -> str:
    """The module or subpackage of `workbench` a file belongs to."""
    return path.relative_to(ROOT / "workbench").parts[0].removesuffix(".py")


def neighbours(path: Path) -> set[str]:
    """The other rooms of the package that a file imports from."""
    inside = {name for name in imports(path) if name == "workbench" or name.startswith("workbench.")}
    assert "workbench" not in inside, f"{rel(path)}: inside the package, import the module that has the name"
    return {name.split(".")[1] for name in inside} - {room(path), "__version__"}


def test_every_module_has_a_floor():
    assert {room(path) for path in PACKAGE} <= set(FLOOR)


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_imports_go_down(path):
    above = {name for name in neighbours(path) if FLOOR[name] > FLOOR[room(path)]}
    assert not above, f"{rel(path)} is on floor {FLOOR[room(path)]} and imports {above} from above"


def test_no_import_cycles():
    graph = {}
    for path in PACKAGE:
        graph.setdefault(room(path), set()).update(neighbours(path))
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", [p for p in PACKAGE if FLOOR.get(room(p)) in CORE], ids=rel)
def test_the_core_needs_no_notebook(path):
    assert not roots(path) & {"IPython", "ipywidgets", "anywidget", "plotly", "jupyterlab", "ipykernel"}


def test_kernels_have_one_door():
    named = {room(path) for path in PACKAGE if "workbench_kernels" in path.read_text(encoding="utf-8")}
    assert named <= {"door", "compiled", "doctor"}  # one for each kind of processor; the doctor looks, never imports
    assert not any("workbench_kernels" in roots(path) for path in PACKAGE if room(path) != "door")


@pytest.mark.parametrize("path", KERNELS, ids=rel)
def test_kernels_know_only_torch_and_triton(path):
    assert roots(path) - set(sys.stdlib_module_names) <= {"torch", "triton", "workbench_kernels"}


@pytest.mark.parametrize("path", [path for path in KERNELS if not path.name.startswith("_")], ids=rel)
def test_a_kernel_file_keeps_the_contract(path):
    names = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    assert {"refuses", "launch", "work", "EXAMPLES"} <= names


def test_every_kernel_has_a_case_and_a_line_in_the_table():
    names = {path.stem for path in KERNELS if not path.name.startswith("_")}
    cases = {path.stem for path in SOURCES if rel(path).startswith("workbench/benchmarks/cases/")}
    assert names <= cases and cases - names == {"__init__", "compare"}
    table = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert {name for name in names if f"| `{name}.py` |" not in table} == set()


def test_the_kernel_folder_is_no_package():
    """An importable top-level `kernels` would be taken for the library of that name that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_benchmark_runs_the_oracle():
    assert {room(path) for path in PACKAGE if "transformers" in roots(path)} <= {"benchmarks"}


def test_public_names_are_pinned_and_sorted():
    assert workbench.__all__ == PUBLIC == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(workbench))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        workbench.lode  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys, workbench; print(*sorted({'torch', 'ipywidgets', 'numpy', 'pandas'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_importing_the_chat_module_does_not_hide_the_panel():
    code = "import workbench, workbench.chat; print(type(workbench.chat).__name__ != 'module')"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"


@pytest.mark.parametrize("path", [*SOURCES, *(p for p in FILES if p.suffix == ".js")], ids=rel)
def test_one_noun_a_file(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES or rel(path) in LONGER, f"{rel(path)} has {lines} lines; it is two nouns"


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_nothing_swallows_errors_it_does_not_know(path):
    if rel(path) in CARRIES_ERRORS:
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = [c for c in caught if c is None or getattr(c, "id", "") in ("Exception", "BaseException")]
            assert not broad, f"{rel(path)}:{node.lineno}: name what is caught"


@pytest.mark.parametrize("path", SOURCES, ids=rel)
def test_no_pickle(path):
    assert not roots(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert "torch.load(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=rel)
def test_notebooks_are_committed_without_outputs(path):
    assert path.stat().st_size <= MAX_NOTEBOOK
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "".join(cell["source"])[:80]


def test_no_machine_is_named():
    for path in FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = NOT_HERE.search(line)
            assert not found, f"{rel(path)}:{number}: {found[0]}"


def test_the_build_lists_every_package():
    packages = {rel(p.parent).replace("/", ".") for p in PACKAGE} | {"workbench", "workbench_kernels"}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_build_carries_every_data_file():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    carried = [f"{package.replace('.', '/')}/{pattern}" for package, globs in patterns.items() for pattern in globs]
    for path in FILES:
        if rel(path).startswith("workbench/") and path.suffix != ".py":
            assert any(fnmatch.fnmatch(rel(path), pattern) for pattern in carried), (
                f"{rel(path)} is not in package-data"
            )


def requirements(*extras: str) -> set[str]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in lines}


def test_everything_imported_is_declared():
    allowed = {IMPORT_NAME.get(name, name) for name in requirements("notebooks", "hub", "test")}
    allowed |= {"workbench", "workbench_kernels", "IPython", "traitlets"}  # the last two are ipywidgets' own base
    for path in SOURCES:
        unknown = roots(path) - allowed - set(sys.stdlib_module_names)
        assert not unknown, f"{rel(path)} imports {unknown}, which pyproject.toml does not name"


def test_the_packages_of_the_card_are_there():
    assert set(CARD) <= requirements("notebooks", "test")


def test_the_tested_set_covers_what_is_asked_for():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {name.replace("_", "-") for name in requirements("notebooks", "hub", "test")}
    assert wanted <= pinned
