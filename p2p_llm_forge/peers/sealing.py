"""Rows of tensors, encrypted and signed for the way between two ranks: AES-256-GCM.

Keys are those of the session (secret.py), one for each channel, kind of call, sender and EPOCH of
exchanges. A nonce is the receiver and the number of the exchange, so none is used twice with a key,
also not after a restart: then the session is another one. The receiver counts along, so a row that
is repeated, left out or exchanged for another one does not open either.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.peers.secret import KEEP_OUT, Session, canonical

TAG_BYTES = 16
EPOCH = 1024  # exchanges of a key: 2**30 blocks at rows of 16 MB, far below the 2**34 of RFC 8446
TO_ALL = 2**32 - 1  # as receiver of what everybody gets alike


class Sealing:
    """What encrypts the rows that leave one rank over one channel, and opens those that arrive."""

    def __init__(self, session: Session, rank: int, channel: int | str) -> None:
        """channel: its number or name, the same on all its ranks and of no other channel."""
        self.rank = rank
        self._session, self._channel = session, channel
        self._ciphers: dict[tuple[str, int], tuple[int, AESGCM]] = {}  # by kind and sender
        self._sealed: dict[tuple[str, int], int] = {}  # last number, by kind and receiver

    def seal(self, row: Tensor, wire: Tensor, exchange: Exchange, receiver: int = TO_ALL) -> None:
        """Write a row, as it goes to `receiver`, into `wire`: uint8, TAG_BYTES longer.

        Numbers of exchanges must grow from call to call, for each kind and receiver.
        """
        kind, number = exchange.kind, exchange.number
        if number <= self._sealed.get((kind, receiver), -1):
            raise AssertionError(f"{kind} {number} is sealed twice for {receiver}")
        self._sealed[kind, receiver] = number
        cipher = self._cipher(exchange, self.rank)
        about = exchange.about(self.rank, receiver, row)
        cipher.encrypt_into(_nonce(number, receiver), as_bytes(row), about, as_bytes(wire))

    def open(
        self, wire: Tensor, row: Tensor, exchange: Exchange, sender: int, receiver: int = TO_ALL
    ) -> None:
        """Write into `row` what `sender` has sealed. Raises RankFailure if that is not it."""
        cipher = self._cipher(exchange, sender)
        about = exchange.about(sender, receiver, row)
        nonce = _nonce(exchange.number, receiver)
        try:
            cipher.decrypt_into(nonce, as_bytes(wire), about, as_bytes(row))
        except InvalidTag:
            found = f"what came as {exchange.kind} {exchange.number} of rank {sender}"
            found = (
                f"{found} does not open with the cluster's secret: it was changed on the way, or"
            )
            found = f"{found} that rank is at another point of the run; nothing was trained on it"
            raise RankFailure(found, KEEP_OUT) from None

    def _cipher(self, exchange: Exchange, sender: int) -> AESGCM:
        epoch, place = exchange.number // EPOCH, (exchange.kind, sender)
        known, cipher = self._ciphers.get(place, (-1, None))
        if cipher is None or known != epoch:
            key = self._session.key("rows", self._channel, exchange.kind, sender, epoch)
            cipher = AESGCM(key)
            self._ciphers[place] = epoch, cipher
        return cipher


class Exchange:
    """One exchange of a channel: its kind and number, and what its caller sends by it."""

    def __init__(self, kind: str, number: int, label: str) -> None:
        self.kind, self.number, self.label = kind, number, label

    def about(self, sender: int, receiver: int, row: Tensor) -> bytes:
        """What is signed along with a row."""
        shape, dtype = list(row.shape), str(row.dtype)
        return canonical([self.kind, self.number, sender, receiver, dtype, shape, self.label])


def as_bytes(tensor: Tensor) -> Any:
    """A contiguous tensor's memory on the CPU, not copied."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def _nonce(number: int, receiver: int) -> bytes:
    return struct.pack(">IQ", receiver, number)
