"""Fixes of addresses, names, routes and links are followed to the letter on hosts of their own."""

from __future__ import annotations

import contextlib
import re
import shutil

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import reach
from p2p_llm_forge.peers.addresses import judge_name
from p2p_llm_forge.peers.findings import FAILURE, FINE
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.rendezvous import choose_endpoint, rendezvous
from p2p_llm_forge.peers.routes import Main, choose_interface, judge_route
from tests.memory_channel import run_ranks
from tests.multihost.hosts import hosts, why_not
from tests.multihost.places import on
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]


@pytest.fixture(scope="module")
def machines():
    with hosts(2) as made:
        yield made


def alone(host, address, is_here=False, **launch):
    """What a machine alone finds to fix about the main address, by topic."""
    main = Main(address, 29500, 2, is_here, will_be_waited_for=True)
    found = on(host, lambda: judge_route(main, Launch(**launch), allow_public_address=False))
    return {finding.topic: finding for finding in found if finding.level != FINE}


def meet(machines, port, interfaces=(None, None), timeout_s=60.0, main=None):
    """What two ranks get of a rendezvous, one on each machine: a store, or the first problem."""
    address = main or machines[0].address
    config = TrainConfig(rendezvous_timeout=timeout_s)

    def act(rank):
        launch = Launch(
            **{"rank": rank, "world_size": 2, "master_addr": address, "master_port": port},
            gloo_interface=interfaces[rank],
        )
        try:
            return rendezvous(choose_endpoint(config, launch, choose_interface(launch)))
        except ForgeError as error:
            return error.problems[0]

    return run_ranks([0, 1], lambda rank: on(machines[rank], lambda: act(rank)))


def have_met(stores):
    return [hasattr(store, "set_once") for store in stores] == [True, True]


def own_address(host, shown_by):
    """The address that a command of a fix shows of the network between the hosts."""
    shown = host.run(*shown_by.split())
    (address,) = re.findall(r"eth0\S* +UP +(\d+\.\d+\.\d+\.\d+)/", shown)
    return address


def test_the_fixes_of_a_main_address_of_another_machine_lead_to_the_right_one(machines):
    first, second = machines
    found = alone(second, second.address)["address"]
    assert found.fix.startswith("write the address of machine 0, or correct machine_rank")
    assert alone(second, first.address) == alone(second, second.address, is_here=True) == {}
    found = alone(first, second.address, is_here=True)["address"]
    assert found.fix.startswith("write the one that the others reach (main_process_ip,")
    assert alone(first, first.address, is_here=True) == {}


def test_the_fixes_of_a_main_address_that_does_not_lead_to_rank_0_let_all_meet(machines):
    first, second = machines
    port = free_port()
    problem, _ = meet(machines, port, timeout_s=1.0, main=second.address)
    assert "does not lead to it" in problem.found
    (command,) = re.findall(r"write the address of this machine .*; `(.*?)` shows", problem.fix)
    assert have_met(meet(machines, port, main=own_address(first, command)))
    assert "or start rank 0 on the machine of that address (machine_rank, --rank)" in problem.fix
    assert have_met(meet([second, first], free_port(), main=second.address))


def test_the_fix_of_a_main_machine_that_nobody_serves_is_to_start_it(machines):
    port = free_port()
    launch = Launch(rank=1, world_size=2, master_addr=machines[0].address, master_port=port)

    def come():
        config = TrainConfig(rendezvous_timeout=1.0)
        with pytest.raises(ForgeError) as refused:
            rendezvous(choose_endpoint(config, launch, choose_interface(launch)))
        return refused.value.problems[0]

    problem = on(machines[1], come)
    assert problem.fix.startswith("start rank 0 on that machine, with the same address and port;")
    assert have_met(meet(machines, port))


def test_the_fixes_of_an_interface_of_another_network_take_the_common_one(machines):
    main = machines[0].address
    found = alone(machines[1], main, gloo_interface="lo")["interface"]
    assert found.fix.startswith("unset it")
    assert alone(machines[1], main) == {}
    problem, _ = meet(machines, free_port(), interfaces=(None, "lo"))
    assert problem.fix == (
        "unset GLOO_SOCKET_IFNAME there, or set it to the interface of the common network"
    )
    for interface in (None, "eth0"):
        assert have_met(meet(machines, free_port(), interfaces=(None, interface)))


def test_the_fixes_of_a_name_give_it_an_address(machines, tmp_path):
    name, file = "forge-main", tmp_path / "hosts"
    main = machines[0].address

    def judged(text, host=name):
        file.write_text(f"127.0.0.1 localhost\n{text}\n")
        try:
            return on(machines[0], lambda: judge_name(host, machines=2)[0], file)
        except ForgeError as error:
            return error.problems[0]

    problem = judged("")
    assert problem.fix == "write its IP address, or add the name to /etc/hosts"
    assert judged("", host=main).level == judged(f"{main} {name}").level == FINE
    before = f"127.0.1.1 {name} another"
    found = judged(before)
    assert found.level == FAILURE
    step = r"write the machine's IP address instead of its name, or in /etc/hosts in place of (\S+)"
    (wrong,) = re.findall(rf"^{step} before {name}$", found.fix)
    assert judged(before, host=main).level == FINE
    assert judged(before.replace(wrong, main)).level == FINE


def test_the_fix_of_a_missing_route_is_one(machines):
    main = machines[0].address
    machines[1].run("ip", "route", "add", "blackhole", f"{main}/32")
    try:
        found = alone(machines[1], main)["address"]
        assert found.fix.startswith("check the address (main_process_ip, --master-addr) and this")
    finally:
        machines[1].run("ip", "route", "del", "blackhole", f"{main}/32")
    assert alone(machines[1], main) == {}


@pytest.mark.skipif(not shutil.which("ping"), reason="needs `ping` (package iputils-ping)")
@pytest.mark.skipif(not shutil.which("nft"), reason="needs `nft` (package nftables)")
def test_the_fix_of_a_link_that_loses_packets_shows_when_it_is_mended(machines, monkeypatch):
    monkeypatch.setattr(reach, "STALL_S", 0.5)
    first, second = machines

    def judged():
        with contextlib.ExitStack() as stack:
            door = reach.opened_door(first.address)
            port = on(first, lambda: stack.enter_context(door))
            state = on(second, lambda: reach.try_door(first.address, port))
        hellos = [reach.readable({"address": host.address, "host": host.name}) for host in machines]
        return reach.judge_tries(hellos, [{"tries": {}}, {"tries": {"0": list(state)}}])

    with first.firewall("meta length > 500 drop"):
        (found,) = judged()
        (command,) = re.findall(r"until `(ping .*?)` on the first shows no loss", found.fix)
        assert "100% packet loss" in second.run("sh", "-c", f"{command} || true")
    assert ", 0% packet loss" in second.run(*command.split())
    monkeypatch.undo()
    assert judged() == []
