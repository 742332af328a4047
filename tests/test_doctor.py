"""The doctor: every finding is true of this machine, and every complaint comes with a remedy."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from workbench import bandwidth, doctor, machine
from workbench.__main__ import main
from workbench.bandwidth import Measured, Rate
from workbench.config import Config
from workbench.doctor import FAIL, OK, PACKAGES, STATES, WARN, Check, Package, Report, examine

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(home, monkeypatch):
    """What the user measured is neither read nor replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", home)


@pytest.fixture(scope="module")
def report(home) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", home)
        return examine()


@pytest.fixture
def measured(tmp_path, monkeypatch) -> Measured:
    """Saved: 50 GB/s of memory and of a GPU's, 2 GB/s of disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Measured(
        memory=(Rate(1, (20e9,)), Rate(2, (50e9, 10e9, 60e9))), disk=(Rate(1, (1e9,)), Rate(4, (2e9,))),
        link=None, device_memory=Rate(1, (50e9,)), block=2**22, file=2**30, past_cache="past it", file_system="ext4",
        when="2026-01-02T03:04:05+00:00", load=0.2, cpu=machine.cpu_name(), cores=machine.cores(), threads=2,
        device="cpu", torch="2.13.0", package="0.1.0",
    )  # fmt: skip
    made.save()
    return made


def expectations(monkeypatch, free: float) -> dict[str, Check]:
    """By name, on a machine with `free` bytes of memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    return {check.name: check for check in doctor._expectations()}


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
    assert "121." in last["V2, 4.13 bits"].found  # a quarter, and the scales


def test_without_a_measurement_it_measures_memory_and_says_how_to_measure_all(report):
    check = found(report, "bandwidth")
    assert check.state == OK and "just now" in check.found and "workbench doctor --measure" in check.remedy
    assert not any(check.name.startswith("disk, ") or "from disk" in check.found for check in report.checks)


def test_what_was_measured_is_told_and_reckoned_with(measured, monkeypatch):
    monkeypatch.setattr(bandwidth, "glance", lambda device: pytest.fail("it measured again"))
    told = expectations(monkeypatch, free=20e9)
    assert "bandwidth" not in told and measured.when in told["measured"].found
    assert [(name, told[name].found) for name, _ in measured.lines()] == measured.lines()
    config = Config.preset("v2-lite")
    total, active = config.parameters()
    read = (active - config.vocab_size * config.hidden_size) * 4.13 / 8
    assert total * 4.13 / 8 < 20e9 < 2 * total
    assert f"at most {50e9 / read:.1f} tokens/s" in told["V2-Lite, 4.13 bits"].found  # the median of two threads
    wide = told["V2-Lite, 16B"]
    assert wide.state == WARN and f"{read * (16 / 4.13) / 2e9:.1f} s a token" in wide.found


def test_a_measurement_of_a_busy_machine_is_to_be_repeated(measured, monkeypatch):
    assert expectations(monkeypatch, free=20e9)["measured"].state == OK
    replace(measured, load=measured.cores * 0.6).save()
    check = expectations(monkeypatch, free=20e9)["measured"]
    assert check.state == WARN and "again" in check.remedy


def test_a_measurement_of_another_machine_is_not_used(measured, monkeypatch):
    replace(measured, cores=measured.cores + 1).save()
    monkeypatch.setattr(bandwidth, "glance", lambda device: 7e9)
    told = expectations(monkeypatch, free=20e9)
    assert told["measurement"].state == WARN and "doctor --measure" in told["measurement"].remedy
    assert told["bandwidth"].found.startswith("7 GB/s") and "measured" not in told
    assert "from disk" not in told["V2, 236B"].found


def test_a_gpu_that_was_not_measured_is_measured_now(measured, monkeypatch):
    replace(measured, device_memory=None).save()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    monkeypatch.setattr(bandwidth, "glance", lambda device: {"cuda": 3e12}[device])
    told = {check.name: check for check in doctor._expectations()}
    assert told["bandwidth"].found.startswith("3000 GB/s read from GPU memory")
    measured.save()
    assert "bandwidth" not in {check.name for check in doctor._expectations()}


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
