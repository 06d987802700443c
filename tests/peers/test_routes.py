"""The interface that leads to the main process is found, and what the user has chosen is kept."""

from __future__ import annotations

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import routes
from p2p_llm_forge.peers.launch import Launch

TWO_MACHINES = {"rank": 1, "world_size": 2, "master_addr": "10.0.0.1", "master_port": 29500}


def test_loopback_needs_no_interface_and_unknown_hosts_are_reported():
    assert routes.route_to("127.0.0.1") is None
    with pytest.raises(ForgeError, match="no route to the main process at no.such.host.invalid"):
        routes.route_to("no.such.host.invalid")


def test_the_users_choice_of_interface_is_kept(monkeypatch):
    monkeypatch.setattr(routes, "route_to", lambda host: routes.Route("10.0.0.2", "eth7"))
    launch = Launch(**TWO_MACHINES, nccl_interface="ib0")
    chosen = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth7"}
    assert routes.choose_interface(launch) == chosen
    assert routes.choose_interface(Launch(**TWO_MACHINES, local_world_size=2)) == {}


def test_an_interface_that_is_not_there_is_reported_with_those_that_are():
    assert routes.address_of("lo") == "127.0.0.1"
    with pytest.raises(ForgeError, match="no such interface with an address") as refusal:
        routes.address_of("eth99x")
    assert refusal.value.problems[0].fix.startswith("unset GLOO_SOCKET_IFNAME")


def judged(host="10.0.0.1", machines=2, is_here=False, launch=None):
    main = routes.Main(host, 29500, machines, is_here, will_be_waited_for=True)
    found = routes.judge_route(main, launch or Launch(**TWO_MACHINES), allow_public_address=False)
    return {finding.topic: finding for finding in found if finding.level != "fine"}


def test_a_name_that_leads_nowhere_is_a_failure():
    assert judged("no.such.host.invalid")["address"].level == "failure"


def test_an_interface_of_another_network_is_a_warning(monkeypatch):
    monkeypatch.setattr(routes, "route_to", lambda host: routes.Route("10.0.0.2", "eth7"))
    found = judged(launch=Launch(**TWO_MACHINES, gloo_interface="lo"))
    assert found["interface"].level == "warning"
    assert "main machine is reached by eth7" in found["interface"].found
    found = judged(launch=Launch(**TWO_MACHINES, gloo_interface="eth99x"))
    assert found["interface"].level == "failure"
    assert judged(launch=Launch(**TWO_MACHINES, gloo_interface="eth7")) == {}


def test_machine_0_has_the_main_address_and_no_other_has(monkeypatch):
    monkeypatch.setattr(routes, "route_to", lambda host: routes.Route("10.0.0.2", "eth7"))
    own = {"lo": ["127.0.0.1"], "eth7": ["10.0.0.2"]}
    monkeypatch.setattr(routes, "addresses_by_interface", lambda: own)
    assert judged("10.0.0.1") == {}
    found = judged("10.0.0.2")["address"]
    assert found.level == "warning" and "this is not machine 0" in found.found
    found = judged("10.0.0.1", is_here=True)["address"]
    assert "is not one of its addresses (10.0.0.2)" in found.found
