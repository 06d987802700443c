"""A worker ends with its parent: real processes, a real SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from tests import ROOT
from tests.waiting import wait_until

PROGRAM = str(ROOT / "tests/peers/orphan.py")


@pytest.fixture
def started(tmp_path):
    """Start the program in a role; all that it started is ended with the test."""
    processes = []

    def start(role, *more):
        words = [sys.executable, PROGRAM, role, str(tmp_path / "pid"), *more]
        processes.append(subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
    if (tmp_path / "pid").exists() and psutil.pid_exists(int((tmp_path / "pid").read_text())):
        psutil.Process(int((tmp_path / "pid").read_text())).kill()


def has_ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_worker_is_asked_and_then_ended_when_its_parent_is_killed(started, tmp_path):
    parent = started("parent")
    file = tmp_path / "pid"
    wait_until(file.exists)
    worker = int(file.read_text())
    assert not has_ended(worker)
    parent.kill()
    parent.wait()
    wait_until(lambda: has_ended(worker))
    assert file.with_suffix(".asked").exists()


def test_a_parent_that_ended_before_is_noticed(started, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    worker = started("worker", str(gone.pid))
    wait_until(lambda: worker.poll() is not None)
    assert (tmp_path / "pid").with_suffix(".asked").exists()
