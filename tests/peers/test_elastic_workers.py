"""The workers of one machine: how they are started, asked to stop, and ended."""

from __future__ import annotations

import asyncio

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers import elastic_workers
from p2p_llm_forge.peers.elastic_workers import Workers, environ_of
from p2p_llm_forge.peers.launch import read_launch
from tests import ROOT
from tests.waiting import wait_until

START = {
    **{"type": "start", "token": "of this launch", "round": 3, "machine": 1, "first_rank": 2},
    **{"world_size": 4, "main_address": "10.0.0.1", "main_port": 29999},
}


def test_the_environment_is_what_train_py_reads():
    launch = read_launch(TrainConfig(), environ_of(START, 2, 1))
    assert (launch.rank, launch.world_size, launch.local_rank, launch.machines) == (3, 4, 1, 2)
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 29999)
    assert launch.is_elastic and launch.run_id == "of this launch"
    assert not launch.serves_store and not launch.by_torchrun


@pytest.mark.parametrize(("most", "room"), [(None, 16), (6, 6), (64, 64)])
def test_a_batch_has_to_do_for_those_who_may_come(most, room):
    launch = read_launch(TrainConfig(), environ_of({**START, "most_processes": most}, 2, 1))
    assert (launch.most_processes, launch.room) == (most, room)
    assert read_launch(TrainConfig(), {"RANK": "0", "WORLD_SIZE": "3"}).room == 3


def run(what, capfd, act):
    """Start two workers and `act` on them once they have printed; returns (their status, acts)."""
    printed = []

    def has_printed(expected):
        printed.append(capfd.readouterr().out)
        return "".join(printed).count("\n") >= expected

    async def course():
        workers = await Workers.start([str(ROOT / "tests/peers/worker.py"), what], 2, START)
        ended = asyncio.ensure_future(workers.ended())
        expected = 4 if what in ("saves", "hangs") else 2
        await asyncio.to_thread(wait_until, lambda: has_printed(expected))
        await act(workers)
        return await ended

    return asyncio.run(course())


async def nothing(workers):
    pass


def test_workers_that_end_well(capfd):
    assert run("ends", capfd, nothing) == 0


def test_the_others_are_ended_when_one_fails(capfd, monkeypatch):
    monkeypatch.setattr(elastic_workers, "TO_EXPLAIN_S", 0.1)
    monkeypatch.setitem(START, "first_rank", 0)
    assert run("fails-at-1", capfd, nothing) == 7


@pytest.mark.parametrize(("what", "status"), [("saves", 143), ("hangs", -9)])
def test_asked_to_stop(capfd, what, status):
    async def stop(workers):
        await workers.stop(0.2 if what == "hangs" else 600.0)

    assert run(what, capfd, stop) == status
