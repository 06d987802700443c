"""A heartbeat that stands still is a lost peer, by name; one that is slow or sleeps is not."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import torch.distributed as dist

from p2p_llm_forge.peers import liveness
from p2p_llm_forge.peers.liveness import FAILED, LEFT, Liveness
from p2p_llm_forge.peers.rank_failure import LostPeer
from p2p_llm_forge.peers.store import Store
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _quick_hearts(monkeypatch):
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(liveness, "NAMING_S", 0.5)


@contextlib.contextmanager
def ranks_of(count, timeout_s=3600.0, **how):
    """The hearts of so many ranks; a test stops them when it likes."""
    shared = dist.HashStore()
    hearts = [
        Liveness(Store(shared, rank, 60), rank, count, timeout_s, **how) for rank in range(count)
    ]
    try:
        for heart in hearts:
            heart.start()
        yield hearts
    finally:
        for heart in hearts:
            heart.close()


def loss_of(heart):
    return wait_until(lambda: heart.loss)


def has_seen(heart, rank):
    return bool(heart._peers[rank].beat)


def test_a_rank_that_stands_still_is_lost_by_name_and_the_others_are_not():
    with ranks_of(3) as hearts:
        wait_until(lambda: has_seen(hearts[0], 1) and has_seen(hearts[0], 2))
        hearts[2].stop()
        hearts[0].timeout_s = 0.5
        loss = loss_of(hearts[0])
        assert loss.ranks == [2] and loss.status == 1
        assert "rank 2 (" in str(loss) and "no sign of life" in str(loss)
        with pytest.raises(LostPeer), hearts[0].exchange():
            raise AssertionError("nothing begins after a loss")


def test_seconds_that_this_rank_has_slept_itself_are_no_silence_of_others():
    """As when a laptop's lid was closed, or all machines stood still together."""
    heart = Liveness(Store(dist.HashStore(), 0, 60), 0, 2, timeout_s=10.0)
    heart.store._client.set(heart._keys[1], '{"count": 1}')
    heart._look(0.0)
    heart._look(2 * liveness.HEARTBEAT_S)  # the most that one look may add, see _live
    heart._judge()
    assert heart.loss is None
    for _ in range(1000):
        heart._look(2 * liveness.HEARTBEAT_S)
    heart._judge()
    assert heart.loss.ranks == [1]
    heart.close()


def test_only_who_has_come_is_watched_in_a_rendezvous():
    with ranks_of(3, phase="rendezvous") as hearts:
        wait_until(lambda: has_seen(hearts[0], 1) and has_seen(hearts[0], 2))
        late = Liveness(Store(dist.HashStore(), 0, 60), 0, 2, 10.0, phase="rendezvous")
        for _ in range(1000):
            late._look(1.0)
        late._judge()
        assert late.loss is None
        late.close()


@pytest.mark.parametrize(
    "error", [RuntimeError("of any wording at all"), dist.DistError("x"), dist.DistStoreError()]
)
def test_what_fails_in_an_exchange_is_a_lost_peer_whatever_it_says(error):
    with ranks_of(3) as hearts:
        wait_until(lambda: all(has_seen(hearts[0], rank) for rank in (1, 2)))
        hearts[1].stop()
        with pytest.raises(LostPeer, match="lost a peer: rank 1 ") as raised, hearts[0].exchange():
            raise error
        assert raised.value.ranks == [1]
        assert raised.value is hearts[0].loss


def test_a_link_that_breaks_between_living_ranks_is_said_to_be_that():
    with ranks_of(2) as hearts:
        wait_until(lambda: has_seen(hearts[0], 1))
        broken, heart = RuntimeError("Connection reset by peer\nand a second line"), hearts[0]
        with pytest.raises(LostPeer, match="all ranks show signs") as raised, heart.exchange():
            raise broken
        assert raised.value.ranks == [] and "check_cluster.py" in str(raised.value)
        assert "second line" not in str(raised.value)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")]
)
def test_too_little_memory_in_an_exchange_is_no_lost_peer(error):
    with ranks_of(2) as hearts, pytest.raises(type(error)), hearts[0].exchange():
        raise error


def test_who_ends_because_of_another_names_the_other():
    with ranks_of(3) as hearts:
        wait_until(lambda: all(has_seen(heart, 2) for heart in hearts[:2]))
        hearts[2].stop()
        hearts[1].timeout_s = 0.5
        loss_of(hearts[1])
        hearts[1].leave(FAILED)
        loss = loss_of(hearts[0])
        assert loss.ranks == [2] and "lost a peer: rank 2 (" in str(loss), str(loss)


def test_a_failure_is_known_at_once_and_a_farewell_is_no_failure():
    with ranks_of(3) as hearts:
        hearts[2].leave(LEFT)
        hearts[2].stop()
        wait_until(lambda: hearts[0].has_left(2))
        hearts[0].timeout_s = 0.5
        hearts[1].leave(FAILED)
        loss = loss_of(hearts[0])
        assert loss.ranks == [1] and "has failed" in str(loss)


def test_what_connects_is_abandoned_when_a_peer_is_lost():
    with ranks_of(2) as hearts:
        wait_until(lambda: has_seen(hearts[0], 1))
        hearts[1].stop()
        hearts[0].timeout_s = 0.5
        with pytest.raises(LostPeer, match="rank 1"):
            hearts[0].open(threading.Event().wait)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"end": 3, "lost": "all"}', '{"lost": [1.5]}'])
def test_heartbeats_of_strangers_are_no_traceback(text):
    heart = Liveness(Store(dist.HashStore(), 0, 60), 0, 2, timeout_s=10.0)
    heart.store._client.set(heart._keys[1], text)
    heart._look(0.0)
    heart._judge()
    assert heart.loss is None and heart._peers[1].lost == []
    heart.close()
