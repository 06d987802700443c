"""Peers on a slow link: the bytes counted are those that travel, and auto finds a strategy."""

from __future__ import annotations

import json
import re

import pytest

from tests.multihost.hosts import hosts, why_not
from tests.ports import free_port
from tests.runs import flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
MODEL = "n_layer=4,n_head=2,n_embd=128"  # 0.84 M parameters


def run(zygote, machines, prepared, folder, log, **settings):
    """A run of one rank on each host, to its end; returns what rank 0 printed."""
    settings = {"config_overrides": MODEL, "resume": None, **settings}
    words = flags(prepared, folder, **settings, world_size=len(machines))
    words += [f"--master-addr={machines[0].address}", f"--master-port={free_port()}"]
    logs = [log.with_suffix(f".{rank}") for rank in range(len(machines))]
    pids = [
        zygote.start([*words, f"--rank={rank}"], logs[rank], host=host.name)
        for rank, host in enumerate(machines)
    ]
    for pid in pids:
        assert zygote.wait(pid) == 0, logs[0].read_text()[-4000:]
    return logs[0].read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"compress": "int8", "max_steps": 12},
        {"sync": "diloco", "sync_every": 4, "compress": "int4", "max_steps": 32},
    ],
)
def test_the_bytes_counted_are_those_that_the_interface_counts(
    zygote, prepared, tmp_path, settings
):
    folder = tmp_path / "run"
    with hosts(2) as machines:
        # Starting, the rendezvous, one exchange; then the same with all of them.
        run(zygote, machines, prepared, tmp_path / "one", tmp_path / "log", **settings | ONE_UPDATE)
        alone = [host.bytes_sent() - host.bytes_resent() for host in machines]
        run(zygote, machines, prepared, folder, tmp_path / "log", **settings)
        both = [host.bytes_sent() - host.bytes_resent() for host in machines]
    one, all_of_them = (
        json.loads((path / "all_results.json").read_text())["bytes_sent_per_update"] * updates
        for path, updates in ((tmp_path / "one", 1), (folder, settings["max_steps"]))
    )
    payload = all_of_them - one
    assert payload > 2_000_000
    for before, after in zip(alone, both, strict=True):
        # Headers of TCP, IP and Ethernet, acknowledgements, heartbeats.
        assert payload < after - 2 * before < 1.08 * payload


ONE_UPDATE = {"max_steps": 1}


def test_auto_finds_a_strategy_that_a_slow_link_allows(zygote, prepared, tmp_path):
    with hosts(2, mbit=20) as machines:
        printed = run(
            zygote, machines, prepared, tmp_path / "run", tmp_path / "log",
            sync="auto", max_steps=60, batch_size=16,
        )  # fmt: skip
    assert re.search(r"--sync ddp --compress none .*%\n", printed), printed
    assert re.search(r"(--sync diloco .*?)  .*<- chosen", printed), printed
    assert "communication" in printed
    result = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 < result["communication"] < 1
