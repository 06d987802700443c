"""What leaves a rank sealed opens only as what it is: for its receiver, once, unchanged."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.peers import sealing as sealing_module
from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.peers.sealing import TAG_BYTES, Exchange, Sealing
from p2p_llm_forge.peers.secret import Session
from tests.memory_channel import Exchanges, Tampered, channels, flipped, run_ranks

SECRET = b"correct horse battery staple"
KINDS = ("all_to_all", "all_gather", "send_from_main_")


def call(channel, kind, values, label=""):
    """What arrives by one call of a channel. values: (ranks, n), of this rank."""
    if kind == "all_to_all":
        return channel.all_to_all(values, label)()
    if kind == "all_gather":
        return channel.all_gather(values[0].contiguous(), label)()
    return channel.send_from_main_(values[0].clone(), label)


def values_of(rank, ranks, number=0):
    return torch.arange(ranks * 5, dtype=torch.float32).view(ranks, 5) + 100 * rank + 7 * number


def closed(made):
    for channel in made:
        channel.close()


def test_a_row_is_aes_256_gcm_under_the_key_nonce_and_data_that_are_written_down():
    """Opened by another interface of the library, with a key that is derived by hand."""
    session = Session(SECRET, [{"nonce": "a"}, {"nonce": "b"}])
    row = torch.tensor([1.5, -2.0])
    wire = torch.empty(8 + TAG_BYTES, dtype=torch.uint8)
    Sealing(session, 1, 3).seal(row, wire, Exchange("all_to_all", 1030, "bucket"), receiver=0)

    said = json.dumps([{"nonce": "a"}, {"nonce": "b"}], separators=(",", ":")).encode()
    extracted = hmac.new(hashlib.sha256(said).digest(), SECRET, hashlib.sha256).digest()
    key = hmac.new(extracted, b"p2p-llm-forge session 1\x01", hashlib.sha256).digest()
    key = hmac.new(key, b'["rows",3,"all_to_all",1,1]\x01', hashlib.sha256).digest()
    sealed, nonce = bytes(wire.tolist()), b"\0\0\0\0" + (1030).to_bytes(8, "big")
    opening = Cipher(algorithms.AES(key), modes.GCM(nonce, sealed[-16:])).decryptor()
    opening.authenticate_additional_data(b'["all_to_all",1030,1,0,"torch.float32",[2],"bucket"]')
    assert opening.update(sealed[:-16]) + opening.finalize() == row.numpy().tobytes()


USED: Counter = Counter()  # how often something was encrypted with a key and a nonce


class Recording:
    """The cipher itself; it notes what it is used with."""

    def __init__(self, key):
        self._key, self._cipher = bytes(key), AESGCM(key)
        self.decrypt_into = self._cipher.decrypt_into

    def encrypt_into(self, nonce, *rest):
        USED[self._key, bytes(nonce)] += 1
        return self._cipher.encrypt_into(nonce, *rest)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), min_size=1, max_size=20),
)
def test_no_key_ever_meets_a_nonce_twice_and_what_arrives_is_what_was_sent(ranks, calls):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing_module, "EPOCH", 3)  # several keys in few exchanges
        patch.setattr(sealing_module, "AESGCM", Recording)
        USED.clear()
        for restarted in range(2):  # as after a crash: the same calls in another session
            sealed = channels(ranks, SECRET, nonce=restarted)
            plain = channels(ranks)

            def act(channel, calls=calls):
                return [
                    call(channel, kind, values_of(channel.rank, ranks, number)[:, :size].clone())
                    for number, (kind, size) in enumerate(calls)
                ]

            for pairs in zip(run_ranks(sealed, act), run_ranks(plain, act), strict=True):
                assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
            closed([*sealed, *plain])
        sent = sum(
            {"all_to_all": ranks * (ranks - 1), "all_gather": ranks, "send_from_main_": 1}[kind]
            for kind, _ in calls
        )
    assert sum(USED.values()) == 2 * sent and max(USED.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit", [0, 13, 8 * 20, 8 * 36 - 1])
def test_a_bit_that_flips_on_the_way_is_refused_by_the_name_of_its_sender(kind, bit):
    ranks = channels(3, SECRET, Tampered(3, flipped(bit)))

    def act(channel):
        try:
            call(channel, kind, values_of(channel.rank, 3))
        except RankFailure as error:
            return str(error), error.status

    found = [one for one in run_ranks(ranks, act) if one]
    closed(ranks)
    assert found, "nobody noticed"
    sender = 0 if kind == "send_from_main_" else 1
    if kind != "all_to_all":
        assert len(found) == 2, "everybody but the sender"
    for text, status in found:
        assert f"of rank {sender} does not open with the cluster's secret" in text
        assert "nothing was trained on it" in text and status != 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_that_is_repeated_does_not_open(kind):
    class Replaying(Exchanges):
        def receive(self, kind, number):
            return super().receive(kind, max(0, number - 1))

    ranks = channels(2, SECRET, Replaying(2))

    def act(channel):
        values = values_of(channel.rank, 2)
        call(channel, kind, values)
        if kind == "send_from_main_" and channel.rank == 0:
            return call(channel, kind, values) is not None
        with pytest.raises(RankFailure, match=" 1 of rank . does not open"):
            call(channel, kind, values)
        return True

    assert all(run_ranks(ranks, act))
    closed(ranks)


def test_rows_do_not_open_as_those_of_another_sender_or_receiver_or_purpose():
    session = Session(SECRET, [{"nonce": "a"}])
    row = torch.arange(4, dtype=torch.int32)
    wire = torch.empty(16 + TAG_BYTES, dtype=torch.uint8)
    Sealing(session, 0, 1).seal(row, wire, Exchange("all_to_all", 5, "of this"), receiver=1)
    opened = torch.zeros_like(row)
    Sealing(session, 1, 1).open(wire, opened, Exchange("all_to_all", 5, "of this"), 0, 1)
    assert torch.equal(opened, row)
    for channel, exchange, sender, receiver, into in (
        (2, ("all_to_all", 5, "of this"), 0, 1, row),
        (1, ("all_gather", 5, "of this"), 0, 1, row),
        (1, ("all_to_all", 6, "of this"), 0, 1, row),
        (1, ("all_to_all", 5, "of that"), 0, 1, row),
        (1, ("all_to_all", 5, "of this"), 2, 1, row),
        (1, ("all_to_all", 5, "of this"), 0, 2, row),
        (1, ("all_to_all", 5, "of this"), 0, 1, row.float()),
        (1, ("all_to_all", 5, "of this"), 0, 1, row.to(torch.int64)[:2]),
    ):
        with pytest.raises(RankFailure, match=f"of rank {sender} does not open"):
            Sealing(session, 1, channel).open(
                wire, into.clone(), Exchange(*exchange), sender, receiver
            )


def test_a_number_is_never_sealed_twice():
    sealing = Sealing(Session(SECRET, [{"nonce": "a"}]), 0, 1)
    row, wire = torch.zeros(2), torch.empty(8 + TAG_BYTES, dtype=torch.uint8)
    sealing.seal(row, wire, Exchange("all_gather", 4, ""))
    for number in (4, 3):
        with pytest.raises(AssertionError, match="sealed twice"):
            sealing.seal(row, wire, Exchange("all_gather", number, ""))
