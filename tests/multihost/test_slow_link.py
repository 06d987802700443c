"""Peers joined by a slow link: what they send is what the interface counts, and auto finds a way."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import TINY_MODEL
from tests.multihost.hosts import PYTHON, hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
MODEL = "n_layer=4,n_head=2,n_embd=128"  # 0.84 M parameters


def run(machines, prepared, folder, log, *words):
    """A run of one rank on each host, to its end; returns what rank 0 printed."""
    for rank, host in enumerate(machines):
        host.start(
            *(PYTHON, "train.py", f"--dataset-path={prepared}", f"--output-dir={folder}"),
            *(f"--config-overrides={MODEL}", "--batch-size=8", "--report-to=none"),
            *("--cpu-threads=1", f"--world-size={len(machines)}", f"--rank={rank}"),
            *(f"--master-addr={machines[0].address}", "--master-port=29700", *words),
            log=log.with_suffix(f".{rank}"),
        )
    for host in machines:
        assert set(host.wait(timeout_s=120)) == {0}, log.with_suffix(".0").read_text()[-4000:]
        host.forget()
    return log.with_suffix(".0").read_text()


@pytest.mark.parametrize(
    ("words", "updates"),
    [
        (("--compress=int8", "--max-steps=12"), 12),
        (("--sync=diloco", "--sync-every=4", "--compress=int4", "--max-steps=32"), 32),
    ],
)
def test_the_bytes_counted_are_those_that_the_interface_counts(prepared, tmp_path, words, updates):
    folder = tmp_path / "run"
    with hosts(2) as machines:
        run(machines, prepared, tmp_path / "idle", tmp_path / "idle.log", *words[:-1], "--max-steps=1")
        before = [host.bytes_sent() for host in machines]
        run(machines, prepared, folder, tmp_path / "log", *words)
        spent = [host.bytes_sent() - b for host, b in zip(machines, before, strict=True)]
        alone = before  # starting, meeting, one update
    counted = json.loads((folder / "all_results.json").read_text())["bytes_sent_per_update"]
    assert counted > 50_000
    for seen, start in zip(spent, alone, strict=True):
        payload = (updates - 1) * counted
        # Headers of TCP, IP and Ethernet make up 3 to 5 %, acknowledgements a little more.
        assert payload < seen - start < 1.09 * payload


def test_auto_finds_a_way_that_a_slow_link_allows(prepared, tmp_path):
    with hosts(2, mbit=20) as machines:
        told = run(
            machines, prepared, tmp_path / "run", tmp_path / "log", "--sync=auto", "--max-steps=120"
        )
        chosen = re.search(r"(--sync diloco .*?)  .*<- chosen", told)
        assert chosen, told
        assert "Mbit/s" in told and "communication" in told
