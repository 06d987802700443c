"""check_cluster.py on hosts of their own: each thing that goes wrong is made to, and is told."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from p2p_llm_forge.launch_files import write_launch_files
from tests.conftest import TINY_MODEL, free_port
from tests.multihost.hosts import hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs `nft` (package nftables)"),
]
WORKS, WILL_NOT_WORK, WORKS_WITH_WARNINGS = 0, 1, 3


@pytest.fixture(scope="module")
def machines():
    with hosts(4) as made:
        yield made


class Peers:
    """A launch of check_cluster.py on the first hosts, by files that --write-configs makes."""

    def __init__(self, zygote, machines, tmp_path, count, main=None):
        self.zygote, self.machines = zygote, machines[:count]
        self.logs = [tmp_path / f"host{number}.log" for number in range(count)]
        self.port = free_port()
        addresses = [main or machines[0].address, *(m.address for m in machines[1:count])]
        write_launch_files(tmp_path / "files", addresses, self.port, None, True)
        self.files = [tmp_path / "files" / f"node{number}.yaml" for number in range(count)]
        self.pids = {}

    def start(self, number, *flags, environ=None, hosts_file=None, script="check_cluster"):
        self.pids[number] = self.zygote.start(
            list(map(str, flags)),
            self.logs[number],
            environ,
            script,
            self.machines[number].name,
            hosts_file,
        )

    def meet(self, *flags, each=None, **options):
        """Start on every host with `--meet`; `each` gives flags by number."""
        for number, file in enumerate(self.files):
            own = (each or {}).get(number, ())
            self.start(number, "--config-file", file, "--meet", *flags, *own, **options)

    def end(self, timeout_s=60.0):
        """The statuses and what was printed, by number."""
        statuses = {n: self.zygote.wait(pid, timeout_s) for n, pid in self.pids.items()}
        return statuses, {n: self.logs[n].read_text() for n in self.pids}


def training(prepared, folder):
    return (
        f"--dataset-path={prepared}",
        f"--output-dir={folder}",
        f"--config-overrides={TINY_MODEL}",
        "--cpu-threads=1",
    )


def test_four_peers_meet_and_the_slow_link_is_measured(zygote, machines, tmp_path, prepared):
    peers = Peers(zygote, machines, tmp_path, 4)
    started = time.monotonic()
    with machines[2].slowed("10mbit"):
        peers.meet(*training(prepared, tmp_path / "run"), "--json")
        statuses, told = peers.end()
    spent = time.monotonic() - started
    print(f"4 peers: {spent:.1f} s")
    assert set(statuses.values()) == {WORKS}, told
    assert spent < 60
    report = json.loads(told[0][told[0].index("{\n") :])
    assert [finding["level"] for finding in report["findings"]].count("failure") == 0
    rates = report["bytes_per_s"]
    for target in (0, 1, 3):
        assert rates[2][target] * 8 == pytest.approx(10e6, rel=0.2)
        assert rates[target][2] * 8 > 50e6
    assert len(report["update_s"]) == 4 and min(report["update_s"]) > 0
    assert "plain DDP" in report["advice"][0]
    assert not (tmp_path / "run").exists(), "a check changes nothing"
