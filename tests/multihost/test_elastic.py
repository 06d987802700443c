"""Peers on hosts of their own, by launch/elastic.py and its defaults: lost, back, strangers."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from tests.multihost.disks import own_disks
from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.runs import TINY_MODEL, lines, newest_step
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
STRATEGIES = {
    "ddp": [],
    "rounds": ["--sync=diloco", "--sync-every=10", "--overlap-steps=3", "--compress=int8"],
}


@pytest.fixture
def secret(tmp_path):
    """A file that all machines of a test have."""
    file = tmp_path / "cluster.secret"
    file.write_text("of this cluster, and of no other")
    file.chmod(0o600)
    return file


def start(host, main, secret, prepared, folder, log, *more):
    """The elastic launch of docs/elastic.md, the same on every machine."""
    host.start(
        *(PYTHON, "launch/elastic.py", "--main", main.address, "--secret-file", secret),
        *("train.py", f"--dataset-path={prepared}", f"--output-dir={folder}", "--resume=auto"),
        *("--batch-size=8", "--max-steps=1000000", "--save-every=20", "--log-every=5"),
        *("--model-type=gpt2", f"--config-overrides={TINY_MODEL}", "--optimizer=adamw"),
        *("--report-to=none", "--cpu-threads=1", *more),
        log=log,
    )


def last_line(folder):
    """The last line of metrics.jsonl, however long that has grown; empty before there is one."""
    file = folder / "metrics.jsonl"
    whole, _, _ = (file.read_bytes() if file.exists() else b"").rpartition(b"\n")
    return json.loads(whole.rpartition(b"\n")[2] or "{}")


def wait_for_peers(folder, log, count):
    """Seconds until an update was taken by `count` peers, as metrics.jsonl has it."""
    began = time.monotonic()
    wait_until(lambda: last_line(folder).get("peers") == count, longest_pause_s=0.1, log=log)
    return time.monotonic() - began


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_peers_are_killed_unplugged_and_come_back(prepared, secret, tmp_path, strategy):
    folder = tmp_path / "run"
    logs = [tmp_path / f"host{number}.log" for number in range(3)]
    with hosts(3) as machines:
        for host, log in zip(machines, logs, strict=True):
            start(host, machines[0], secret, prepared, folder, log, *strategy)
        wait_for_peers(folder, logs[0], 3)
        wait_until(lambda: last_line(folder)["step"] >= 50, longest_pause_s=0.1)
        first_step = lines(folder)[0]["step"]

        machines[2].switch_off()
        spent = wait_for_peers(folder, logs[0], 2)
        print(f"a peer killed: {spent:.1f} s until the others' next line")
        assert last_line(folder)["step"] > first_step

        machines[1].unplug()
        spent = wait_for_peers(folder, logs[0], 1)
        print(f"a peer unplugged: {spent:.1f} s until the other's next line")
        silent = f"lost a peer: {machines[1].address}: no sign of life"
        assert silent in logs[0].read_text()

        machines[1].wait()  # its launcher has lost the main machine, and ends
        lost = f"error: lost the main machine at {machines[0].address}:29600"
        assert lost in logs[1].read_text()
        assert "if that is gone for good, with --main of another machine" in logs[1].read_text()
        assert "frame #" not in logs[1].read_text(), "in words"
        machines[1].plug_in()
        start(machines[1], machines[0], secret, prepared, folder, logs[1], *strategy)
        spent = wait_for_peers(folder, logs[0], 2)
        print(f"a peer back: {spent:.1f} s until the next line of both")

        before = newest_step(folder)
        machines[1].ask_to_stop()
        spent = wait_for_peers(folder, logs[0], 1)
        print(f"a peer shut down: {spent:.1f} s until the other's next line")
        assert machines[1].wait()[-1] == 143
        assert "SIGTERM: stopped and saved" in logs[1].read_text()
        assert newest_step(folder) > before
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted(set(steps)), "no step is missing a line, or has two"
    assert set(range(5, steps[-1] + 1, 5)) <= set(steps)


def attack(stranger, targets, marker, logs, *run_ids):
    """Let a stranger try everything once on each target; what it prints is in `logs`."""
    for target, log in zip(targets, logs, strict=True):
        words = ("tests/multihost/stranger.py", target.address, marker, *run_ids)
        stranger.start(PYTHON, *words, log=log)
    for log in logs:
        wait_until(lambda log=log: "done" in log.read_text(), log=log)


def test_a_stranger_runs_nothing_and_a_main_machine_that_vanishes_is_named(
    prepared, secret, tmp_path
):
    folder, marker = tmp_path / "run", tmp_path / "owned"
    logs = [tmp_path / f"host{number}.log" for number in range(2)]
    with hosts(3) as (first, second, stranger):
        for host, log in zip((first, second), logs, strict=True):
            start(host, first, secret, prepared, folder, log)
        wait_for_peers(folder, logs[0], 2)
        tries = [tmp_path / "stranger0.log", tmp_path / "stranger1.log"]
        attack(stranger, (first, second), marker, tries, "home", "none", "elastic")
        assert "29600" in tries[0].read_text(), "it found the launch"
        assert "left a pickle" in tries[0].read_text(), "it found the run's own store"
        refused = f"refused a connection from {stranger.address}"
        assert logs[0].read_text().count(refused) == 1
        before = last_line(folder)["step"]
        wait_until(lambda: last_line(folder)["step"] >= before + 20, log=logs[0])
        assert last_line(folder)["peers"] == 2
        assert not marker.exists()

        first.unplug()
        assert second.wait() == [1]
        lost = f"error: lost the main machine at {first.address}:29600: no sign of life for 8 s"
        assert lost in logs[1].read_text()


def test_the_same_stranger_runs_code_through_torchruns_elastic_launch(tmp_path):
    """So the test above tries something that works elsewhere."""
    marker, log = tmp_path / "owned", tmp_path / "host.log"
    with hosts(2) as (machine, stranger):
        machine.start(
            *(PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d"),
            *("--rdzv-id=home", f"--rdzv-endpoint={machine.address}:29600"),
            *("--rdzv-conf=is_host=1", f"--local-addr={machine.address}", "train.py"),
            log=log,
        )
        wait_until(lambda: "29600" in machine.run("ss", "-ltn"), log=log)
        attack(stranger, [machine], marker, [tmp_path / "stranger.log"], "home")
        wait_until(marker.exists, log=log)
        assert marker.exists(), "what the stranger sent was run"


def test_when_the_main_host_is_destroyed_the_line_goes_on_elsewhere_without_a_shared_folder(
    prepared, tmp_path
):
    logs = [tmp_path / f"host{number}.log" for number in range(3)]
    with hosts(3) as machines, own_disks(machines, tmp_path) as disk:
        folders = [host.disk.inside(disk / "run") for host in machines]
        for host in machines:
            shutil.copytree(prepared, host.disk.inside(disk / "data"))
            (host.disk.backing / "cluster.secret").write_text("of this cluster, and of no other")
            (host.disk.backing / "cluster.secret").chmod(0o600)

        def begin(numbers):
            for number in numbers:
                start(
                    *(machines[number], machines[numbers[0]], disk / "cluster.secret"),
                    *(disk / "data", disk / "run", logs[number]),
                    *("--replicate-checkpoints=2", "--compile=off"),
                )

        begin([0, 1, 2])
        wait_for_peers(folders[0], logs[0], 3)
        wait_until(lambda: last_line(folders[0]).get("safe_step", 0) >= 60, log=logs[0])
        machines[0].switch_off()
        machines[0].disk.destroy()
        lost = f"error: lost the main machine at {machines[0].address}:29600"
        for number in (1, 2):
            assert machines[number].wait() == [1]
            assert lost in logs[number].read_text()
        copied = max(map(newest_step, folders[1:]))
        assert copied >= 60
        begin([2, 1])
        wait_for_peers(folders[2], logs[2], 2)
        resumed = [line["resumed_from"] for line in lines_of(folders[2]) if "resumed_from" in line]
        assert max(resumed) >= copied
        wait_until(lambda: last_line(folders[2]).get("safe_step", 0) > copied, log=logs[2])
    steps = [line["step"] for line in lines(folders[2])]
    assert steps == sorted(set(steps)), "no step is missing a line, or has two"
    assert set(range(5, steps[-1] + 1, 5)) <= set(steps)


def lines_of(folder):
    """metrics.jsonl, with what depends on the clock and on interruptions."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
