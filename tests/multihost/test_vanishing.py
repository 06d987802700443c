"""A host vanishes while the others wait for it: in every phase all of them end, and name it."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.multihost.hosts import hosts, why_not
from tests.runs import flags, read
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
PEER_TIMEOUT_S, GRACE_S = 10, 5  # the default, and what is promised beyond it
DILOCO = {"sync": "diloco", "sync_every": 2, "compress": "int8"}
TRAINING, PEERS = "p2p_llm_forge.training", "p2p_llm_forge.peers"
# Where a rank stands when its host vanishes. The others wait for it there, or soon after.
PHASES = {
    "meeting": (f"{PEERS}.rendezvous:_reach", {}),
    "start": (f"{PEERS}.join:PartialState", {}),
    "connecting": (f"{PEERS}.cluster:new_gloo_group", {}),
    "update": ("p2p_llm_forge.data.order:micro_batches:3", {}),
    "compressed update": ("p2p_llm_forge.data.order:micro_batches:3", {"compress": "int8"}),
    "update between rounds": ("p2p_llm_forge.data.order:micro_batches:3", DILOCO),
    "evaluation": (f"{TRAINING}.run:evaluate_blocks", {}),
    "save": (f"{TRAINING}.saving:Saving._make_way", {}),
    "save of each": (f"{TRAINING}.saving:Saving.save", DILOCO),
    "round": ("p2p_llm_forge.sync.diloco:DiLoCo._send", DILOCO),
    "end": (f"{TRAINING}.run:conclude", {}),
    "check of links": (f"{PEERS}.links:_latency", {}),
}
OF_MAIN = {"save", "end"}  # where the main process waits for nobody


class Case:
    """A run on three hosts, one of which stands in a phase."""

    def __init__(self, zygote, machines, prepared, tmp_path, number, phase, victim):
        self.zygote, self.phase, self.victim = zygote, phase, victim
        where, settings = PHASES[phase]
        folder = tmp_path / f"{victim}-{number}"
        self.mark = folder.with_suffix(".mark")
        self.logs = [folder.with_suffix(f".{rank}.log") for rank in range(len(machines))]
        self.pids, self.ended_at = [], {}
        chosen = {"max_steps": 4, "save_every": 2, "eval_every": 2, "batch_size": 6}
        script = "check_cluster" if phase.startswith("check") else "train"
        words = flags(prepared, folder, **{**chosen, **settings}) if script == "train" else []
        words += [f"--world-size={len(machines)}", f"--master-addr={machines[0].address}"]
        words += [f"--master-port={29500 + number}", f"--peer-timeout={PEER_TIMEOUT_S}"]
        words += ["--rendezvous-timeout=600"]  # many start at once here
        if victim:  # signed heartbeats and encrypted rows are waited for alike
            words += [f"--cluster-secret-file={tmp_path / 'cluster.secret'}"]
        for rank, host in enumerate(machines):
            held = {"HELD": where, "MARK": str(self.mark)} if rank == victim else {}
            held |= {"SCRIPT": script}
            self.pids.append(
                zygote.start(
                    [*words, f"--rank={rank}"],
                    self.logs[rank],
                    held,
                    script="tests.multihost.held",
                    host=host.name,
                )
            )

    def others(self):
        return [rank for rank in range(len(self.pids)) if rank != self.victim]

    def printed(self):
        return "\n".join(f"--- {self.phase}, rank {r}\n{read(self.logs[r])}" for r in self.others())

    def stands(self):
        """Whether the victim has come to the phase; nobody must have ended before."""
        ended = [rank for rank in self.others() if self.zygote.has_ended(self.pids[rank])]
        assert not ended, self.printed()
        return self.mark.exists()

    def note_ends(self):
        """Whether all others have ended, and when."""
        for rank in self.others():
            if rank not in self.ended_at and self.zygote.has_ended(self.pids[rank]):
                self.ended_at[rank] = time.monotonic()
        return len(self.ended_at) == len(self.others())


@pytest.mark.parametrize("victim", [0, 1])
def test_all_others_end_in_time_and_name_the_host_that_vanished(zygote, prepared, tmp_path, victim):
    phases = [phase for phase in PHASES if victim == 0 or phase not in OF_MAIN]
    (tmp_path / "cluster.secret").write_text("of this cluster, and of no other")
    (tmp_path / "cluster.secret").chmod(0o600)
    began = time.monotonic()
    with hosts(3) as machines:
        cases = [
            Case(zygote, machines, prepared, tmp_path, number, phase, victim)
            for number, phase in enumerate(phases)
        ]
        wait_until(lambda: all([case.stands() for case in cases]))
        machines[victim].unplug()
        unplugged = time.monotonic()
        print(f"all stand after {unplugged - began:.1f} s")
        wait_until(lambda: all([case.note_ends() for case in cases]), idle_s=30)
        for case in cases:
            if not zygote.has_ended(case.pids[victim]):
                os.kill(case.pids[victim], signal.SIGKILL)
        name, address = machines[victim].name, machines[0].address
    for case in cases:
        for rank in case.others():
            printed = case.logs[rank].read_text()
            late_s = case.ended_at[rank] - unplugged - PEER_TIMEOUT_S
            print(f"{case.phase}: rank {rank} ended {late_s:+.1f} s from --peer-timeout")
            assert zygote.wait(case.pids[rank]) in (1, 2), printed
            names = rf"rank {victim} \({name}\)|lost rank 0, the main process at {address}"
            assert re.search(names, printed), case.printed()
            assert "Traceback" not in printed
            assert late_s < GRACE_S, case.printed()
