"""Peers prove to each other that they know a secret, without sending it.

Each rank puts a fresh nonce into the launch's store, then HMAC-SHA256 (RFC 2104) with the secret
as the key over its rank, the number of ranks and all nonces. A proof is thus good for one rank in
one rendezvous. What this does not do: the traffic after it is neither signed nor encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from p2p_llm_forge.errors import ForgeError

NONCE_BYTES = 32
SHORTEST_SECRET = 16  # bytes; whoever listens can try out guesses
CONTEXT = "p2p-llm-forge rendezvous 1"


def read_secret(path: str | None) -> bytes | None:
    """The secret in a file, without its line end; None without a file. Raises ForgeError."""
    if path is None:
        return None
    name, file = f"--cluster-secret-file {path}", Path(path)
    make = f"`(umask 077; openssl rand -hex 32 > {path})` and copy it to all machines"
    try:
        secret, mode = file.read_bytes().strip(), file.stat().st_mode & 0o777
    except OSError as error:
        found = f"{name} cannot be read ({error.strerror})"
        raise ForgeError(found, f"make it once with {make}") from error
    if len(secret) < SHORTEST_SECRET:
        found = f"{name} holds {len(secret)} bytes, {SHORTEST_SECRET} is the least"
        raise ForgeError(found, f"make a new one with {make}")
    if os.name == "posix" and mode & 0o077:
        found = f"{name} can be read by other users (mode {mode:o})"
        raise ForgeError(found, f"make it private: chmod 600 {path}")
    return secret


def new_nonce() -> str:
    """A nonce for one rendezvous, as text."""
    return secrets.token_hex(NONCE_BYTES)


def proof(secret: bytes, rank: int, nonces: list[str]) -> str:
    """What only a knower of the secret can answer as `rank` among ranks with these nonces."""
    message = json.dumps([CONTEXT, rank, nonces])  # unlike joined strings, never ambiguous
    return hmac.new(secret, message.encode(), hashlib.sha256).hexdigest()


def is_proven(secret: bytes, rank: int, nonces: list[str], answer: str) -> bool:
    """Whether `answer` is the proof of `rank`; takes the same time whatever it is."""
    return hmac.compare_digest(proof(secret, rank, nonces).encode(), answer.encode())
