"""What two ranks say to each other about files nobody else says, hears, repeats or changes."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2p_llm_forge.peers import file_stream
from p2p_llm_forge.peers.file_stream import FRAME_BYTES, Known, greet, welcome
from p2p_llm_forge.peers.secret import Session
from p2p_llm_forge.peers.signed_stream import Gone, Stranger

CONTENT = b"the weights of the model" * 1000


def known(secret: str = "a secret", token: str = "a token") -> Known:
    return Known(Session(secret.encode(), [{"nonce": 1}]) if secret else None, token)


class Wire:
    """A connection with somebody in the middle, who passes on what he likes."""

    def __init__(self) -> None:
        self.client, self._near = socket.socketpair()
        self._far, self.server = socket.socketpair()
        for one in (self.client, self.server, self._near, self._far):
            one.settimeout(10)

    def take(self, size: int, of_server: bool = False) -> bytes:
        """What the client (or the server) has sent."""
        return (self._far if of_server else self._near).recv(size, socket.MSG_WAITALL)

    def give(self, content: bytes, to_client: bool = False) -> None:
        (self._near if to_client else self._far).sendall(content)

    def greeted(self, by_both: Known):
        """Both ends, once they have greeted each other through him."""
        with ThreadPoolExecutor(2) as threads:
            one = threads.submit(greet, self.client, 1, 0, by_both)
            other = threads.submit(welcome, self.server, 0, range(3), by_both)
            self.give(self.take(file_stream.HELLO.size))
            for of_server in (True, False, True):  # its nonce, the proofs
                self.give(self.take(32, of_server), of_server)
            return one.result(), other.result()


def frame_of(wire: Wire, stream, content: bytes, of_server: bool = False) -> bytes:
    """A frame as it is on the wire."""
    stream.send(content)
    head = wire.take(4, of_server)
    return head + wire.take(int.from_bytes(head, "big"), of_server)


def received(stream) -> bytes:
    buffer = memoryview(bytearray(FRAME_BYTES))
    return bytes(buffer[: stream.receive_into(buffer)])


SECRETS = pytest.mark.parametrize("secret", ["a secret", ""])


@SECRETS
def test_what_is_sent_arrives_in_both_directions(secret):
    wire = Wire()
    client, server = wire.greeted(known(secret))
    for content in (CONTENT, b"", b"x", os.urandom(50_000)):
        client.send(content)
        size = len(content) + 4 + (16 if secret else 0)
        on_the_wire = wire.take(size)
        assert (content in on_the_wire) == (not secret) or len(content) < 2
        wire.give(on_the_wire)
        assert received(server) == content
    frame = frame_of(wire, server, CONTENT, of_server=True)
    wire.give(frame, to_client=True)
    assert received(client) == CONTENT


@pytest.mark.parametrize(
    "of_server",
    [known("another one"), known(""), Known(Session(b"a secret", [{"nonce": 2}]), "a token")],
)
def test_who_has_another_secret_or_meeting_is_not_let_in(of_server):
    for one, other in ((known(), of_server), (of_server, known())):
        client, server = closed_after(one, other)
        assert isinstance(client, Gone | Stranger) and isinstance(server, Stranger)


def closed_after(by_client: Known, by_server: Known):
    """Both ends of a greeting in which the server closes when it raises."""
    client, server = socket.socketpair()

    def serve():
        try:
            return welcome(server, 0, range(3), by_server)
        except (Gone, Stranger) as error:
            server.close()
            return error

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(greet, client, 1, 0, by_client)
        other = threads.submit(serve)
        return one.exception() or one.result(), other.result()


def test_without_a_secret_the_token_is_needed():
    client, server = closed_after(known("", "a token"), known("", "another"))
    assert isinstance(client, Gone | Stranger) and isinstance(server, Stranger)


def test_a_server_must_prove_itself_too():
    """Somebody who answers, but knows nothing, is found out before anything is asked."""
    client, stranger = socket.socketpair()
    with ThreadPoolExecutor(1) as threads:
        greeting = threads.submit(greet, client, 1, 0, known())
        stranger.recv(file_stream.HELLO.size, socket.MSG_WAITALL)
        stranger.sendall(bytes(32))
        proof = stranger.recv(32, socket.MSG_WAITALL)
        stranger.sendall(proof)  # the client's own, reflected
        assert isinstance(greeting.exception(), Stranger)


@pytest.mark.parametrize("attack", ["repeat", "drop", "flip", "reflect", "exchange", "shorten"])
def test_a_frame_opens_once_in_its_place_and_direction(attack):
    wire, other = Wire(), Wire()
    client, server = wire.greeted(known())
    client_of_other, _ = other.greeted(known())
    first, second = frame_of(wire, client, CONTENT), frame_of(wire, client, b"more")
    if attack == "drop":
        wire.give(second)
    elif attack == "flip":
        wire.give(first[:99] + bytes([first[99] ^ 1]) + first[100:])
    elif attack == "exchange":
        wire.give(frame_of(other, client_of_other, CONTENT))
    elif attack == "shorten":
        wire.give((int.from_bytes(first[:4], "big") - 1).to_bytes(4, "big") + first[4:-1])
    elif attack == "repeat":
        wire.give(first + first)
        assert received(server) == CONTENT
    elif attack == "reflect":
        wire.give(first, to_client=True)
        server = client
    with pytest.raises(Stranger, match="does not open with the cluster's secret"):
        received(server)


@pytest.mark.parametrize("size", [0, 15, FRAME_BYTES + 17, 2**32 - 1])
def test_a_frame_of_no_possible_size_is_refused_before_it_is_read(size):
    wire = Wire()
    _, server = wire.greeted(known())
    wire.give(size.to_bytes(4, "big"))
    with pytest.raises(Stranger, match="is no frame of a file"):
        received(server)


@pytest.mark.parametrize("rank", [0, 3, 2**32 - 1])
def test_only_ranks_of_the_run_are_welcome(rank):
    client, server = socket.socketpair()
    client.sendall(file_stream.HELLO.pack(file_stream.MAGIC, rank, bytes(32)))
    ranks = range(3) if rank else range(1, 3)
    with pytest.raises(Stranger, match="no greeting of a rank"):
        welcome(server, 0, ranks, known())


@pytest.mark.parametrize("message", [b"", b"[1]", b"{", b"\xff", b'{"a": NaN}'])
def test_what_is_no_message_is_refused(message):
    wire = Wire()
    client, server = wire.greeted(known(""))
    wire.give(frame_of(wire, client, message))
    with pytest.raises(Stranger, match="is no message about files"):
        server.receive_json()
