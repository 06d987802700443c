"""Peers on hosts of their own: killed, unplugged, back; the others go on."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.multihost.hosts import PYTHON, hosts, why_not
from tests.runs import TINY_MODEL, newest_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
PEER_TIMEOUT_S = 6
WAYS = {
    "ddp": [],
    "rounds": ["--sync=diloco", "--sync-every=10", "--overlap-steps=3", "--compress=int8"],
}


def start(host, number, endpoint, prepared, folder, log, way):
    """The README's elastic launch, with shorter waits."""
    waits = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    host.start(
        *(PYTHON, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1"),
        *("--max-restarts=20", "--rdzv-backend=c10d", "--rdzv-id=elastic"),
        *(f"--rdzv-endpoint={endpoint}", f"--local-addr={host.address}"),
        f"--rdzv-conf={waits},is_host={int(number == 0)}",
        *("train.py", f"--dataset-path={prepared}", f"--output-dir={folder}", "--resume=auto"),
        *("--batch-size=8", "--max-steps=1000000", "--save-every=20", "--log-every=5"),
        *(f"--config-overrides={TINY_MODEL}", f"--peer-timeout={PEER_TIMEOUT_S}"),
        *("--report-to=none", "--cpu-threads=1", *way),
        log=log,
        environ={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def lines(folder):
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_peers(folder, log, count, timeout_s):
    """Seconds until an update was taken by `count` peers, as metrics.jsonl tells."""
    began, known = time.monotonic(), len(lines(folder))
    while True:
        found = lines(folder)
        known = min(known, len(found))  # a resume takes back what came after its checkpoint
        if any(line.get("peers") == count for line in found[-1:]):
            return time.monotonic() - began
        assert time.monotonic() - began < timeout_s, log.read_text()[-6000:]
        time.sleep(0.05)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_peers_are_killed_unplugged_and_come_back(prepared, tmp_path, way):
    folder = tmp_path / "run"
    logs = [tmp_path / f"host{number}.log" for number in range(3)]
    with hosts(3) as machines:
        endpoint = f"{machines[0].address}:29600"
        for number, host in enumerate(machines):
            start(host, number, endpoint, prepared, folder, logs[number], way)
        wait_for_peers(folder, logs[0], 3, timeout_s=90)
        while lines(folder)[-1]["step"] < 50:
            time.sleep(0.05)
        steps = [line["step"] for line in lines(folder)]

        machines[2].switch_off()
        spent = wait_for_peers(folder, logs[0], 2, timeout_s=60)
        print(f"a peer killed: {spent:.1f} s until the others' next line")
        assert lines(folder)[-1]["step"] > steps[0]

        machines[1].unplug()
        spent = wait_for_peers(folder, logs[0], 1, timeout_s=PEER_TIMEOUT_S + 60)
        print(f"a peer unplugged: {spent:.1f} s until the other's next line")

        machines[1].switch_off()
        machines[1].plug_in()
        start(machines[1], 1, endpoint, prepared, folder, logs[1], way)
        spent = wait_for_peers(folder, logs[0], 2, timeout_s=90)
        print(f"a peer back: {spent:.1f} s until the next line of both")

        before = newest_step(folder)
        machines[1].ask_to_stop()
        spent = wait_for_peers(folder, logs[0], 1, timeout_s=60)
        print(f"a peer shut down: {spent:.1f} s until the other's next line")
        machines[1].wait(timeout_s=30)
        assert "SIGTERM: stopped and saved" in logs[0].read_text() + logs[1].read_text()
        assert newest_step(folder) > before
    told = lines(folder)
    steps = [line["step"] for line in told]
    assert steps == sorted(set(steps)), "no step is missing a line, or has two"
    assert set(range(5, steps[-1] + 1, 5)) <= set(steps)
    assert re.search(r"lost a peer", logs[0].read_text())
