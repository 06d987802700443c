"""A report has the status of its worst finding, a fix for every problem, and no NaN in JSON."""

from __future__ import annotations

import json
import math

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.findings import (
    ClusterReport,
    failure,
    failures,
    findings_of_peer,
    fine,
    refuse_failures,
    warning,
)


def test_the_status_is_that_of_the_worst_finding():
    report = ClusterReport([fine("a", "good")])
    assert report.status() == 0
    report.findings.append(warning("b", "so so", "do that"))
    assert report.status() == 3
    report.findings.append(failure("c", "bad", "do this"))
    assert report.status() == 1
    assert "fix: do this" in report.text() and "will not work" in report.text()


def test_what_is_not_fine_must_have_a_fix():
    with pytest.raises(AssertionError):
        failure("d", "bad", "")


def test_fields_with_colons_stay_whole():
    """Text that was split at its last colon once printed `fix: --master-port`."""
    error = ForgeError("port: 29500 is taken", "choose another: --master-port", where="rank 0: a")
    (finding,) = failures("launch", error)
    assert (finding.found, finding.fix) == ("port: 29500 is taken", "choose another: --master-port")
    assert finding.where == "rank 0: a" and finding.topic == "launch"
    assert "fix: choose another: --master-port" in ClusterReport([finding]).text()


def test_a_refusal_holds_its_findings_as_problems_of_an_error():
    findings = [failure("a", "one", "x"), warning("b", "two", "y"), failure("c", "three", "z")]
    with pytest.raises(ForgeError) as refusal:
        refuse_failures(findings)
    assert refusal.value.problems == (findings[0], findings[2])
    assert "1. one" in str(refusal.value) and "fix: z" in str(refusal.value)
    assert failures("other", refusal.value) == [findings[0], findings[2]]
    refuse_failures([findings[1]])


def test_problems_that_end_a_block_are_added_once():
    report = ClusterReport([failure("a", "known", "x")])
    with report.failures_as("peers"):
        refuse_failures([failure("a", "known", "x"), failure("b", "new", "y")])
    with report.failures_as("peers"):
        raise ForgeError("third", "z")
    assert [(f.topic, f.found) for f in report.findings] == [
        *(("a", "known"), ("b", "new"), ("peers", "third"))
    ]


def test_a_peer_prints_its_own_failures_only():
    own, other = (
        failures("model", ForgeError(f"of {rank}", "x", where=f"rank {rank} (host)"))[0]
        for rank in (1, 0)
    )
    everything = [fine("a", "good"), own, other]
    assert ClusterReport(everything).shown_by_its_rank().findings == everything
    peer = ClusterReport(everything, rank=1, peers=["host", "host"])
    assert peer.shown_by_its_rank().findings == [own]
    assert ClusterReport([fine("a", "good")], rank=1).shown_by_its_rank() is None


def test_findings_of_a_peer_are_named_and_quoted():
    sent = [vars(warning("clock", "slow\nclock", "set it")), vars(fine("disk", "9 GB"))]
    report = ClusterReport(findings_of_peer("rank 1 (berta)", json.loads(json.dumps(sent))))
    assert report.status() == 3
    assert report.text().splitlines()[:4] == [
        "rank 1 (berta)",
        '  WARNING  clock      "slow clock"',
        '                      fix: "set it"',
        '  ok       disk       "9 GB"',
    ]
    for level in ("odd", None, ["fine"]):
        with pytest.raises(ValueError):
            findings_of_peer("rank 1", [{**sent[0], "level": level}])


def test_a_peer_prints_json_with_the_status_of_the_launch():
    everything = [fine("a", "good"), warning("b", "slow", "faster"), failure("c", "no", "yes")]
    assert [one["topic"] for one in ClusterReport(everything).as_dict()["findings"]] == list("abc")
    peer = ClusterReport(everything, rank=1, update_s=[0.5, 0.25]).as_dict()
    assert [one["topic"] for one in peer["findings"]] == ["c"] and peer["status"] == 1
    assert peer["rank"] == 1 and peer["update_s"] == [0.5, 0.25]
    assert ClusterReport(everything[:2], rank=1).as_dict()["status"] == 3


def test_a_table_marks_the_slowest_link_and_json_has_no_nan():
    report = ClusterReport(peers=["anna", "berta"])
    report.bytes_per_s = [[math.nan, 1.25e6], [1.25e8, math.nan]]
    report.latency_s = [[math.nan, 0.001], [0.001, math.nan]]
    assert "rank 0 (anna)   -       10.0 <- slowest" in report.text()
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["latency_s"][0] == [None, 1e-3]
