"""The doctor: every finding is true of this machine, and every complaint comes with a remedy."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from workbench import doctor
from workbench.__main__ import main
from workbench.doctor import FAIL, OK, PACKAGES, STATES, WARN, Check, Package, Report, examine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def report() -> Report:
    return examine()


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_every_complaint_has_a_remedy(report):
    for check in report.checks:
        assert check.state in STATES
        assert check.state == OK or check.remedy, check


def test_it_reports_what_is_running(report):
    assert found(report, "torch").found == torch.__version__
    assert "cores" in found(report, "cpu").found
    assert found(report, "bandwidth").found.startswith(tuple("123456789"))


def test_it_ends_with_what_will_run_fast(report):
    assert report.checks[-1].section == "What will run fast here, and why not"
    last = {check.name: check for check in report.checks if check.section == report.checks[-1].section}
    assert last["pocket"].state == OK
    assert "471" in last["V2, 236B"].found  # 236e9 weights of two bytes


def test_json_says_what_the_text_says(report, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    status = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == report.state and status == int(report.state == FAIL)
    assert [check["name"] for check in told["checks"]] == [check.name for check in report.checks]
    main(["doctor"])
    text = capsys.readouterr().out
    assert all(check.found in text and check.remedy in text for check in report.checks)


def test_the_worst_finding_is_the_state():
    checks = [Check("Machine", "memory", state, "4 GB") for state in (OK, WARN, OK)]
    assert Report(tuple(checks)).state == WARN


@pytest.mark.parametrize(
    ("name", "versions", "state", "says"),
    [
        ("torch", {}, FAIL, "not installed"),
        ("torch", {"torch": "2.1.0"}, FAIL, "too old"),
        ("torch", {"torch": "2.13.0+cpu"}, OK, "2.13.0"),
        ("jupyterlab", {}, WARN, "not installed"),
        ("ipykernel", {"ipykernel": "6.31.0"}, OK, "6.31.0"),
        ("ipykernel", {"ipykernel": "7.1.0"}, WARN, "second thread"),
        ("ipykernel", {"ipykernel": "7.4.0"}, OK, "7.4.0"),
        ("triton", {"triton": "3.6.0", "numpy": "2.4.6"}, WARN, "interpret"),
        ("triton", {"triton": "3.6.0", "numpy": "2.3.5"}, OK, "3.6.0"),
        ("transformers", {"transformers": "4.57.1"}, WARN, "too old"),
    ],
)
def test_versions_are_judged(monkeypatch, name, versions, state, says):
    monkeypatch.setattr(doctor, "installed", versions.get)
    package = next(package for package in PACKAGES if package.name == name)
    check = doctor._judge("Software", package)
    assert check.state == state and says in check.found
    assert state == OK or "install" in check.remedy


def test_minimum_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    minimum = {match[1]: match[2] for line in lines if (match := re.match(r"([\w-]+)>=([\d.]+)", line))}
    for package in PACKAGES:
        assert package.minimum == minimum[package.name]
        listed = project["optional-dependencies"].get(package.extra, project["dependencies"])
        assert any(line.startswith(package.name) for line in listed), package


def test_without_pocket_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    (check,) = doctor._pocket()
    assert check.state == FAIL and "train pocket" in check.remedy


def test_a_package_that_only_an_extra_needs_names_the_extra(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    check = doctor._judge("Software", Package("plotly", "6.0", "notebooks", "plots"))
    assert "'.[notebooks]'" in check.remedy
