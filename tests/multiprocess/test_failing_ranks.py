"""What one rank lacks (speed, memory, data) is reported by that rank, and is never a hang."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time

import psutil
import pytest

from p2p_llm_forge.config import PrepareConfig
from prepare_data import prepare
from tests.runs import (
    LONG,
    TINY,
    by_hand,
    flags,
    lines,
    newest_step,
    read,
    slowed,
    start_each,
    start_ranks,
    step_logged,
)
from tests.texts import write_text
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def test_a_slow_rank_gets_fewer_blocks(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = flags(prepared, folder, **LONG, batch_size=32, micro_batch_size=4, balance="auto")
    ranks = start_ranks(zygote, words, 2, log)
    wait_until(lambda: step_logged(folder) >= 1)
    with slowed(ranks[1], share=0.2):

        def last_shares() -> list[int]:
            return lines(folder)[-1]["shares"]

        wait_until(lambda: last_shares()[0] > 2 * last_shares()[1])
    os.kill(ranks[0], signal.SIGTERM)
    assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log)
    assert all(sum(line["shares"]) == 32 for line in lines(folder))


def test_a_rank_without_memory_says_so_and_the_others_end(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    large = {"batch_size": 2048, "micro_batch_size": 1024}
    large["config_overrides"] = "n_layer=2,n_head=2,n_embd=256"
    ranks = start_ranks(zygote, flags(prepared, folder, **{**LONG, **large}), 2, log)
    # Enough to start with, not enough for a forward, which needs over a gigabyte.
    limit = psutil.Process(ranks[1]).memory_info().vms + 800 * 2**20
    resource.prlimit(ranks[1], resource.RLIMIT_AS, (limit, limit))
    assert [zygote.wait(pid) for pid in ranks] == [1, 1], read(log)
    printed = read(log)
    assert (
        "rank 1 (" in printed
        and "out of memory" in printed
        and "lower --micro-batch-size" in printed
    )
    assert "Traceback" not in printed


def test_a_rank_whose_blocks_are_gone_says_so(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    broken = shutil.copytree(prepared, tmp_path / "broken")
    shutil.rmtree(broken / "train")
    began = time.monotonic()
    words = [flags(data, folder, **LONG, peer_timeout=120) for data in (prepared, broken)]
    ranks = start_each(zygote, words, [log, log])
    assert [zygote.wait(pid) for pid in ranks] == [2, 2], read(log)
    assert time.monotonic() - began < 100, "it waited for a timeout"
    assert "rank 1 (" in read(log) and "broken" in read(log)


def test_ranks_with_different_data_are_refused_by_name(zygote, prepared, tmp_path):
    folder, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    text = write_text(tmp_path / "text.txt", documents=200, seed=7)
    prepare(PrepareConfig([str(text)], str(other), vocab_size=300, sequence_length=32))
    words = [flags(data, folder, **LONG) for data in (prepared, other)]
    ranks = start_each(zygote, words, [log, log])
    assert [zygote.wait(pid) for pid in ranks] == [2, 2], read(log)
    assert "rank 1 has" in read(log) and str(other) in read(log)
    assert not folder.exists()


@pytest.mark.parametrize("silent", [0, 1])
@pytest.mark.parametrize("moment", ["it has come", "the folder is open"])
def test_a_rank_that_falls_silent_before_the_first_update_is_given_up(
    zygote, prepared, tmp_path, moment, silent
):
    """Its system answers for it still, so nothing but its heartbeat shows it."""
    folder, log = tmp_path / "run", tmp_path / "log"
    ranks = start_ranks(zygote, flags(prepared, folder, **LONG, peer_timeout=4), 2, log)
    if moment == "it has come":
        come = psutil.Process(ranks[1])
        wait_until(lambda: come.net_connections("tcp"), longest_pause_s=0.001)
    else:
        wait_until((folder / "run.lock").exists, longest_pause_s=0.001)
    os.kill(ranks[silent], signal.SIGSTOP)
    assert zygote.wait(ranks[1 - silent]) in (1, 2), read(log)
    printed = read(log)
    assert "Traceback" not in printed
    assert f"rank {silent}" in printed or "rank 0 of a run (no answer" in printed, printed
    os.kill(ranks[silent], signal.SIGKILL)
    os.kill(ranks[silent], signal.SIGCONT)
    zygote.wait(ranks[silent])


@pytest.mark.parametrize("killed", [0, 2])
@pytest.mark.parametrize("strategy", [{}, {"sync": "diloco", "sync_every": 2}], ids=str)
def test_all_others_name_the_rank_that_was_killed(zygote, prepared, tmp_path, strategy, killed):
    """And not each other, though each ends because the others' connections close."""
    folder, logs = tmp_path / "run", [tmp_path / f"{rank}.log" for rank in range(3)]
    words = flags(prepared, folder, **{**LONG, "batch_size": 6, **strategy})
    ranks = start_each(zygote, [words] * 3, logs)
    wait_until(lambda: step_logged(folder) >= 1)
    os.kill(ranks[killed], signal.SIGKILL)
    for rank in {0, 1, 2} - {killed}:
        assert zygote.wait(ranks[rank]) == 1, read(logs[rank])
        found = re.findall(r"error: .*\n  fix: .*", read(logs[rank]))
        assert len(found) == 1 and "lost" in found[0], read(logs[rank])
        # The third may be named as who has found it, and as nothing else.
        third = 3 - rank - killed
        blamed = re.sub(
            rf"(lost a peer: rank {killed} .*?), as rank {third} .*? found", r"\1", found[0]
        )
        assert re.findall(r"rank (\d)", blamed) == [str(rank), str(killed)], found


