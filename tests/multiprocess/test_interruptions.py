"""Signals, time limits, locks and full disks: a run stops when asked, and can always resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from p2p_llm_forge.training import checkpoint
from tests.runs import LONG, flags, lines, newest_step, read, start_ranks, step_logged
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_any_rank_makes_all_save_and_stop(
    zygote, prepared, tmp_path, processes, number, status
):
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG), processes, log)
    wait_until(lambda: step_logged(folder) >= 3)
    os.kill(ranks[-1], number)
    assert [zygote.wait(pid) for pid in ranks] == [status] * processes, read(log)
    saved = newest_step(folder)
    assert saved >= 3 and checkpoint.damage(folder / f"checkpoint-{saved}") is None
    assert lines(folder)[-1]["step"] == saved, "it stopped after the update in which it was asked"
    assert f"{number.name}: stopped and saved after step {saved}" in read(log)
    more = flags(prepared, folder, **{**LONG, "max_steps": saved + 2})
    ranks = start_ranks(zygote, more, processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(log)


def test_a_second_signal_ends_a_rank_at_once(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG, peer_timeout=60), 2, log)
    wait_until(lambda: step_logged(folder) >= 1)
    os.kill(ranks[1], signal.SIGSTOP)  # rank 0 now waits in an exchange for a peer that is silent
    os.kill(ranks[0], signal.SIGTERM)
    time.sleep(1.2)  # a launcher repeats a signal within a second; a person's second wish is later
    os.kill(ranks[0], signal.SIGTERM)
    asked_again = time.monotonic()
    assert zygote.wait(ranks[0]) == 143
    assert time.monotonic() - asked_again < 30, "it waited for its peer"
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[1], signal.SIGCONT)
    zygote.wait(ranks[1])


def test_sigusr1_saves_and_goes_on(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG), 2, log)
    wait_until(lambda: step_logged(folder) >= 2)
    os.kill(ranks[1], signal.SIGUSR1)
    wait_until(lambda: newest_step(folder) > 0)
    saved = newest_step(folder)
    wait_until(lambda: step_logged(folder) >= saved + 3)
    assert checkpoint.damage(folder / f"checkpoint-{saved}") is None
    assert newest_step(folder) == saved, "one signal, one checkpoint"
    os.kill(ranks[0], signal.SIGTERM)
    assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log)


def test_a_time_limit_saves_and_stops(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG, max_seconds=3), 2, log)
    assert [zygote.wait(pid) for pid in ranks] == [124, 124], read(log)
    assert newest_step(folder) > 0
    assert "--max-seconds is over: stopped and saved" in read(log)


def test_two_runs_in_one_folder_the_second_refuses(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    first = zygote.start(flags(prepared, folder, **LONG), log)
    wait_until(lambda: step_logged(folder) >= 1)
    second = zygote.start(flags(prepared, folder, **LONG), tmp_path / "second")
    assert zygote.wait(second) == 2
    assert f"is in use by process {first} on" in read(tmp_path / "second")
    os.kill(first, signal.SIGKILL)
    zygote.wait(first)
    assert (folder / "run.lock").exists(), "a killed run leaves its lock"
    third = zygote.start(flags(prepared, folder, **{**LONG, "max_steps": 2}), tmp_path / "third")
    assert zygote.wait(third) == 0, read(tmp_path / "third")
    assert not (folder / "run.lock").exists()


def test_a_silent_peer_is_given_up_after_the_timeout(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG, peer_timeout=3), 2, log)
    wait_until(lambda: step_logged(folder) >= 1)
    os.kill(ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert zygote.wait(ranks[0]) == 1
    assert time.monotonic() - stopped < 25, "of the 30 s by default"
    assert "rank 0 (" in read(log) and "lost a peer" in read(log)
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[1], signal.SIGCONT)
    zygote.wait(ranks[1])


def test_a_full_disk_is_told_and_training_goes_on(zygote, prepared, tmp_path):
    folder, log = tmp_path / "disk", tmp_path / "log"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        settings = {"max_steps": 12, "save_every": 2, "keep_checkpoints": 9, "log_every": 1}
        words = flags(prepared, folder / "run", **settings)
        run = zygote.start(words, log)
        assert zygote.wait(run) == 2, read(log)
        printed = read(log)
        assert "No space left on device" in printed and "training continues" in printed
        assert lines(folder / "run")[-1]["step"] == 12, "it went on to the end"
        steps = checkpoint.steps_saved(folder / "run")
        assert steps and max(steps) < 12
        for step in steps:
            assert checkpoint.damage(folder / "run" / f"checkpoint-{step}") is None
        for step in steps[1:]:
            shutil.rmtree(folder / "run" / f"checkpoint-{step}")
        again = zygote.start([*words, "--keep-checkpoints=1"], log)
        assert zygote.wait(again) == 0, read(log)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
