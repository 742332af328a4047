"""JupyterLab and a browser for a test: started on random ports, kept out of the home folder, always ended."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/])")
FOLDERS = (
    "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR", "HOME",
)  # fmt: skip


def notebook(*cells: str) -> str:
    made = [
        {
            "cell_type": "code",
            "id": f"cell{n}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for n, source in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": made})


@contextmanager
def serving(folder: Path, command: list[str]):
    """The address of a JupyterLab that `command` starts in `folder`, for as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    }
    for name in FOLDERS:
        (folder / ".state" / name).mkdir(parents=True)
        environment[name] = str(folder / ".state" / name)
    # the one question JupyterLab asks at its first start covers a corner of the page
    news = folder / ".state" / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    command = [
        *command, "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", "--ServerApp.open_browser=False",
    ]  # fmt: skip
    with (folder / "lab.log").open("wb") as log:
        # a group of its own, so that its kernels end with it
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        _until_up(f"{address}/api/status?token={token}", server, folder / "lab.log")
        yield address, token
    finally:
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)


@contextmanager
def browsing(playwright, folder: Path, size=(1280, 900)):
    """A page of chromium, and the list of requests it tried to make to other machines."""
    arguments = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--disable-gpu",
    ]
    context = playwright.chromium.launch_persistent_context(
        str(folder / ".browser"), executable_path=CHROMIUM, headless=True, args=arguments,
        viewport={"width": size[0], "height": size[1]}, accept_downloads=True,
    )  # fmt: skip
    outside = []

    def refuse(route):
        outside.append(route.request.url)
        route.abort()

    context.route(OUTSIDE, refuse)
    try:
        yield context.pages[0], outside
    finally:
        context.close()


def open_notebook(page, address: str, token: str, path: str) -> None:
    page.goto(f"{address}/lab/tree/{path}?token={token}")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady", timeout=30_000)
    # the kernel must be connected, or cells are run into the void
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.connectionStatus === 'connected'"
        " && window.jupyterapp.shell.currentWidget.sessionContext.kernelDisplayStatus === 'idle'",
        timeout=30_000,
    )


def command(page, name: str, **arguments) -> None:
    """One of JupyterLab's own commands, not waited for: some never answer a script."""
    page.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args); }", [name, arguments])
