"""The command line, as a shell and a program see it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from workbench import lab
from workbench.__main__ import main
from workbench.errors import RequestError
from workbench.reply import Stats
from workbench.sampling import Sampling
from workbench.terminal import Terminal

ROOT = Path(__file__).parent.parent
needs_pocket = pytest.mark.skipif(
    not (ROOT / "workbench" / "pocket" / "config.json").is_file(), reason="pocket has not been trained in this checkout"
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "workbench", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_command():
    answer = run("--help")
    assert answer.returncode == 0
    commands = "lab chat trace replay doctor plan pack synth train eval bench claims"
    for command in commands.split():
        assert f"\n    {command} " in answer.stdout


def test_an_unknown_command_is_refused_and_the_known_ones_named():
    answer = run("brew")
    assert answer.returncode == 2
    assert "invalid choice: 'brew'" in answer.stderr and "doctor" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_unknown_option_is_refused():
    answer = run("doctor", "--colour")
    assert answer.returncode == 2
    assert "--colour" in answer.stderr.splitlines()[-1]


def test_an_unknown_model_is_one_line_and_status_2(tmp_path):
    answer = run("chat", "--model", str(tmp_path / "nowhere"), "--prompt", "hello")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith("workbench: ") and "nowhere" in answer.stderr


def test_a_setting_out_of_range_is_one_line_and_status_2(capsys):
    assert main(["chat", "--prompt", "hello", "--temperature", "-1"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "temperature" in error


@needs_pocket
def test_one_question_one_answer():
    plain = run("chat", "--prompt", "Hello!", "--seed", "1", "--max-tokens", "16")
    assert plain.returncode == 0 and plain.stderr == ""
    told = run("chat", "--prompt", "Hello!", "--seed", "1", "--max-tokens", "16", "--json")
    answer = json.loads(told.stdout)
    assert answer["text"].strip() == plain.stdout.strip() != ""
    assert 1 <= len(answer["tokens"]) <= 16
    assert answer["finish"] in ("eos", "length")
    assert answer["sampling"]["seed"] == 1


@dataclass
class Echo:
    """An engine that answers with the number of messages and then counts, so that every answer is known."""

    tokens: int = 3
    interrupt_at: int | None = None
    refuse: bool = False

    def stream(self, prompt, sampling, *, stop):
        if self.refuse:
            raise RequestError("the prompt is too long")
        self.prompt = prompt
        return Counted(self, stop)


class Counted:
    def __init__(self, engine, stop):
        self.engine, self.stop, self.stats = engine, stop, Stats(prompt_tokens=5, seed=7)

    def __iter__(self):
        for number in range(self.engine.tokens):
            if number == self.engine.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            if self.stop.is_set():
                self.stats.finish = "stopped"
                return
            self.stats.tokens += 1
            last = number == self.engine.tokens - 1
            text = "" if last else f"{len(self.engine.prompt)}.{number} "
            yield SimpleNamespace(token=number, text=text, finish="eos" if last else None)
        self.stats.finish = "eos"


def terminal(engine: Echo, **options) -> tuple[Terminal, list[str]]:
    written: list[str] = []
    bench = SimpleNamespace(engine=engine, name="echo")
    return Terminal(bench, Sampling(), write=written.append, **options), written


def test_a_conversation_in_the_terminal_remembers():
    talk, written = terminal(Echo())
    talk.send("one")
    talk.send("two")
    assert "".join(written) == "1.0 1.1 3.0 3.1 "
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1] == {"role": "assistant", "content": "1.0 1.1 ", "tokens": [0, 1]}


def test_regenerate_replaces_the_answer():
    talk, _ = terminal(Echo())
    assert talk.regenerate() is None
    talk.send("one")
    talk.regenerate()
    assert len(talk.messages) == 2


def test_interrupt_keeps_what_was_said_and_the_conversation_goes_on():
    engine = Echo(tokens=9, interrupt_at=2)
    talk, _ = terminal(engine)
    assert talk.send("one").finish == "stopped"
    assert talk.messages[-1]["content"] == "1.0 1.1 "
    engine.interrupt_at = None
    assert talk.send("two").finish == "eos"


def test_a_refused_question_does_not_block_the_next():
    engine = Echo(refuse=True)
    talk, _ = terminal(engine)
    with pytest.raises(RequestError):
        talk.send("far too long")
    assert talk.messages == []


def test_commands_of_the_terminal():
    engine = Echo()
    talk, written = terminal(engine)
    lines = iter(["hello", "/system Be brief.", "again", "/help", "/quit", "never read"])
    talk.run(lambda prompt: next(lines))
    assert engine.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "again"}]
    assert next(lines) == "never read"
    assert "/regenerate" in "".join(written) and "eos, 3 tokens" in "".join(written)


def test_lab_opens_the_first_notebook_and_asks_nothing_of_the_network(tmp_path):
    command = lab.command(tmp_path / "notebooks", ["--no-browser"])
    assert f"--LabApp.default_url=/lab/tree/notebooks/{lab.FIRST}" in command
    assert f"--ServerApp.root_dir={tmp_path}" in command
    assert "--LabApp.news_url=None" in command
    assert command[-1] == "--no-browser"


def test_installed_notebooks_are_copied_once(tmp_path, monkeypatch):
    shipped = tmp_path / "share" / "deepseek-workbench" / "notebooks"
    shipped.mkdir(parents=True)
    (shipped / lab.FIRST).write_text("{}")
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site-packages" / "workbench" / "lab.py"))
    monkeypatch.setattr(lab.sysconfig, "get_path", lambda name: str(tmp_path))
    folder = lab.notebooks(tmp_path / "mine")
    (folder / lab.FIRST).write_text("edited")
    assert (lab.notebooks(tmp_path / "mine") / lab.FIRST).read_text() == "edited"


def test_no_notebooks_anywhere_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "workbench" / "lab.py"))
    monkeypatch.setattr(lab.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RequestError, match="reinstall"):
        lab.notebooks(tmp_path / "mine")
