"""Files that others offer arrive whole, or not at all; what has come is not sent again."""

from __future__ import annotations

import socket
import threading

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import file_exchange
from p2p_llm_forge.peers.file_exchange import GivenUp, Watch
from p2p_llm_forge.peers.file_stream import FileStream
from p2p_llm_forge.peers.signed_stream import Gone
from tests.memory_channel import clusters, run_ranks
from tests.peers.offered_files import MANY_PIECES, damage, everything_in, made, same
from tests.waiting import wait_until

SECRET = pytest.mark.parametrize("secret", [None, b"of this cluster, and of no other"])


@SECRET
def test_what_one_offers_others_fetch(tmp_path, secret):
    sizes = {"a.bin": MANY_PIECES, "b/c.arrow": 5, "b/empty": 0}
    files = made(tmp_path / "from", sizes)
    made(tmp_path / "from", {"not offered": 3})
    with clusters(3, secret=secret) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        exchanges[1].offer("key", tmp_path / "from", files)
        into = {rank: tmp_path / f"into {rank}" for rank in (0, 2)}
        run_ranks([0, 2], lambda rank: exchanges[rank].fetch(files, {1: "key"}, into[rank]))
        for folder in into.values():
            assert same(tmp_path / "from", folder, files)
            assert everything_in(folder) == files.keys()


def test_what_is_there_stays_and_is_not_sent_again(tmp_path):
    files = made(tmp_path / "from", {"a": MANY_PIECES, "b": 10, "c": 20})
    into = tmp_path / "into"
    into.mkdir()
    (into / "a").write_bytes((tmp_path / "from/a").read_bytes())
    (into / "b").write_bytes(b"something")  # is another content
    (into / "d").write_bytes(b"not of the set")
    before = (into / "a").stat()
    with clusters(2) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        exchanges[0].offer("key", tmp_path / "from", files)
        fetched = exchanges[1].fetch(files, {0: "key"}, into)
    assert fetched.bytes_received == 30
    assert same(tmp_path / "from", into, files)
    assert (into / "a").stat().st_mtime_ns == before.st_mtime_ns
    assert everything_in(into) == {*files, "d"}


def test_a_fetch_that_was_ended_goes_on_where_it_was_by_another_source(tmp_path):
    files, into = made(tmp_path / "from", {"a": MANY_PIECES}), tmp_path / "into"

    class Ending(Watch):
        def advance(self, count):
            super().advance(count)
            if self.bytes_done > MANY_PIECES / 2:  # 15 MB: two pieces are under way, one is here
                self.give_up()

    with clusters(3) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        for rank in (0, 1):
            exchanges[rank].offer(f"of {rank}", tmp_path / "from", files)
        with pytest.raises(GivenUp):
            exchanges[2].fetch(files, {0: "of 0"}, into, Ending())
        assert everything_in(into) == {"a.part", "a.part.pieces"}
        fetched = exchanges[2].fetch(files, {1: "of 1"}, into)
    assert 0 < fetched.bytes_received <= MANY_PIECES - 4 * 2**20
    assert same(tmp_path / "from", into, files)
    assert everything_in(into) == files.keys()


def test_a_damaged_file_is_found_and_comes_from_another_source(tmp_path):
    files = made(tmp_path / "from", {"a": MANY_PIECES, "b": 7})
    for name in files:
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / name).write_bytes((tmp_path / "from" / name).read_bytes())
    damage(tmp_path / "damaged/a")
    with clusters(3) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        exchanges[0].offer("bad", tmp_path / "damaged", files)
        exchanges[1].offer("good", tmp_path / "from", files)
        with pytest.raises(ForgeError) as raised:
            exchanges[2].fetch(files, {0: "bad"}, tmp_path / "into one")
        exchanges[2].fetch(files, {0: "bad", 1: "good"}, tmp_path / "into")
    (problem,) = raised.value.problems
    assert problem.found.startswith("a cannot be fetched from rank 0 (")
    assert problem.found.endswith("): its file is damaged")
    assert not (tmp_path / "into one/a").exists()
    assert same(tmp_path / "from", tmp_path / "into", files)


