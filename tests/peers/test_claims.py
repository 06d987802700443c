"""A rank is taken once; twice, too high, too late, of another launch: each is named for that."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import claims
from p2p_llm_forge.peers.claims import Claim, check_rank
from p2p_llm_forge.peers.store import Store
from tests.memory_channel import run_ranks

MAIN = "10.0.0.1:29500"


def claim(store, rank, world_size=3, token=""):
    return Claim(store, rank, world_size, MAIN, token)


def refusal_of(newcomer):
    with pytest.raises(ForgeError) as refusal:
        newcomer.take()
    return str(refusal.value)


def keys_of(store):
    return {key: store.get(key, 0) for key in store._client.list_keys()}


@pytest.fixture
def store():
    client = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return Store(client, 0, timeout_s=60)


def test_a_rank_that_waits_keeps_its_number(store, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.0)
    first, second = claim(store, 1, token="a"), claim(store, 1, token="b")
    first.take()

    came = threading.Event()

    def beat():
        while not came.is_set():
            first.beat()

    def come():
        try:
            return refusal_of(second)
        finally:
            came.set()

    _, refusal = run_ranks([beat, come], lambda act: act())
    assert f"rank 1 came to {MAIN} twice" in refusal and "0 to 2 processes" in refusal
    (note,) = claim(store, 0, token="c").refused()
    assert note.found in refusal
    first.beat()


def test_a_rank_that_was_started_again_takes_its_number(store, monkeypatch):
    monkeypatch.setattr(claims, "SILENCE_S", 0.05)
    monkeypatch.setattr(claims, "BEAT_S", 0.0)
    first, second = claim(store, 1, token="a"), claim(store, 1, token="b")
    first.take()
    second.take()  # the first has ended
    second.beat()
    with pytest.raises(ForgeError, match="twice"):
        first.beat()  # it was not dead, only very slow


@pytest.mark.skipif(
    not hasattr(dist.TCPStore, "list_keys"),
    reason="needs a torch whose store lists its keys (2.13 does, 2.9 does not)",
)
def test_whoever_comes_to_a_run_that_is_on_changes_nothing(store):
    for rank in range(3):
        claim(store, rank, token=str(rank)).take()
    claim(store, 0, token="0").all_came()
    before = keys_of(store)
    for late in (claim(store, 1, token="x"), claim(store, 3, 4, "y"), claim(store, 1, 2, "z")):
        assert f"a run is on already at {MAIN}" in refusal_of(late)
    assert keys_of(store) == before


def test_a_rank_of_another_launch_is_refused(store):
    claim(store, 0, token="a").take()
    refusal = refusal_of(claim(store, 3, 4, "b"))
    assert (
        "rank 3" in refusal
        and f"as one of 4 processes, the first that came to {MAIN} as one of 3" in refusal
    )


def test_a_process_may_run_again_at_the_same_store(store):
    first = claim(store, 1)
    first.take()
    first.all_came()
    again = claim(store, 1)
    again.take()
    assert again.refused() == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"found": 1}', '{"a": "b"}'])
def test_what_strangers_write_is_no_finding(store, text, monkeypatch):
    monkeypatch.setattr(claims, "SILENCE_S", 0.01)
    store.set(claims.REFUSED, text)
    assert claim(store, 0).refused() == []
    store.set("forge/rendezvous/claim/1", text)
    claim(store, 1).take()


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (7, 2), (-1, 2)])
def test_a_number_that_the_launch_does_not_have_is_refused(rank, world_size):
    with pytest.raises(ForgeError, match=f"this is rank {rank} of a launch of 2 processes.*0 to 1"):
        check_rank(rank, world_size)
