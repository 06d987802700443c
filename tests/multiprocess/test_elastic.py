"""Launches by launch/elastic.py on this machine: how they end, and what does not end them."""

from __future__ import annotations

import signal
import sys

import psutil
import pytest

from p2p_llm_forge.peers.elastic_workers import environ_of
from p2p_llm_forge.peers.rank_failure import NOT_MET
from tests.ports import free_port
from tests.runs import LONG, flags, lines, newest_step, read, results, step_logged
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def words(port, data, folder, **settings):
    """The same line for every peer."""
    return [
        *(sys.executable, "launch/elastic.py", "--main=127.0.0.1", f"--port={port}"),
        *("train.py", *flags(data, folder, **settings)),
    ]


def test_a_mistake_is_one_message_and_its_own_status(run, tmp_path):
    status, printed = run(*words(free_port(), tmp_path / "nowhere", tmp_path / "run"))
    assert status == 2 and printed.count("error: ") == 1 and "nowhere" in printed
    assert "Traceback" not in printed and "127.0.0.1 ended with status 2" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_elastic", [True, False])
def test_a_worker_that_does_not_meet_the_others_says_so_to_its_launcher(
    zygote, prepared, tmp_path, is_elastic
):
    port = free_port()
    start = {"first_rank": 0, "world_size": 2, "machine": 0, "round": 2, "token": "t"}
    environ = environ_of({**start, "main_address": "127.0.0.1", "main_port": port}, 1, 0)
    argv = flags(prepared, tmp_path / "run", rendezvous_timeout=1)
    if not is_elastic:
        argv += ["--rank=0", "--world-size=2", f"--master-port={port}", "--master-addr=127.0.0.1"]
    pid = zygote.start(argv, tmp_path / "log", environ if is_elastic else {})
    assert zygote.wait(pid) == (NOT_MET if is_elastic else 2), read(tmp_path / "log")
    assert "rank 1 did not come to" in read(tmp_path / "log") and not (tmp_path / "run").exists()


def test_the_launch_ends_with_its_run(run, prepared, tmp_path):
    status, printed = run(*words(free_port(), prepared, tmp_path / "run"))
    assert status == 0 and results(tmp_path / "run")["steps"] == 3, printed


def test_a_launch_outlives_a_killed_worker_and_a_newcomers_mistake(start, prepared, tmp_path):
    folder, port = tmp_path / "run", free_port()
    long = {**LONG, "save_every": 20}
    log = tmp_path / "log"
    same = words(port, prepared, folder, **long)
    main, other = (start("bash", "-c", 'exec "$@" >> "$0" 2>&1', log, *same) for _ in range(2))
    wait_until(lambda: step_logged(folder) >= 30 and lines(folder)[-1]["peers"] == 2)
    (worker,) = psutil.Process(other.pid).children()
    worker.kill()
    wait_until(lambda: not worker.is_running())
    reached = step_logged(folder)
    wait_until(lambda: step_logged(folder) > reached + 10)

    newcomer = start(*words(port, prepared, folder, **long, seed=7))
    refused, _ = newcomer.communicate()
    assert newcomer.returncode == 2, refused
    assert "the others continue without this machine" in refused
    reached = step_logged(folder)
    wait_until(lambda: step_logged(folder) > reached + 10)

    for peer in (main, other):
        peer.send_signal(signal.SIGTERM)
    statuses, printed = [main.wait(), other.wait()], read(log)
    assert statuses == [143, 143], printed
    assert "a worker on 127.0.0.1 ended with status -9" in log.read_text()
    assert f"stopped and saved after step {newest_step(folder)}" in printed
    steps = [line["step"] for line in lines(folder)]
    assert steps == list(range(1, steps[-1] + 1)), "no step is missing a line, or has two"
