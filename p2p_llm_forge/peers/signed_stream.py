"""Messages between two programs over TCP, as JSON, each signed under the cluster's secret.

Both sides send a fresh nonce; HMAC-SHA256 (RFC 2104) of both under the secret is the connection's
key. Each message carries an HMAC under that key over its direction, number and content, so a
stranger can neither make one up, nor repeat one, nor send one back. What is not signed is not even
parsed, and nothing is unpickled. Without a secret the signatures prove nothing. Not encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from typing import Any

CONTEXT = b"p2p-llm-forge launch 1"
MAC_BYTES = hashlib.sha256().digest_size
NONCE_BYTES = 32
LONGEST = 64 * 1024  # bytes of one message; ours have a few hundred
FROM_CLIENT, FROM_SERVER = b"c", b"s"

Message = dict[str, Any]


class Gone(Exception):
    """The other side has ended or is not heard any more; the text says how."""

    def __init__(self, text: str, *, is_silent: bool = False) -> None:
        super().__init__(text)
        self.is_silent = is_silent  # its machine or the network is gone, not only the program


class Stranger(Exception):
    """The other side does not know the secret, or is no program of ours."""


class SignedStream:
    """One side of a connection. Open it with `greet`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_server: bool,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._own = FROM_SERVER if is_server else FROM_CLIENT
        self._others = FROM_CLIENT if is_server else FROM_SERVER
        self._key = b""
        self._sent = self._received = 0
        self.address = str((writer.get_extra_info("peername") or ["an unknown address"])[0])

    async def greet(self, secret: bytes | None, timeout_s: float) -> None:
        """Exchange nonces and prove to each other that both know the secret.

        Raises Stranger if the other side does not, Gone if it is not heard within the time.
        """
        own = {"nonce": secrets.token_hex(NONCE_BYTES), "has_secret": secret is not None}
        self._write(json.dumps(own).encode())
        hello = _parsed(await self._read(timeout_s))
        if hello.get("has_secret") is not own["has_secret"]:
            with_it, without = "one side was started with", "the other without it"
            raise Stranger(f"{with_it} the cluster's secret, {without}")
        both = {self._own: own["nonce"], self._others: str(hello.get("nonce"))}
        nonces = json.dumps([both[FROM_CLIENT], both[FROM_SERVER]]).encode()
        self._key = hmac.digest(secret or b"", CONTEXT + nonces, "sha256")
        self.send({"type": "proof"})
        if (await self.receive(timeout_s)).get("type") != "proof":
            raise Stranger("it did not prove that it knows the cluster's secret")

    def send(self, message: Message) -> None:
        """Send a message, as soon as the network takes it; what is too late is noticed by others.

        Nothing is raised when the other side is gone: `receive` is where that is seen.
        """
        content = json.dumps(message).encode()
        self._sent += 1
        with contextlib.suppress(OSError, RuntimeError):
            self._write(self._mac(self._own, self._sent, content) + content)

    async def receive(self, timeout_s: float) -> Message:
        """The next message. Raises Gone after `timeout_s` of silence, Stranger if not signed."""
        frame = await self._read(timeout_s)
        self._received += 1
        mac, content = frame[:MAC_BYTES], frame[MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(self._others, self._received, content)):
            raise Stranger("what it sent is not signed with the cluster's secret")
        return _parsed(content)

    def close(self) -> None:
        """End the connection; what was sent before still arrives."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()

    def _mac(self, direction: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, direction + number.to_bytes(8, "big") + content, "sha256")

    def _write(self, frame: bytes) -> None:
        self._writer.write(len(frame).to_bytes(4, "big") + frame)

    async def _read(self, timeout_s: float) -> bytes:
        reading = asyncio.ensure_future(self._read_frame())
        try:
            # Twice: if this program itself stood still (a suspended machine), what has arrived
            # meanwhile is read after the first time is over.
            for part in (0.9, 0.1):
                await asyncio.wait({reading}, timeout=part * timeout_s)
            if not reading.done():
                raise Gone(f"no sign of life for {timeout_s:.0f} s", is_silent=True)
            return reading.result()
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Gone("it ended or closed the connection") from error
        finally:
            reading.cancel()

    async def _read_frame(self) -> bytes:
        length = int.from_bytes(await self._reader.readexactly(4), "big")
        if length > LONGEST:
            raise Stranger("what it sent is no message of a launcher")
        return await self._reader.readexactly(length)


def _parsed(content: bytes) -> Message:
    """A message that was signed, or a greeting, of which every stranger can write any."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Stranger("what it sent is no message of a launcher") from error
    if not isinstance(value, dict):
        raise Stranger("what it sent is no message of a launcher")
    return value
