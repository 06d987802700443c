"""Files that are whole or absent; a lock that one process has, whatever happens to the others."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_llm_forge import files
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Holder, Pulse, only_writer
from tests import ROOT
from tests.waiting import wait_until

RACES = 300


def holders(path: Path) -> list[str]:
    """The names in the lock's folder."""
    return sorted(os.listdir(path)) if path.exists() else []


# --- writing --------------------------------------------------------------------------------------


def test_json_is_read_as_it_was_written_and_leaves_nothing_beside(tmp_path):
    path, value = tmp_path / "a.json", {"ü": [1, None, 2.5], "a": {"b": "🙂"}}
    for durable in (True, False):
        files.write_json(path, value, durable)
        assert files.read_json(path) == json.loads(path.read_text("utf-8")) == value
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", b"\xff", '"\\ud800"', '{"\\udc00": 1}', "NaN", "[1, -Infinity]", "1e999"),
        *("9" * 30, "-" + "9" * 5000, "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
    ],
    ids=range(12),
)
def test_odd_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        files.parse_json(text)


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_file(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_file(path, b"new and longer")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_name_outlives_the_first_also_where_there_are_no_links(
    tmp_path, monkeypatch, has_links
):
    if not has_links:
        monkeypatch.setattr(os, "link", _no_links)
    (tmp_path / "one").write_bytes(b"content")
    files.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "one").unlink()
    assert (tmp_path / "two").read_bytes() == b"content"


def _no_links(*_):
    raise PermissionError(1, "Operation not permitted")  # as FAT answers


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(os.urandom((1 << 20) + 7))
    said = subprocess.check_output(["sha256sum", str(path)], text=True)
    assert files.sha256_of(path) == said.split()[0]


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    one, other = {"a": 1, "b": [2, 3]}, {"b": [2, 3], "a": 1}
    assert files.fingerprint(one) == files.fingerprint(other)
    assert files.fingerprint(one) != files.fingerprint({**one, "b": [3, 2]})


# --- signs of life --------------------------------------------------------------------------------


def test_a_pulse_needs_no_clock_that_agrees(tmp_path):
    path = tmp_path / "mark"
    pulse = Pulse(path)
    assert not pulse.is_beating(), "there is no file"
    path.touch()
    os.utime(path, (1.0, 1.0))  # decades ago
    assert pulse.is_beating(), "seen for the first time"
    assert not pulse.is_beating(silence_s=0.0)
    os.utime(path, (0.5, 0.5))  # and further back
    assert pulse.is_beating()
    path.unlink()
    assert not pulse.is_beating()


# --- the lock -------------------------------------------------------------------------------------


def test_a_lock_is_held_while_entered_and_gone_afterwards(tmp_path):
    path = tmp_path / "new" / "run.lock"
    with only_writer(path, "the folder") as lock:
        lock.confirm()
        assert len(holders(path)) == 1
        (tmp_path / "new" / "made meanwhile").touch()
    assert os.listdir(tmp_path / "new") == ["made meanwhile"]


def test_a_folder_that_was_made_for_a_lock_goes_with_it(tmp_path):
    with only_writer(tmp_path / "new" / "run.lock", "the folder"):
        pass
    assert os.listdir(tmp_path) == []


def test_two_of_one_process_do_not_share_it(tmp_path):
    with (
        only_writer(tmp_path / "lock", "the folder"),
        pytest.raises(ForgeError, match=f"in use by process {os.getpid()}"),
    ):
        only_writer(tmp_path / "lock", "the folder").__enter__()


def test_of_two_starters_one_has_the_lock_in_every_race(tmp_path):
    words = [sys.executable, "-m", "tests.lock_races", str(tmp_path), str(RACES)]
    outcomes = json.loads(subprocess.check_output(words, cwd=ROOT))
    assert outcomes == [1] * RACES
    assert os.listdir(tmp_path) == ["run.lock"], "nothing is left beside it"


def left_behind(path: Path, **changes: object) -> Holder:
    """A lock as a holder leaves it that is killed."""
    holder = replace(Holder.this_process(None), token="f" * 16, **changes)
    path.mkdir()
    (path / holder.name()).touch()
    return holder


