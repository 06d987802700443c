"""check_cluster.py on hosts of their own: each thing that can go wrong does, and is reported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from p2p_llm_forge.peers.launch_files import write_launch_files
from tests.multihost.checks import (
    WILL_NOT_WORK,
    WORKS,
    WORKS_WITH_WARNINGS,
    Peers,
    on_one_line,
)
from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.ports import free_port
from tests.runs import TINY_MODEL
from tests.texts import write_manifest
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs `nft` (package nftables)"),
]


@pytest.fixture(scope="module")
def machines():
    with hosts(4) as made:
        yield made


def training(prepared, folder):
    return (
        f"--dataset-path={prepared}",
        f"--output-dir={folder}",
        "--model-type=gpt2",
        f"--config-overrides={TINY_MODEL}",
        "--cpu-threads=1",
    )


def test_four_peers_meet_and_the_slow_link_is_measured(zygote, machines, tmp_path, prepared):
    peers = Peers(zygote, machines, tmp_path, 4)
    started = time.monotonic()
    with machines[2].slowed("10mbit"):
        peers.meet(*training(prepared, tmp_path / "run"), "--json")
        statuses, printed = peers.end()
    spent = time.monotonic() - started
    print(f"4 peers: {spent:.1f} s")
    assert set(statuses.values()) == {WORKS}, printed
    assert spent < 60
    report = json.loads(printed[0][printed[0].index("{\n") :])  # after what stderr got
    assert [finding["level"] for finding in report["findings"]].count("failure") == 0
    for rank in (1, 2, 3):  # theirs is the same, but for what is fine
        text = printed[rank][printed[rank].index("{\n") :]
        assert json.loads(text) == {**report, "rank": rank, "findings": []}
    rates = report["bytes_per_s"]
    for target in (0, 1, 3):
        assert rates[2][target] * 8 == pytest.approx(10e6, rel=0.2)
        assert rates[target][2] * 8 > 50e6
    assert len(report["update_s"]) == 4 and min(report["update_s"]) > 0
    assert any("--sync ddp --compress none" in line for line in report["forecast"])
    assert not (tmp_path / "run").exists(), "a check changes nothing"


def test_a_slow_link_between_busy_machines_is_measured(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 2)
    work = [PYTHON, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        for host in machines[:2]:
            stack.enter_context(host.slowed("10mbit"))
        for _ in range(2 * (os.cpu_count() or 1)):
            busy = subprocess.Popen(work)
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        peers.meet("--json", "--peer-timeout=120")
        statuses, printed = peers.end()
    assert set(statuses.values()) == {WORKS}, printed
    rates = json.loads(printed[1][printed[1].index("{\n") :])["bytes_per_s"]
    for rate in (rates[0][1], rates[1][0]):
        assert rate * 8 == pytest.approx(10e6, rel=0.2)


def test_accelerate_launch_starts_the_same_check(machines, tmp_path):
    addresses = [host.address for host in machines[:2]]
    write_launch_files(tmp_path, addresses, free_port(), None, False)
    logs = [tmp_path / f"host{number}.log" for number in range(2)]
    for number, host in enumerate(machines[:2]):
        file = tmp_path / f"node{number}.yaml"
        host.start(
            *(Path(PYTHON).parent / "accelerate", "launch", "--config_file", file),
            *("check_cluster.py", "--config-file", file),
            log=logs[number],
        )
    statuses = [status for host in machines[:2] for status in host.wait()]
    printed = [log.read_text() for log in logs]
    assert statuses == [WORKS, WORKS], printed
    assert "all 2 processes are here" in printed[0] and "bandwidth" in printed[0]
    assert "this launch" not in printed[1], "a peer prints its own failures only"


def test_one_machine_keeps_refused_filtered_and_no_route_apart(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 4)
    with machines[0].firewall(f"ip saddr {machines[2].address} tcp dport {peers.port} drop"):
        machines[3].run("ip", "route", "add", "blackhole", f"{machines[0].address}/32")
        for number in range(4):
            peers.start(number, "--config-file", peers.files[number])
        statuses, printed = peers.end()
        machines[3].run("ip", "route", "del", "blackhole", f"{machines[0].address}/32")
    main = re.escape(f"{machines[0].address}:{peers.port}")
    assert f"ok port {peers.port} is free" in on_one_line(printed[0])
    assert re.search(
        f"WARNING port {main} refused .*fix: start machine 0 first", on_one_line(printed[1])
    )
    assert re.search(
        f"FAILED port {main} does not answer within 3 s: a firewall drops the packets.*fix: .*"
        f"ufw allow from {machines[2].address} to any port {peers.port} proto tcp",
        on_one_line(printed[2]),
    )
    assert re.search(
        "FAILED address no route to the main process|FAILED port there is no route",
        on_one_line(printed[3]),
    )
    assert [statuses[n] for n in range(4)] == [
        *(WORKS, WORKS_WITH_WARNINGS, WILL_NOT_WORK, WILL_NOT_WORK)
    ]
    assert "as far as one machine can tell" in printed[0]
    rule = f"tcp dport {peers.port} reject with icmp type admin-prohibited"  # as firewalld does
    with machines[0].firewall(rule):
        peers.start(1, "--config-file", peers.files[1])
        statuses, printed = peers.end()
    assert statuses[1] == WILL_NOT_WORK
    assert re.search(
        f"no route to {main}, or its firewall .* open the firewall", on_one_line(printed[1])
    )


def test_a_taken_port_is_reported_with_its_owner(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 2)
    peers.meet("--rendezvous-timeout=20")  # rank 1 comes later, so rank 0 holds the port meanwhile
    os.kill(peers.pids[1], signal.SIGSTOP)
    listening = ("ss", "-ltnH", f"sport = :{peers.port}")
    wait_until(lambda: machines[0].run(*listening))
    log = tmp_path / "second.log"
    second = zygote.start(
        ["--config-file", str(peers.files[0])],
        log,
        script="check_cluster",
        host=machines[0].name,
    )
    assert zygote.wait(second) == WILL_NOT_WORK
    taken = f"FAILED port port {peers.port} is taken fix: see who has it: ss -ltnp"
    assert taken in on_one_line(log.read_text())
    os.kill(peers.pids[1], signal.SIGCONT)
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WORKS}, printed


def test_a_firewall_between_the_peers_is_reported_by_rank(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 3)
    rule = f"ip saddr {machines[1].address} tcp dport != {peers.port} ct state new drop"
    with machines[2].firewall(rule):
        peers.meet("--rendezvous-timeout=20")
        statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}, printed
    for number in range(3):
        assert re.search(
            rf"FAILED reach rank 1 \(.*\) cannot reach rank 2 \(.*\) at {machines[2].address}:"
            rf" filtered; gloo and NCCL open ports .*ufw allow from {machines[1].address} ",
            on_one_line(printed[number]),
        ), printed[number]
    assert "rank 0 (" not in printed[0], "only the pair that fails is named"


@pytest.mark.parametrize("mistake", ["interface", "hosts file"])
def test_an_address_that_only_its_own_machine_knows_is_reported(
    zygote, machines, tmp_path, mistake
):
    name = "forge-main"
    peers = Peers(zygote, machines, tmp_path, 2, main=name)
    files = [tmp_path / f"hosts{number}" for number in range(2)]
    for file in files:
        file.write_text(f"127.0.0.1 localhost\n{machines[0].address} {name}\n")
    if mistake == "hosts file":
        files[0].write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    for number, file in enumerate(peers.files):
        environ = {"GLOO_SOCKET_IFNAME": "lo"} if (mistake, number) == ("interface", 1) else None
        peers.start(
            *(number, "--config-file", file, "--meet", "--rendezvous-timeout=2"),
            environ=environ,
            hosts_file=files[number],
        )
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}, printed
    if mistake == "interface":
        expected = (
            r"FAILED reach rank 0 \(.*\) cannot reach rank 1 \(.*\) at 127.0.0.1: refused: that"
            " address is known on its own machine only fix: unset GLOO_SOCKET_IFNAME"
        )
    else:
        expected = (
            f"FAILED address the name {name} means 127.0.1.1 on this machine, where no other can"
            " reach it fix: write the machine's IP address"
        )
        assert "connection was refused for 2 s" in on_one_line(printed[1])
    assert re.search(expected, on_one_line(printed[0])), printed


def test_a_missing_peer_is_named_within_the_deadline(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 4)
    for number in (0, 3):
        file = peers.files[number]
        peers.start(number, "--config-file", file, "--meet", "--rendezvous-timeout=2")
    started = time.monotonic()
    statuses, printed = peers.end()
    assert time.monotonic() - started < 25, "of the 30 s by default"
    assert set(statuses.values()) == {WILL_NOT_WORK}
    for number in (0, 3):
        assert re.search(
            "FAILED rendezvous rank 1 and rank 2 did not come to .* within 2 s; 2 of 4 are here"
            " fix: start machine 1 and 2 too",
            on_one_line(printed[number]),
        ), printed


def test_two_machines_with_one_number_are_named_and_one_may_be_corrected(
    zygote, machines, tmp_path
):
    peers = Peers(zygote, machines, tmp_path, 3)
    waits = ("--meet", "--rendezvous-timeout=120")
    for number in (0, 1):
        peers.start(number, "--config-file", peers.files[number], *waits)
    wait_until(lambda: machines[0].connections(peers.port) >= 2, log=peers.logs[1])
    second = peers.start_another(2, "--config-file", peers.files[1], *waits)
    assert zygote.wait(second) == WILL_NOT_WORK
    main = re.escape(f"{machines[0].address}:{peers.port}")
    twice = (
        rf"FAILED rendezvous rank 1 came to {main} twice: \S+-1 has it, and \S+-2 was started with"
        r" the same number fix: give every machine a number of its own \(machine_rank"
    )
    assert re.search(twice, on_one_line(peers.logs[2].read_text()))
    peers.start(2, "--config-file", peers.files[2], *waits)  # the others still wait
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WORKS}, printed


def test_those_who_wait_in_vain_hear_of_the_number_that_came_twice(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 3)
    for number, file in enumerate((0, 1, 1)):
        peers.start(number, "--config-file", peers.files[file], "--meet", "--rendezvous-timeout=12")
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}, printed
    expected = (
        r"FAILED rendezvous rank 2 did not come .* another process FAILED rendezvous \"rank 1 came"
        r" to \S+ twice"
    )
    assert re.search(expected, on_one_line(printed[0])), printed[0]


def test_a_number_that_is_too_high_is_named(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 3)
    two = Peers(zygote, machines, tmp_path / "two", 2)
    text = two.files[1].read_text().replace("machine_rank: 1", "machine_rank: 2")
    two.files[1].write_text(text)
    peers.start(1, "--config-file", two.files[1], "--meet", "--rendezvous-timeout=5")
    statuses, printed = peers.end()
    assert statuses[1] == WILL_NOT_WORK, printed
    assert "machine_rank is 2, and num_machines is 2" in on_one_line(printed[1]), printed[1]
    assert "rank 2 of a launch of 2 processes: they are numbered 0 to 1" in on_one_line(printed[1])
    # A file of three machines among two.
    text = peers.files[2].read_text().replace(f": {peers.port}", f": {two.port}")
    peers.files[2].write_text(text)
    peers.start(0, "--config-file", two.files[0], "--meet", "--rendezvous-timeout=12")
    wait_until(lambda: machines[0].connections(two.port), log=peers.logs[0])
    peers.start(2, "--config-file", peers.files[2], "--meet")
    statuses, printed = peers.end()
    assert statuses == {0: WILL_NOT_WORK, 2: WILL_NOT_WORK}, printed
    for number in (0, 2):
        assert re.search(
            r"FAILED rendezvous \"?rank 2 \(\S+-2\) was started as one of 3 processes, the first"
            r" that came to \S+ as one of 2\"? fix: \"?write the same number for all machines",
            on_one_line(printed[number]),
        ), printed[number]


def test_a_run_that_is_on_is_not_disturbed_by_a_late_rank(zygote, machines, tmp_path, prepared):
    peers = Peers(zygote, machines, tmp_path, 3)
    folder = training(prepared, tmp_path / "run")
    flags = (*folder, f"--master-addr={machines[0].address}", f"--master-port={peers.port}")
    run = ("--world-size=2", "--batch-size=4", "--report-to=none", "--max-steps=2000")
    for number in (0, 1):
        peers.start(number, *flags, *run, f"--rank={number}", "--log-every=1", script="train")
    metrics = tmp_path / "run" / "metrics.jsonl"
    steps = lambda: metrics.read_text().count("\n") if metrics.exists() else 0  # noqa: E731
    wait_until(lambda: steps() > 2, log=peers.logs[0])
    main = re.escape(f"{machines[0].address}:{peers.port}")
    late = {"rank 1": ("--world-size=2", "--rank=1"), "rank 2": ("--world-size=3", "--rank=2")}
    for rank, own in late.items():
        for script, refused in (("train", 2), ("check_cluster", WILL_NOT_WORK)):
            log = peers.logs[2]
            log.unlink(missing_ok=True)
            pid = peers.start_another(2, *flags, *own, script=script)
            assert zygote.wait(pid) == refused
            said = on_one_line(log.read_text())
            assert re.search(f"a run is on already at {main}.*: {rank} .*comes too late", said), (
                said
            )
    before = steps()
    wait_until(lambda: steps() > before + 5, log=peers.logs[0])
    for number in (0, 1):
        os.kill(peers.pids[number], signal.SIGTERM)
    statuses, printed = peers.end()
    assert "saved" in printed[0] and "lost a peer" not in printed[0] + printed[1], printed


def test_other_data_and_versions_are_named(zygote, machines, tmp_path, prepared):
    peers = Peers(zygote, machines, tmp_path, 3)
    other = shutil.copytree(prepared, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["content_fingerprint"] = "0" * 64
    write_manifest(other, manifest)
    fake = tmp_path / "fake" / "accelerate-1.11.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.11.0\n")

    folder = training(prepared, tmp_path / "run")
    peers.meet(*folder, each={2: [f"--dataset-path={other}"]})
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}, printed
    expected = r"FAILED data rank 2 has other data \(.*\) than rank 0 \(.*fix: copy rank 0's folder"
    assert re.search(expected, on_one_line(printed[0])), printed[0]

    for number, file in enumerate(peers.files):
        environ = {"PYTHONPATH": str(fake.parent)} if number == 1 else None
        own = ["--seed=7"] if number == 2 else []
        peers.start(number, "--config-file", file, "--meet", *folder, *own, environ=environ)
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}, printed
    for number in range(3):
        assert re.search(
            r"FAILED alike rank 1 \(.*\) has accelerate 1.11.0, rank 0 has 1.* FAILED alike rank 2"
            r" \(.*\) was started with --seed 7, rank 0 with 0 fix: start all machines with the",
            on_one_line(printed[number]),
        ), printed[number]


def test_a_peer_without_the_secret_is_refused_by_name(zygote, machines, tmp_path, prepared):
    peers = Peers(zygote, machines, tmp_path, 3)
    secrets = {}
    for name in ("ours", "theirs"):
        secrets[name] = tmp_path / name
        secrets[name].write_text(f"a long secret, {name}\n")
        secrets[name].chmod(0o600)
    ours, theirs = (f"--cluster-secret-file={secrets[name]}" for name in ("ours", "theirs"))
    places = {0: [ours], 1: [ours]}
    folder = training(prepared, tmp_path / "run")
    for third, expected in (
        ([], r"FAILED secret rank 2 \(.*-2\) did not bring the cluster's secret fix: copy"),
        ([theirs], r"FAILED secret rank 2 \(.*-2\) could not prove to rank 0 that it knows"),
    ):
        peers.meet(*folder, "--rendezvous-timeout=20", each={**places, 2: third})
        statuses, printed = peers.end()
        assert set(statuses.values()) == {WILL_NOT_WORK}, printed
        assert re.search(expected, on_one_line(printed[0])), printed[0]
        assert "rank 1 (" not in printed[0]
        assert not any("a long secret" in text for text in printed.values())

    flags = ("--world-size=3", f"--master-addr={machines[0].address}", "--batch-size=6")
    for own, expected in ((ours, 0), (theirs, 2)):  # train.py says the same
        port = free_port()
        for number in range(3):
            peers.start(
                *(number, *folder, *flags, f"--rank={number}", f"--master-port={port}"),
                *("--max-steps=1", "--report-to=none", ours if number < 2 else own),
                script="train",
            )
        statuses, printed = peers.end()
        assert set(statuses.values()) == {expected}, printed
    assert re.search(r"error: rank 2 \(.*-2\) could not prove to rank 0", printed[0])


def test_a_public_address_is_refused_unless_it_is_allowed(zygote, machines, tmp_path, prepared):
    for number, host in enumerate(machines[:2]):
        host.run("ip", "address", "add", f"44.77.0.{number + 1}/24", "dev", "eth0")
    peers = Peers(zygote, machines, tmp_path, 2, main="44.77.0.1")
    peers.meet("--rendezvous-timeout=2")
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WILL_NOT_WORK}
    expected = "44.77.0.1.* is a public address, and whoever reaches the ports .* can read"
    assert re.search(
        f"FAILED public {expected}.*--allow-public-address", on_one_line(printed[0])
    ), printed[0]

    peers.start(
        *(0, *training(prepared, tmp_path / "run"), "--rank=0", "--world-size=2"),
        *("--master-addr=44.77.0.1", f"--master-port={peers.port}"),
        script="train",
    )
    statuses, printed = peers.end()
    assert statuses[0] == 2 and re.search(f"error: {expected}", on_one_line(printed[0])), printed

    peers.meet("--rendezvous-timeout=20", "--allow-public-address")
    statuses, printed = peers.end()
    assert set(statuses.values()) == {WORKS_WITH_WARNINGS}, printed
    assert re.search(f"WARNING public {expected}", on_one_line(printed[0]))


def test_a_main_machine_with_the_address_of_another_is_reported(zygote, machines, tmp_path):
    peers = Peers(zygote, machines, tmp_path, 2, main=machines[2].address)
    peers.start(0, "--config-file", peers.files[0], "--meet", "--rendezvous-timeout=2")
    statuses, printed = peers.end()
    assert statuses[0] == WILL_NOT_WORK
    main = re.escape(f"{machines[2].address}:{peers.port}")
    assert re.search(
        f"FAILED rendezvous rank 0 listens .* {main} does not lead to it", on_one_line(printed[0])
    )
