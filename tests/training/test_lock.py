"""One writer at a time: the living are respected, the dead and the silent are not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import lock
from p2p_llm_forge.training.lock import only_writer


def held_by(path, **holder):
    path.write_text(json.dumps({"host": platform.node(), "pid": 1, "run_id": None, **holder}))


def test_a_lock_is_held_while_entered_and_gone_afterwards(tmp_path):
    path = tmp_path / "new" / "run.lock"
    with only_writer(path, "the folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_living_process_of_this_machine_is_respected(tmp_path):
    path = tmp_path / "run.lock"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        held_by(path, pid=other.pid)
        with pytest.raises(ForgeError, match=f"the folder is in use by process {other.pid}"):
            only_writer(path, "the folder").__enter__()
        assert path.exists()
    finally:
        other.communicate(b"\n")
    with only_writer(path, "the folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_another_machine_is_respected_while_its_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_S", 1.0)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    path = tmp_path / "run.lock"
    held_by(path, host="elsewhere")
    over = threading.Event()
    renewing = threading.Thread(target=lock._keep_alive, args=(path, over))
    renewing.start()
    try:
        with pytest.raises(ForgeError, match="process 1 on elsewhere"):
            only_writer(path, "the folder").__enter__()
    finally:
        over.set()
        renewing.join()
    with only_writer(path, "the folder"):  # silent now
        assert json.loads(path.read_text())["host"] == platform.node()


def test_an_elastic_launch_takes_over_its_own_lock(tmp_path):
    path = tmp_path / "run.lock"
    held_by(path, host="elsewhere", run_id="home")
    with only_writer(path, "the folder", run_id="home"):
        assert json.loads(path.read_text())["run_id"] == "home"


def test_a_lock_that_was_taken_over_is_not_removed_by_the_old_holder(tmp_path):
    path = tmp_path / "run.lock"
    with only_writer(path, "the folder"):
        held_by(path, host="elsewhere")
    assert path.exists()


def test_a_torn_lock_is_stale_when_nobody_renews_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE_S", 0.5)
    path = tmp_path / "run.lock"
    path.write_text('{"host": "el')
    with only_writer(path, "the folder"):
        assert path.exists()
