"""The folder in which a dataset grows: one run at a time, and room for it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_llm_forge.data import pieces, splits
from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.unfinished import claimed
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Holder
from tests.data.preparations import config
from tests.texts import contents
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_second_run_in_the_same_folder_refuses(text, tmp_path, undisturbed, monkeypatch):
    right, may_work = splits.encode_piece, threading.Event()

    def wait_and_encode(number, *arguments):
        assert number == 0 or may_work.wait(60)
        return right(number, *arguments)

    monkeypatch.setattr(splits, "encode_piece", wait_and_encode)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepare, config(text, tmp_path / "out"))
        try:
            wait_until(lambda: any(tmp_path.rglob("pieces/*.json")))
            with pytest.raises(ForgeError, match=f"out is in use by process {os.getpid()} on"):
                prepare(config(text, tmp_path / "out"))
        finally:
            may_work.set()
        first.result()
    assert contents(tmp_path / "out") == undisturbed


def leave_lock(folder: Path, **changes) -> Path:
    """The lock of a process that is like this one but for the changes."""
    mark = folder / "unfinished" / "lock" / replace(Holder.this_process(None), **changes).name()
    mark.parent.mkdir(parents=True)
    mark.touch()
    return mark


def test_a_lock_holds_as_long_as_its_process_lives(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    started = Holder.this_process(None).started
    dead = {"gone": {"pid": ended.pid}, "pid-used-again": {"started": started - 99}}
    for name, changes in dead.items():
        mark = leave_lock(tmp_path / name, **changes)
        with claimed(tmp_path / name) as lock:
            lock.confirm()
        assert not mark.exists() and not (tmp_path / name).exists()
    mark = leave_lock(tmp_path / "living")
    with (
        pytest.raises(ForgeError, match=f"(?s)in use by process {os.getpid()} on .*wait"),
        claimed(tmp_path / "living"),
    ):
        pass
    assert mark.exists()


def test_a_run_whose_lock_was_taken_over_ends_and_leaves_the_work_alone(tmp_path):
    with pytest.raises(ForgeError, match="taken over"), claimed(tmp_path / "out") as lock:
        work = tmp_path / "out" / "unfinished" / "pieces"
        work.mkdir()
        other = replace(Holder.this_process(None), pid=1, host="elsewhere").name()
        lock.mark.rename(lock.mark.with_name(other))
        raise OSError("whatever comes of it")
    assert work.exists()


def test_what_fails_before_a_piece_is_done_leaves_no_trace(tmp_path):
    for done in (False, True):
        with pytest.raises(ValueError), claimed(tmp_path / "out") as lock:
            folder = tmp_path / "out" / "unfinished"
            (folder / "pieces").mkdir()
            (folder / "dataset-1").mkdir()
            if done:
                (folder / "pieces" / "0.json").touch()
            raise ValueError
        assert (tmp_path / "out").exists() == done and not lock.mark.exists()
    assert [path.name for path in (tmp_path / "out" / "unfinished").iterdir()] == ["pieces"]


# --- no room --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_resumable_state_and_names_the_room_needed(
    text, tmp_path, undisturbed, monkeypatch
):
    right, written = pieces.write_file, []

    def fill_up(path, content, durable):
        if path.suffix == ".tokens":
            if len(written) == 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
        right(path, content, durable)

    monkeypatch.setattr(pieces, "write_file", fill_up)
    with pytest.raises(ForgeError, match=r"(?s)is full: 0.00 GB are needed.*free.*is kept"):
        prepare(config(text, tmp_path / "out", num_workers=1))
    assert len(list((tmp_path / "out").rglob("pieces/*.json"))) == 10
    monkeypatch.setattr(pieces, "write_file", right)
    usage = shutil._ntuple_diskusage(10, 10, 0)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ForgeError, match="are needed to finish, 0.00 GB are free"):
            prepare(config(text, tmp_path / "out"))
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed
    assert Manifest.load(tmp_path / "out").splits["train"].blocks > 10


def test_a_disk_that_is_really_full_is_reported_at_every_moment(text, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str, *options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs"]
        return subprocess.run([*command, str(disk)], capture_output=True).returncode

    if mount("16k"):
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        kept = []
        # Too small for the tokenizer, for the first piece, for all pieces, for the dataset.
        for size in ("16k", "44k", "80k", "300k", "900k"):
            assert not mount(size, "remount")
            with pytest.raises(ForgeError, match="(?s)is full: .* GB are needed.*same command"):
                prepare(config(text, disk / "out", num_workers=2))
            kept.append(len(list(disk.rglob("pieces/*.json"))))
        assert kept == sorted(kept) and kept[0] == 0 < kept[-1]
        assert not mount("9m", "remount")
        prepare(config(text, disk / "out"))
        assert contents(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
