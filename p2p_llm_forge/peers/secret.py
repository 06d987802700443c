"""The cluster's secret: who knows it takes part, and nobody else adds or changes a value.

At a rendezvous every rank says hello with a fresh nonce. The session key is HKDF-SHA256 (RFC 5869)
of the secret with the digest of all hellos as salt: it is another one at every rendezvous, and a
hello that was changed on the way makes another key on some ranks, whose proofs then fail. Keys for
one purpose each are expanded from it. The secret itself is never sent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.rank_failure import RankFailure

NONCE_BYTES = 32
KEY_BYTES = 32
SHORTEST_SECRET = 16  # bytes; whoever listens can try out guesses
CONTEXT = b"p2p-llm-forge session 1"
MAC_DIGITS = 64  # of HMAC-SHA256, before the value
KEEP_OUT = (
    "let only the peers reach the main port (docs/security.md), then continue with --resume auto"
)


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


class Session:
    """One rendezvous, for those who know the secret: its keys, proofs and signatures."""

    def __init__(self, secret: bytes, hellos: Sequence[dict[str, Any]]) -> None:
        """hellos: what each rank said, by rank, as JSON; this rank's own as it was said."""
        salt = hashlib.sha256(canonical(list(hellos))).digest()
        self._key = HKDF(SHA256(), KEY_BYTES, salt, CONTEXT).derive(secret)
        self._of_proofs, self._of_store = self.key("proof"), self.key("store")

    def key(self, *purpose: str | int) -> bytes:
        """A key for one purpose, of KEY_BYTES; nothing about it follows from those of others."""
        return HKDFExpand(SHA256(), KEY_BYTES, canonical(list(purpose))).derive(self._key)

    def proof(self, rank: int) -> str:
        """What only a knower of the secret can answer as `rank` at this rendezvous."""
        return _mac(self._of_proofs, rank)

    def is_proven(self, rank: int, answer: str) -> bool:
        """Whether `answer` is the proof of `rank`; takes the same time whatever it is."""
        return hmac.compare_digest(self.proof(rank).encode(), answer.encode(errors="replace"))

    def sign(self, key: str, rank: int, value: str) -> str:
        """`value`, which `rank` puts into the store under `key`, with its signature before it."""
        return _mac(self._of_store, key, rank, value) + value

    def opened(self, key: str, rank: int, signed: bytes) -> str | None:
        """The value that `rank` has put into the store under `key`; None if it has not."""
        try:
            value = signed[MAC_DIGITS:].decode()
        except UnicodeDecodeError:
            return None
        mac = _mac(self._of_store, key, rank, value).encode()
        return value if hmac.compare_digest(mac, signed[:MAC_DIGITS]) else None

    def verified(self, key: str, rank: int, signed: bytes) -> str:
        """The value that `rank` has put into the store under `key`. Raises RankFailure."""
        value = self.opened(key, rank, signed)
        if value is None:
            found = f"the value of rank {rank} under {key} is not signed with the cluster's secret"
            raise RankFailure(f"{found}: somebody else writes to the store", KEEP_OUT)
        return value


def canonical(value: Any) -> bytes:
    """JSON as the one text that ranks make of the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _mac(key: bytes, *what: str | int) -> str:
    # As JSON, unlike joined strings, never ambiguous.
    return hmac.new(key, canonical(list(what)), hashlib.sha256).hexdigest()
