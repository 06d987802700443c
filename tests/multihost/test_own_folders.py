"""Runs on hosts with file systems of their own: nothing is shared, and nothing is lost by that."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from p2p_llm_forge.training.run_record import RunRecord
from tests.multihost.disks import own_disks
from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.ports import free_port
from tests.runs import (
    DILOCO,
    TINY_MODEL,
    finish,
    flags,
    lines,
    newest_step,
    read,
    tensors,
)
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
# Of 9 blocks, 3 ranks take as many each; 2 do not.
STEPS = {"batch_size": 9, "save_every": 4, "log_every": 4, "peer_timeout": 20}
STRATEGIES = {
    "rounds": {**DILOCO, "sync_every": 4, "overlap_steps": 2, "compress": "int8"},
    "compressed": {"compress": "int8"},
}


# Rounds of an elastic launch end before a peer comes or goes.
ELASTIC = [*("--sync=diloco", "--sync-every=10", "--overlap-steps=3", "--compress=int8")]


class Machines:
    """Runs by hand on some of the hosts, whose order is that of the ranks."""

    def __init__(self, zygote, machines, disk, tmp_path, prepared):
        self.zygote, self.machines, self.disk = zygote, machines, disk
        self.logs = [tmp_path / f"host{number}.log" for number in range(len(machines))]
        shutil.copytree(prepared, machines[0].disk.inside(disk / "data"))

    def folder(self, number):
        """Where the test finds the run's folder of a host."""
        return self.machines[number].disk.inside(self.disk / "run")

    def start(self, *numbers, **settings):
        words = flags(self.disk / "data", self.disk / "run", **settings)
        words += [f"--world-size={len(numbers)}", f"--master-port={free_port()}"]
        words += [f"--master-addr={self.machines[numbers[0]].address}"]
        return [
            self.zygote.start(
                [*words, f"--rank={rank}"],
                self.logs[number],
                host=self.machines[number].name,
                disk=self.machines[number].disk,
            )
            for rank, number in enumerate(numbers)
        ]

    def end(self, *numbers, **settings):
        pids = self.start(*numbers, **settings)
        statuses = [self.zygote.wait(pid) for pid in pids]
        assert statuses == [0] * len(numbers), "\n".join(read(self.logs[one]) for one in numbers)

    def kill_after(self, step, *numbers, **settings):
        """Kill all ranks at once when rank 0 has saved this step."""
        pids, log = self.start(*numbers, **settings), self.logs[numbers[0]]
        wait_until(lambda: newest_step(self.folder(numbers[0])) >= step, 60, 0.001, log=log)
        self.zygote.kill(pids)
        return newest_step(self.folder(numbers[0]))


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_machines_come_go_and_are_killed_to_the_bit_as_with_a_shared_folder(
    zygote, prepared, tmp_path, strategy
):
    """Three machines; then two, whose shares are uneven, of which one is new, has nothing and is
    rank 0. They are killed and go on. Last comes one of the first again, with what it had."""
    first, then, last = ({**STEPS, **strategy, "max_steps": steps} for steps in (4, 40, 80))
    shared = finish(zygote, prepared, tmp_path / "shared", 3, **first)
    finish(zygote, prepared, shared, 2, **then)
    finish(zygote, prepared, shared, 3, **last)
    with hosts(4) as machines, own_disks(machines, tmp_path) as disk:
        run = Machines(zygote, machines, disk, tmp_path, prepared)
        run.end(0, 1, 2, **first)
        saved = run.kill_after(12, 3, 0, **then)
        assert 12 <= saved < 40
        run.end(0, 3, **then)
        printed = read(run.logs[0])
        assert f"resuming  after step {saved} from {disk}/run/checkpoint-{saved}" in printed
        assert "checkpoint " in printed
        assert newest_step(run.folder(1)) == 4, "it was not there any more"
        assert 48 <= run.kill_after(48, 1, 0, 3, **last) < 80
        run.end(3, 1, 0, **last)
        ended = run.folder(3)
        expected, got = tensors(shared, 80), tensors(ended, 80)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, got[name]), name
        assert lines(ended) == lines(shared)


def last_line(folder):
    """The last whole line of metrics.jsonl; empty before there is one."""
    file = folder / "metrics.jsonl"
    whole, _, _ = (file.read_bytes() if file.exists() else b"").rpartition(b"\n")
    return json.loads(whole.rpartition(b"\n")[2] or "{}")


def test_a_peer_joins_an_elastic_run_with_empty_folders(prepared, tmp_path):
    """Data and state come from the others; its share makes all of them uneven."""
    with hosts(3) as machines, own_disks(machines, tmp_path) as disk:
        logs = [tmp_path / f"host{number}.log" for number in range(3)]
        folders = [host.disk.inside(disk / "run") for host in machines]
        for host in machines:
            secret = host.disk.inside(disk / "secret")
            secret.write_text("of this cluster, and of no other")
            secret.chmod(0o600)
        shutil.copytree(prepared, machines[0].disk.inside(disk / "data"))

        def start(number):
            machines[number].start(
                *(PYTHON, "launch/elastic.py", "--main", machines[0].address),
                *("--secret-file", disk / "secret", "train.py", "--resume=auto"),
                *(f"--dataset-path={disk}/data", f"--output-dir={disk}/run", "--batch-size=8"),
                *("--max-steps=1000000", "--save-every=20", "--log-every=5", "--report-to=none"),
                *("--model-type=gpt2", f"--config-overrides={TINY_MODEL}", "--optimizer=adamw"),
                *("--cpu-threads=1", "--pictures=false", *ELASTIC),
                log=logs[number],
            )

        def wait_for(peers, step):
            def is_there():
                line = last_line(folders[0])
                return line.get("peers") == peers and line["step"] >= step and line

            return wait_until(is_there, longest_pause_s=0.1, log=logs[0])

        start(0)
        start(1)
        wait_for(2, 25)
        start(2)
        line = wait_for(3, 0)
        assert sorted(line["shares"]) == [2, 3, 3]
        assert newest_step(folders[2]) >= 20, "it has fetched what it went on from"
        wait_for(3, line["step"] + 10)
        machines[0].ask_to_stop()
        machines[0].wait()
        started = {RunRecord.read(folder).started for folder in folders}
        assert len(started) == 1 and None not in started
    steps = [line["step"] for line in lines(folders[0])]
    assert steps == sorted(set(steps)), "no step has two lines"
    assert set(range(5, steps[-1] + 1, 5)) <= set(steps), "or none"