def test_a_notebook_trains_again_after_a_peer_was_lost(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    shared = {"dataset_path": str(prepared), **TINY, "report_to": "none"}
    shared |= {"batch_size": 8, "cpu_threads": 1}
    pair = {**shared, **LONG, **by_hand(2), "output_dir": str(folder), "peer_timeout": 3}
    alone = {**shared, "output_dir": str(tmp_path / "alone"), "max_steps": 2}
    notebook, peer = (
        zygote.start(
            [json.dumps({**pair, "rank": rank}), json.dumps(alone)],
            tmp_path / f"{rank}.log" if rank else log,
            script="tests.multiprocess.train_again",
        )
        for rank in range(2)
    )
    wait_until(lambda: step_logged(folder) >= 1)
    os.kill(peer, signal.SIGSTOP)
    assert zygote.wait(notebook) == 0, read(log)
    assert re.search(r"caught: .*lost a peer: rank 1", read(log))
    assert "threads: ['MainThread']" in read(log)
    assert step_logged(tmp_path / "alone") == 2
    os.kill(peer, signal.SIGKILL)
    os.kill(peer, signal.SIGCONT)
    zygote.wait(peer)


def test_updates_wait_for_a_slow_rank(zygote, prepared, tmp_path):
    """One that computes for three times --peer-timeout lives, however the others wait for it."""
    runs = []
    for name, strategy in {"ddp": {}, "diloco": {"sync": "diloco", "sync_every": 2}}.items():
        folder, log = tmp_path / name, tmp_path / f"{name}.log"
        words = flags(prepared, folder, max_steps=2, peer_timeout=3, **strategy)
        slow = {"script": "tests.multiprocess.slow_update"}
        runs.append((folder, log, start_ranks(zygote, words, 2, log, **slow)))
    for folder, log, ranks in runs:
        assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(log)
        assert read(log).count("slow update") == 1 and step_logged(folder) == 2


def test_an_evaluation_waits_for_a_slow_rank(zygote, tmp_path):
    """It may compile, or have a slower machine; it lives, so the others do not give it up."""
    together = by_hand(2)
    ranks = [
        zygote.start(
            [json.dumps({**together, "rank": rank, "peer_timeout": 1.0})],
            tmp_path / "log",
            script="tests.multiprocess.slow_evaluation",
        )
        for rank in range(2)
    ]
    assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(tmp_path / "log")


def test_a_rank_that_cannot_write_is_named_and_the_run_continues(zygote, prepared, tmp_path):
    """Its files may have no more than 40 kB, as on a disk that is full."""
    folder, log = tmp_path / "run", tmp_path / "log"
    chosen = {"sync": "diloco", "sync_every": 4, "save_every": 4}
    ranks = start_ranks(zygote, flags(prepared, folder, **{**LONG, **chosen}), 2, log)
    wait_until(lambda: newest_step(folder) >= 4)
    resource.prlimit(ranks[1], resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    wait_until(lambda: "training continues" in read(log))
    resource.prlimit(
        ranks[1], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    reached = newest_step(folder)
    wait_until(lambda: newest_step(folder) > reached + 8)
    os.kill(ranks[0], signal.SIGTERM)
    assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log)
    assert "rank 1 could not write" in read(log)