@contextlib.contextmanager
def sleeper() -> Iterator[int]:
    """Another process, which does nothing. Its id."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_a_pid_of_another_start_time_is_another_process(tmp_path):
    path = tmp_path / "run.lock"
    with sleeper() as pid:
        started = files._start_of(pid)
        holder = left_behind(path, pid=pid, started=started)
        with pytest.raises(ForgeError, match=f"in use by process {pid} on {platform.node()}"):
            only_writer(path, "the folder").__enter__()
        (path / holder.name()).rename(path / replace(holder, started=started - 1).name())
        with only_writer(path, "the folder") as lock:
            lock.confirm()


def test_a_zombie_holds_nothing(tmp_path):
    process = subprocess.Popen(["sleep", "1000"])
    left_behind(tmp_path / "run.lock", pid=process.pid, started=files._start_of(process.pid))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how
    with only_writer(tmp_path / "run.lock", "the folder") as lock:
        lock.confirm()
        assert holders(tmp_path / "run.lock") == [lock.mark.name]
    process.wait()


def test_an_elastic_launch_takes_over_its_own_lock(tmp_path):
    path = tmp_path / "run.lock"
    own = Holder.this_process("home")
    left_behind(path, table="elsewhere", host="elsewhere", run=own.run)
    with only_writer(path, "the folder", run_id="home") as lock:
        lock.confirm()
        assert holders(path) == [lock.mark.name]


def test_a_lock_that_was_taken_over_is_neither_touched_nor_removed_by_the_old_holder(tmp_path):
    path = tmp_path / "run.lock"
    again = only_writer(path, "the folder", run_id="home")
    with only_writer(path, "the folder", run_id="home") as old, again as new:
        wait_until(lambda: old.is_lost)
        with pytest.raises(ForgeError, match="taken over by process"):
            old.confirm()
        new.confirm()
        assert not new.is_lost
    assert not path.exists()


def test_a_lock_that_was_removed_is_lost(tmp_path):
    with only_writer(tmp_path / "run.lock", "the folder") as lock:
        lock.mark.unlink()
        with pytest.raises(ForgeError, match="run.lock was removed"):
            lock.confirm()


def test_an_empty_lock_belongs_to_nobody_and_a_foreign_file_in_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SILENCE_S", 0.2)
    path = tmp_path / "run.lock"
    path.mkdir()
    with only_writer(path, "the folder"):
        pass
    path.mkdir()
    (path / "notes.txt").touch()
    with pytest.raises(ForgeError, match="locked by nobody, but .*run.lock is in the way"):
        only_writer(path, "the folder").__enter__()
    assert holders(path) == ["notes.txt"]


def test_a_file_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / "run.lock").touch()
    with pytest.raises(ForgeError, match="remove the file that is in the way of .*run.lock"):
        only_writer(tmp_path / "run.lock", "the folder").__enter__()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ForgeError, match="the folder cannot be written: "):
        only_writer(tmp_path / "file" / "run.lock", "the folder").__enter__()


# --- hosts and containers -------------------------------------------------------------------------


class Elsewhere:
    """A holder in a container of its own, which sees other processes under the same host name."""

    def __init__(self, path: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
            + ["-m", "tests.lock_holder", str(path), *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer = self.read()

    def read(self) -> dict:
        """The next line that it prints."""
        return json.loads(self.process.stdout.readline())

    def confirm(self) -> dict:
        """What it answers when it looks whether it still has the lock."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def inside(self) -> int:
        """The id, as seen from here, of the process that holds the lock."""
        (child,) = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return int(child)

    def end(self) -> None:
        """Kill it with all that it has started."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def elsewhere(tmp_path) -> Iterator[object]:
    """Starts holders of one lock in containers of their own; ended with the test."""
    started: list[Elsewhere] = []

    def start(*words: str) -> Elsewhere:
        started.append(Elsewhere(tmp_path / "run.lock", *words))
        return started[-1]

    probe = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("needs the right to make PID namespaces: run as root")
    yield start
    for one in started:
        one.end()


@pytest.mark.slow
@pytest.mark.parametrize("clock_lag_s", ["0", "40"])
def test_a_holder_in_another_container_is_respected_until_it_is_silent(elsewhere, clock_lag_s):
    one = elsewhere(clock_lag_s)
    assert one.answer["held"] and one.answer["pid"] == 1
    other = elsewhere()
    assert f"in use by process 1 on {platform.node()}" in other.answer["error"]
    assert one.confirm() == {"confirmed": True, "is_lost": False}
    one.end()
    assert elsewhere().answer["held"]


@pytest.mark.slow
def test_a_holder_that_slept_finds_that_it_was_taken_over(elsewhere):
    one = elsewhere()
    assert one.answer["held"]
    asleep = one.inside()
    os.kill(asleep, signal.SIGSTOP)
    other = elsewhere()  # waits until the first one is silent for long enough
    assert other.answer["held"]
    os.kill(asleep, signal.SIGCONT)
    assert "was taken over by process 1" in one.confirm()["error"]
    assert other.confirm() == {"confirmed": True, "is_lost": False}
