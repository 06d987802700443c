"""A launcher that is killed takes its workers with it: real launchers, a real SIGKILL."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.ports import free_port
from tests.runs import LONG, flags, newest_step, step_logged
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
BIN, CONFIGS = Path(sys.executable).parent, ROOT / "accelerate_configs"
ACCELERATE = [BIN / "accelerate", "launch", "--main_process_port=0", "--config_file"]
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node=2"],
    "accelerate, 1": [*ACCELERATE, CONFIGS / "cpu.yaml"],
    "accelerate, 2": [*ACCELERATE, CONFIGS / "cpu_2_processes.yaml"],
    "elastic": [sys.executable, "launch/elastic.py", "--main=127.0.0.1", "--processes=2"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_workers_of_a_killed_launcher_end(start, prepared, tmp_path, name):
    folder = tmp_path / "run"
    port = [f"--port={free_port()}"] if name == "elastic" else []
    words = [*LAUNCHERS[name], *port, "train.py", *flags(prepared, folder, **LONG)]
    launcher = start(*words, environ={"PYTHONFAULTHANDLER": "1"})  # no worker ends without a word
    wait_until(lambda: step_logged(folder) >= 3)
    workers = [
        process
        for process in psutil.Process(launcher.pid).children(recursive=True)
        if "train.py" in process.cmdline()
    ]
    assert len(workers) == (1 if name == "accelerate, 1" else 2)
    launcher.kill()
    wait_until(lambda: not any(map(psutil.Process.is_running, workers)))
    printed, _ = launcher.communicate()
    if name in ("torchrun", "accelerate, 2"):  # these take the store of the run with them
        assert "lost" in printed or "SIGTERM" in printed, printed
    else:
        saved = newest_step(folder)
        assert saved >= 3 and f"SIGTERM: stopped and saved after step {saved}" in printed, printed
