"""JupyterLab on our notebooks: it listens on this machine only and asks nothing of the outside."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from workbench.errors import RequestError

FIRST = "00_start_here.ipynb"
DEFAULTS = Path(__file__).parent / "jupyter"  # settings of JupyterLab that a user's own still override


def notebooks(target: Path) -> Path:
    """The folder to open: the checkout's own, else a copy of the installed ones in `target`, where edits are kept."""
    checkout = Path(__file__).parent.parent / "notebooks"
    if (checkout / FIRST).is_file():
        return checkout
    shipped = Path(sysconfig.get_path("data"), "share", "deepseek-workbench", "notebooks")
    if not (shipped / FIRST).is_file():
        raise RequestError(f"no notebooks in {checkout} or {shipped}; reinstall deepseek-workbench")
    target.mkdir(parents=True, exist_ok=True)
    for source in shipped.glob("*.ipynb"):
        if not (target / source.name).exists():
            shutil.copy(source, target)
    return target.resolve()


def command(folder: Path, extra: list[str], notebook: str = FIRST) -> list[str]:
    """The command line that serves the folder above `folder` and opens a notebook in it."""
    options = [
        f"--ServerApp.root_dir={folder.parent}",
        f"--LabApp.default_url=/lab/tree/{quote(f'{folder.name}/{notebook}')}",
        # the three things JupyterLab would otherwise ask the network for
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--ServerApp.allow_root=True")  # containers: the server is local and has a token all the same
    return [sys.executable, "-m", "jupyterlab", *options, *extra]


def environment() -> dict[str, str]:
    """Ours, with our defaults: the question whether to fetch news would cover a corner of the first notebook."""
    paths = [str(DEFAULTS), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    return os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}


def serve(folder: Path, extra: list[str], notebook: str = FIRST) -> int:
    """Opens a notebook of `folder`. Runs until JupyterLab ends; its exit status."""
    if find_spec("jupyterlab") is None:
        raise RequestError("JupyterLab is not installed; make setup, or pip install -e '.[notebooks]'")
    try:
        return subprocess.run(command(folder.resolve(), extra, notebook), env=environment()).returncode
    except KeyboardInterrupt:  # JupyterLab had it too, and has said goodbye
        return 0
