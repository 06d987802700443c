"""Connections that libraries hold are found, ended, and given up when their host is gone."""

from __future__ import annotations

import socket
import threading

import pytest

from p2p_llm_forge.peers.sockets import connected, give_up_early, hang_up


@pytest.fixture
def ends():
    """Both ends of a connection, and the port that it goes to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port)) as one:
            other, _ = server.accept()
            with other:
                yield one, other, port


def test_who_waits_for_a_connection_learns_that_it_was_hung_up():
    before = connected()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as one, server.accept()[0]:
            came = []
            thread = threading.Thread(target=lambda: came.append(one.recv(1)))
            thread.start()
            hang_up(connected() - before)
            thread.join(60)
            assert came == [b""]
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            pass  # who listens was not hung up


def test_connections_of_others_stay(ends):
    one, other, _ = ends
    hang_up(connected() - connected())
    one.sendall(b"!")
    assert other.recv(1) == b"!"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")
def test_only_connections_to_the_host_and_port_are_given_up_early(ends):
    one, other, port = ends

    def timeout_of(end):
        return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    assert give_up_early("localhost", port, 7.0) == 1
    assert timeout_of(one) == 7000
    assert timeout_of(other) == 0
    assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    probes = [
        one.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    ]
    assert probes[0] + probes[1] * probes[2] <= 8
    assert give_up_early("localhost", 1, 7.0) == 0
    assert give_up_early("no.such.host.invalid", port, 7.0) == 0