def test_what_is_fetched_behind_training_waits_for_it_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(file_exchange, "LONGEST_GAP_S", 0.05)
    files, asked = made(tmp_path / "from", {"a": 300_000}), {0: 0, 1: 0}

    def always(rank):
        asked[rank] += 1
        return True

    with clusters(2) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        for rank, exchange in enumerate(exchanges):
            exchange.stand_back(lambda rank=rank: always(rank))
        exchanges[0].offer("key", tmp_path / "from", files)
        exchanges[1].fetch(files, {0: "key"}, tmp_path / "at once")
        assert asked == {0: 0, 1: 0}
        exchanges[1].fetch(files, {0: "key"}, tmp_path / "behind", None, True)
    assert asked[0] >= 5 and asked[1] >= 5, "each frame waits, on both sides"
    assert same(tmp_path / "from", tmp_path / "behind", files)


def test_a_fetch_ends_when_the_cluster_does(tmp_path, monkeypatch):
    monkeypatch.setattr(file_exchange, "LONGEST_GAP_S", 60)
    files, waits = made(tmp_path / "from", {"a": 300_000}), threading.Event()
    ended = []

    with clusters(2) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        exchanges[0].stand_back(lambda: not waits.set())
        exchanges[0].offer("key", tmp_path / "from", files)

        def fetch():
            with pytest.raises(GivenUp):
                exchanges[1].fetch(files, {0: "key"}, tmp_path / "into", None, True)
            ended.append(True)

        thread = threading.Thread(target=fetch)
        thread.start()
        assert waits.wait(30)
        ranks[1].close()
        thread.join(30)
        assert ended
        with pytest.raises(GivenUp):
            exchanges[1].fetch(files, {0: "key"}, tmp_path / "into")


def test_who_is_replaced_while_it_proves_itself_is_hung_up(monkeypatch):
    """It has just proven itself when another one comes, and takes its place."""
    here, there = socket.socketpair()

    def late(connection, *_):
        return FileStream(connection, None, None)

    monkeypatch.setattr(file_exchange, "welcome", late)
    with clusters(2) as ranks:
        exchange = run_ranks(ranks, lambda rank: rank.open_files())[0]
        monkeypatch.setattr(exchange, "_tune", lambda connection: None)
        there.close()
        exchange._serve(here)
        assert not exchange._serving
    assert here.fileno() == -1


def test_however_many_come_no_more_threads_wait_for_a_proof(monkeypatch):
    """Also where a thread takes long to notice that its connection was closed."""
    lock, waiting, most = threading.Lock(), [], []
    may_end = threading.Event()

    def slow_to_end(connection, *_):
        with lock:
            waiting.append(connection)
            most.append(len(waiting))
        connection.recv(1)
        may_end.wait(0.02)
        with lock:
            waiting.remove(connection)
        raise Gone("it was closed")

    monkeypatch.setattr(file_exchange, "welcome", slow_to_end)
    monkeypatch.setattr(file_exchange, "MOST_GREETINGS", 4)
    with clusters(2) as ranks:
        exchange = run_ranks(ranks, lambda rank: rank.open_files())[0]
        place = exchange.places[0]
        held = [socket.create_connection((place.address, place.port)) for _ in range(40)]
        wait_until(lambda: len(most) == len(held))
        may_end.set()
        for connection in held:
            connection.close()
    assert max(most) == 4


def test_a_rank_alone_has_files_of_nobody(tmp_path):
    files = made(tmp_path / "from", {"a": 3})
    with clusters(1) as (rank,):
        exchange = rank.open_files()
        assert exchange is rank.open_files()
        exchange.offer("key", tmp_path / "from", files)
        with pytest.raises(ForgeError, match="a cannot be fetched: no machine offers it"):
            exchange.fetch(files, {0: "key"}, tmp_path / "into")
        exchange.fetch(files, {}, tmp_path / "from")  # it is there
