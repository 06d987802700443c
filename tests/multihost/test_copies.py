"""The main machine is destroyed with its folder; the others go on from a copy on one of them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.multihost.disks import own_disks
from tests.multihost.hosts import hosts, why_not
from tests.ports import free_port
from tests.runs import flags, lines, newest_step, read, start_ranks, tensors
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
STEPS = 60
SETTINGS = {"max_steps": STEPS, "save_every": 4, "log_every": 2, "batch_size": 12}
SETTINGS |= {"keep_checkpoints": 99, "replicate_checkpoints": 2, "peer_timeout": 8}
STRATEGIES = {
    "ddp": {"compress": "int4"},
    "rounds": {"sync": "diloco", "sync_every": 4, "overlap_steps": 2, "compress": "int8"},
}


class Hosts:
    """Ranks on hosts with disks of their own, each of which has the data."""

    def __init__(self, zygote, machines, disk, prepared, tmp_path):
        self.zygote, self.machines, self.disk, self.tmp_path = zygote, machines, disk, tmp_path
        self.log, self.pids = tmp_path / "hosts.log", list[int]()
        for host in machines:
            shutil.copytree(prepared, host.disk.inside(disk / "data"))

    def folder(self, number: int) -> Path:
        """The run's folder on a host, for the test."""
        return self.machines[number].disk.inside(self.disk / "run")

    def start(self, numbers, **settings):
        """Start a rank on each of these hosts, of which the first is the main one."""
        words = flags(self.disk / "data", self.disk / "run", **SETTINGS | settings)
        words += [f"--world-size={len(numbers)}", f"--master-port={free_port()}"]
        words += [f"--master-addr={self.machines[numbers[0]].address}"]
        self.pids = [
            self.zygote.start(
                [*words, f"--rank={rank}"],
                self.log,
                host=self.machines[number].name,
                disk=self.machines[number].disk,
            )
            for rank, number in enumerate(numbers)
        ]

    def wait(self):
        return [self.zygote.wait(pid) for pid in self.pids]


@pytest.fixture
def on_hosts(zygote, prepared, tmp_path):
    with hosts(3) as machines, own_disks(machines, tmp_path) as disk:
        yield Hosts(zygote, machines, disk, prepared, tmp_path)


def undisturbed(zygote, prepared, folder, processes, **settings):
    """A run in a folder that all its ranks see, left in peace from where it is."""
    log = folder.with_suffix(".log")
    words = flags(prepared, folder, **SETTINGS | {"replicate_checkpoints": None} | settings)
    ranks = start_ranks(zygote, words, processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(log)
    return folder


def same_tensors(one, other, step):
    expected, got = tensors(one, step), tensors(other, step)
    assert expected.keys() == got.keys()
    return all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_the_others_go_on_bit_for_bit_from_the_newest_copy(
    on_hosts, zygote, prepared, tmp_path, strategy
):
    on_hosts.start([0, 1, 2], **strategy, max_steps=STEPS)
    second = on_hosts.folder(1)
    wait_until(lambda: newest_step(second) >= 8, longest_pause_s=0.002, log=on_hosts.log)
    os.kill(on_hosts.pids[0], signal.SIGKILL)
    on_hosts.machines[0].disk.destroy()
    assert on_hosts.wait()[1:] == [1, 1], read(on_hosts.log)
    newest = newest_step(second)
    assert 8 <= newest < STEPS, "it was lost in the middle of the run"
    assert newest_step(on_hosts.folder(2)) == 0
    kept = shutil.copytree(second, tmp_path / "kept")

    on_hosts.start([2, 1], **strategy)  # the main one is now a machine without any copy
    assert on_hosts.wait() == [0, 0], read(on_hosts.log)
    calm = undisturbed(zygote, prepared, tmp_path / "calm", 3, **strategy)
    assert same_tensors(kept, calm, newest), "what was copied is what was saved"
    for step in range(newest + 4, STEPS + 1, 4):
        shutil.rmtree(calm / f"checkpoint-{step}")
    undisturbed(zygote, prepared, calm, 2, **strategy)
    assert same_tensors(calm, on_hosts.folder(2), STEPS)
    assert lines(on_hosts.folder(2)) == lines(calm)


def test_a_machine_whose_disk_is_full_costs_a_line_and_another_holds_the_copy(
    zygote, prepared, tmp_path
):
    with hosts(3) as machines, own_disks(machines, tmp_path, megabytes={1: 3}) as disk:
        run = Hosts(zygote, machines, disk, prepared, tmp_path)
        ballast = machines[1].disk.backing / "ballast"
        free = shutil.disk_usage(ballast.parent).free
        ballast.write_bytes(bytes(free - 200_000))
        run.start([0, 1, 2], max_steps=8)
        assert run.wait() == [0, 0, 0], read(run.log)
        printed = run.log.read_text()
        assert "warning: checkpoint-4 is not copied to rank 1" in printed
        assert "has no room for the files to fetch" in printed
        assert "safe      checkpoint-8 lies on 2 machines: rank 0 (" in printed
        assert newest_step(run.folder(2)) == 8 and newest_step(run.folder(1)) == 0
        assert (run.folder(1) / "run.json").exists() and not list(run.folder(1).glob("tmp-*"))
