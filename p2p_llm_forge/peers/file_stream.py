"""Connections by which files travel between two ranks: proven on both sides, then encrypted.

Whoever connects sends its rank and a nonce, whoever listens another nonce. Of both nonces and both
ranks each side derives, under the secret's session (secret.py), the proofs that they exchange and a
key for each direction; then every frame is AES-256-GCM with its number as nonce. So a frame that is
repeated, left out, changed, sent back or taken from another connection does not open, and nothing
is parsed before it has. Without a secret the proofs are made of a random token of the run, which
those know who read its store, and frames travel in plain.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers.secret import NONCE_BYTES, Session, canonical
from p2p_llm_forge.peers.signed_stream import Gone, Stranger

FRAME_BYTES = 256 << 10  # the most that one carries
TAG_BYTES = 16
PROOF_BYTES = hashlib.sha256().digest_size
GREETING_S = 10.0  # that a stranger may take
HELLO = struct.Struct(f">16sI{NONCE_BYTES}s")  # what this is, the rank that connects, its nonce
MAGIC = b"forge files, v1\0"
LENGTH = struct.Struct(">I")
CLIENT, SERVER = "client", "server"


@dataclass(frozen=True)
class Known:
    """What a connection is proven by. token: of the rank that listens."""

    session: Session | None
    token: str

    def key(self, *about: str | int) -> bytes:
        """A key of 32 bytes about one purpose of one connection."""
        if self.session is not None:
            return self.session.key("files", *about)
        return hmac.digest(self.token.encode(), canonical(["files", *about]), "sha256")


class FileStream:
    """One side of a connection that is proven. One thread at a time may use it.

    Its methods raise Gone when the other side has ended or is silent for too long, Stranger when
    what came is not what the other side has sent.
    """

    def __init__(self, connection: socket.socket, own: bytes | None, others: bytes | None) -> None:
        """own, others: the keys of what is sent and of what comes; None: in plain."""
        self._connection = connection
        self._own, self._others = (AESGCM(key) if key else None for key in (own, others))
        self._sent = self._received = self._queue = 0
        self._wire = memoryview(bytearray(LENGTH.size + FRAME_BYTES + TAG_BYTES))

    def send(self, content: Any) -> None:
        """Send a frame: anything with a buffer, of at most FRAME_BYTES."""
        size, wire = len(content), self._wire
        if self._own is None:
            wire[LENGTH.size : LENGTH.size + size] = content
        else:
            size += TAG_BYTES
            into = wire[LENGTH.size : LENGTH.size + size]
            self._own.encrypt_into(_nonce(self._sent), content, None, into)
        self._sent += 1
        LENGTH.pack_into(wire, 0, size)
        try:
            self._connection.sendall(wire[: LENGTH.size + size])
        except OSError as error:
            raise _gone(error) from error

    def receive_into(self, buffer: memoryview) -> int:
        """The size of the next frame, whose content is put into the buffer."""
        head = bytearray(LENGTH.size)
        receive_exactly(self._connection, memoryview(head))
        (size,) = LENGTH.unpack(head)
        plain_size = size - (TAG_BYTES if self._others else 0)
        if not 0 <= plain_size <= min(FRAME_BYTES, len(buffer)):
            raise Stranger("what it sent is no frame of a file")
        plain = buffer[:plain_size]
        if self._others is None:
            receive_exactly(self._connection, plain)
        else:
            sealed = self._wire[:size]
            receive_exactly(self._connection, sealed)
            try:
                self._others.decrypt_into(_nonce(self._received), sealed, None, plain)
            except InvalidTag:
                raise Stranger("what it sent does not open with the cluster's secret") from None
        self._received += 1
        return plain_size

    def send_json(self, message: dict[str, Any]) -> None:
        """Send a short message."""
        self.send(json.dumps(message).encode())

    def receive_json(self) -> dict[str, Any]:
        """The next frame as a message."""
        buffer = memoryview(bytearray(FRAME_BYTES))
        try:
            message = parse_json(bytes(buffer[: self.receive_into(buffer)]))
        except ValueError as error:
            raise Stranger("what it sent is no message about files") from error
        if not isinstance(message, dict):
            raise Stranger("what it sent is no message about files")
        return message

    def set_timeout(self, seconds: float) -> None:
        """How long the other side may neither send nor receive."""
        self._connection.settimeout(seconds)

    def limit_queue(self, count: int) -> None:
        """Let about so many bytes of what is sent from now on wait in the kernel."""
        if not self._queue / 2 < count < self._queue * 2:
            self._queue = count
            # Linux doubles it, for what it needs itself, and takes no more than net.core.wmem_max.
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, count)

    def close(self) -> None:
        """End the connection, and whatever waits for it in another thread."""
        hang_up(self._connection)


def greet(connection: socket.socket, own: int, theirs: int, known: Known) -> FileStream:
    """Prove to the rank that was connected to who this is, and have it prove itself.

    Raises Gone, Stranger.
    """
    deadline = time.monotonic() + GREETING_S
    nonce, answer = secrets.token_bytes(NONCE_BYTES), memoryview(bytearray(NONCE_BYTES))
    try:
        connection.settimeout(GREETING_S)
        connection.sendall(HELLO.pack(MAGIC, own, nonce))
        receive_exactly(connection, answer, deadline)
        about = (own, theirs, nonce.hex(), answer.hex())
        connection.sendall(known.key("proof", *about, CLIENT))
    except OSError as error:
        raise _gone(error) from error
    _check_proof(connection, known.key("proof", *about, SERVER), deadline)
    return _stream(connection, known, about, CLIENT)


def welcome(connection: socket.socket, own: int, ranks: range, known: Known) -> FileStream:
    """The same on the side that was connected to. Raises Gone, Stranger."""
    deadline = time.monotonic() + GREETING_S
    hello = memoryview(bytearray(HELLO.size))
    receive_exactly(connection, hello, deadline)
    magic, theirs, nonce = HELLO.unpack(hello)
    if magic != MAGIC or theirs not in ranks:
        raise Stranger("what it sent is no greeting of a rank")
    answer = secrets.token_bytes(NONCE_BYTES)
    about = (theirs, own, nonce.hex(), answer.hex())
    try:
        connection.sendall(answer)
        _check_proof(connection, known.key("proof", *about, CLIENT), deadline)
        connection.sendall(known.key("proof", *about, SERVER))
    except OSError as error:
        raise _gone(error) from error
    return _stream(connection, known, about, SERVER)


def receive_exactly(
    connection: socket.socket, buffer: memoryview, deadline: float | None = None
) -> None:
    """Fill the buffer. deadline: for all of it; else each part may take the connection's timeout.

    Raises Gone.
    """
    filled = 0
    try:
        while filled < len(buffer):
            if deadline is not None:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
            received = connection.recv_into(buffer[filled:])
            if not received:
                raise Gone("it ended or closed the connection")
            filled += received
    except OSError as error:
        raise _gone(error) from error


def hang_up(connection: socket.socket) -> None:
    """Close a connection, which ends whatever waits for it in another thread."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was over
    finally:
        connection.close()


def _check_proof(connection: socket.socket, wanted: bytes, deadline: float) -> None:
    proof = memoryview(bytearray(PROOF_BYTES))
    receive_exactly(connection, proof, deadline)
    if not hmac.compare_digest(proof, wanted):
        raise Stranger("it did not prove that it belongs to this run")


def _stream(
    connection: socket.socket, known: Known, about: tuple[int, int, str, str], side: str
) -> FileStream:
    if known.session is None:
        return FileStream(connection, None, None)
    of_client, of_server = (known.key("frames", *about, one) for one in (CLIENT, SERVER))
    own_first = (of_client, of_server) if side == CLIENT else (of_server, of_client)
    return FileStream(connection, *own_first)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _gone(error: OSError) -> Gone:
    if isinstance(error, TimeoutError):
        return Gone("it has sent nothing for too long", is_silent=True)
    return Gone(f"the connection broke ({error.strerror or error})")
