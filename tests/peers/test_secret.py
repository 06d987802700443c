"""Only who knows the secret can prove it, sign a value or read one, at one rendezvous."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.peers.secret import Session, new_nonce, read_secret

SECRET = b"correct horse battery staple"


def hellos(ranks=3):
    return [
        {"host": f"host-{rank}", "nonce": new_nonce(), "address": f"10.0.0.{rank}", "port": 4000}
        for rank in range(ranks)
    ]


def expand(key, info):
    """The first block of HKDF-Expand, by RFC 5869 section 2.3."""
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


def compact(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_keys_proofs_and_signatures_are_those_of_rfc_5869_and_2104():
    """By hand, from the standard library alone."""
    said = hellos()
    salt = hashlib.sha256(compact(said)).digest()
    key = expand(hmac.new(salt, SECRET, hashlib.sha256).digest(), b"p2p-llm-forge session 1")
    session = Session(SECRET, said)
    assert session.key("rows", 7) == expand(key, b'["rows",7]')
    of_proofs, of_store = expand(key, b'["proof"]'), expand(key, b'["store"]')
    assert session.proof(2) == hmac.new(of_proofs, b"[2]", hashlib.sha256).hexdigest()
    mac = hmac.new(of_store, b'["forge/7/1",1,"{}"]', hashlib.sha256).hexdigest()
    assert session.sign("forge/7/1", 1, "{}") == mac + "{}"


def test_a_proof_is_good_for_one_secret_one_rank_and_one_rendezvous():
    said = hellos()
    session = Session(SECRET, said)
    answer = session.proof(1)
    assert Session(SECRET, said).is_proven(1, answer)
    assert not Session(b"another secret of that length", said).is_proven(1, answer)
    assert not session.is_proven(0, answer), "a rank's own proof cannot be handed back to it"
    for rank in range(3):
        for changed in ("nonce", "address", "host"):
            others = [
                {**hello, changed: "x"} if r == rank else hello for r, hello in enumerate(said)
            ]
            assert not Session(SECRET, others).is_proven(1, answer), (rank, changed)
        others = [{**hello, "port": 4001} if r == rank else hello for r, hello in enumerate(said)]
        assert not Session(SECRET, others).is_proven(1, answer)
    for nonsense in ("", "None", "ü", "\ud800", answer[:-1]):
        assert not session.is_proven(1, nonsense)


def test_a_value_is_good_for_one_key_one_rank_and_one_rendezvous():
    said = hellos()
    session = Session(SECRET, said)
    for value in ("", "{}", "ü\n", "�", "\ud800".encode("utf-8", "replace").decode()):
        signed = session.sign("forge/7/1", 1, value).encode()
        assert session.verified("forge/7/1", 1, signed) == value
        for key, rank, other in (
            ("forge/8/1", 1, session),
            ("forge/7/1", 0, session),
            ("forge/7/1", 1, Session(SECRET, hellos())),
        ):
            with pytest.raises(RankFailure, match=f"rank {rank} under {key} is not signed"):
                other.verified(key, rank, signed)
        for position in range(len(signed)):
            flipped = bytearray(signed)
            flipped[position] ^= 1
            assert session.opened("forge/7/1", 1, bytes(flipped)) is None, position
    for nonsense in (b"", b"{}", b"\xff" * 64, b"0" * 64 + b"{}", b"0" * 63):
        assert session.opened("forge/7/1", 1, nonsense) is None


def test_a_value_of_bytes_that_are_no_text_is_not_signed():
    session = Session(SECRET, hellos())
    signed = session.sign("k", 0, "�").encode()
    assert session.opened("k", 0, signed[:64] + b"\xff") is None


def test_nonces_do_not_repeat():
    assert len({new_nonce() for _ in range(100)}) == 100 and len(new_nonce()) == 64


def test_a_secret_file_is_private_and_long_enough(tmp_path):
    file = tmp_path / "secret"
    with pytest.raises(ForgeError, match="(?s)cannot be read .*openssl rand -hex 32"):
        read_secret(str(file))
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o640)
    with pytest.raises(
        ForgeError, match=r"other users \(mode 640\)\n  fix: make it private: chmod 600"
    ):
        read_secret(str(file))
    file.chmod(0o600)
    assert read_secret(str(file)) == SECRET
    file.write_bytes(b"short\n")
    with pytest.raises(ForgeError, match="holds 5 bytes, 16 is the least"):
        read_secret(str(file))
    assert read_secret(None) is None
