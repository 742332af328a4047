"""The claims ledger: every claim has one of four verdicts and evidence, and what can be computed comes out as it
says."""

import json
from dataclasses import replace

import pytest

from workbench import claims
from workbench.__main__ import main
from workbench.claims import CLAIMS, Claim, Finding, Verdict, ledger, rounds_to
from workbench.errors import RequestError

PUBLISHED = (
    "total active cache throughput vram speed gsm8k math c-eval scores licence tools languages context needles cost "
    "groups"
)


@pytest.fixture(scope="module")
def entries():
    return {entry.claim.key: entry for entry in ledger()}


def test_every_published_claim_is_there_once():
    keys = [claim.key for claim in CLAIMS]
    assert len(set(keys)) == len(keys)
    assert set(PUBLISHED.split()) <= set(keys)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_no_claim_without_a_verdict_and_its_evidence(claim, entries):
    """Measured and computed ones are found again now, and hold; a refutation that can be computed really
    contradicts."""
    assert claim.verdict in Verdict and claim.said and claim.where
    finding = entries[claim.key].finding
    match claim.verdict:
        case Verdict.MEASURED | Verdict.COMPUTED:
            assert finding.holds and finding.figures
        case Verdict.REFUTED:
            assert "PAPER" in claim.evidence or "README" in claim.evidence
            assert finding is None or not finding.holds
        case Verdict.NEEDS_WEIGHTS:
            assert finding is None


def test_the_93_percent_are_of_bytes_really_held_and_the_steps_to_it_are_shown(entries, monkeypatch):
    cache, mla = entries["cache"].finding, entries["cache-mla"].finding
    assert cache.figures["bytes a token"] == 436 * 60
    assert f"{cache.figures['percent less']:.1f}" == "93.3"
    assert [f"{value:.1f}" for value in mla.figures.values()] == ["82.2", "91.1"]
    # were the cache to allocate more, the ledger would say so
    held = claims.held
    monkeypatch.setattr(claims, "held", lambda *given: held(*given)._replace(allocated=2 * held(*given).allocated))
    assert not claims._cache_at_6_bits().holds


def test_counts_are_exact(entries):
    assert entries["total"].finding.figures == {"total": 235_741_434_880, "active": 21_375_800_320}
    assert entries["lite"].finding.figures["total"] == 15_706_484_224


def test_what_no_memory_of_16_gb_holds(entries):
    sizes = entries["vram"].finding.figures
    assert sizes["GB at 2 bits"] == pytest.approx(58.9, abs=0.05) and min(sizes.values()) > 16
    assert entries["speed"].finding.figures["GB at 4 bits"] > 80


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"evidence": " "}, "evidence"),
        ({"verdict": "true"}, "verdict"),
        ({"verdict": Verdict.COMPUTED, "find": None}, "computes"),
        ({"where": ""}, "where"),
    ],
)
def test_an_unfounded_claim_cannot_be_made(wrong, said):
    sound = Claim("sky", "the sky is blue", "a poem", Verdict.COMPUTED, "Rayleigh", lambda: Finding(True, "", {}))
    with pytest.raises(RequestError, match=said):
        replace(sound, **wrong)


@pytest.mark.parametrize(
    ("value", "published", "same"),
    [
        (93.28, "93.3", True),
        (93.24, "93.3", False),
        (235.74, "236", True),
        (2.251, "2.25", True),
        (2.26, "2.25", False),
    ],
)
def test_a_value_agrees_when_it_rounds_to_what_was_published(value, published, same):
    assert rounds_to(value, published) is same


def test_the_command_prints_every_claim_for_people_and_for_programs(capsys, monkeypatch, entries):
    monkeypatch.setattr(claims, "ledger", lambda: list(entries.values()))
    assert main(["claims"]) == 0
    text = capsys.readouterr().out
    assert all(f'"{claim.said}"' in text for claim in CLAIMS)
    assert "93.28 % less than the 389,120 B of DeepSeek-67B" in " ".join(text.split())
    assert main(["claims", "--json"]) == 0
    told = {one["key"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(told) == [claim.key for claim in CLAIMS]
    assert told["cache"]["verdict"] == "measured here" and told["cache"]["finding"]["holds"] is True
    assert told["throughput"]["finding"] is None and "5.76" in told["throughput"]["said"]
