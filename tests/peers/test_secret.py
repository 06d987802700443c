"""Only who knows the secret can prove it, for one rank at one rendezvous."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.secret import is_proven, new_nonce, proof, read_secret

SECRET = b"correct horse battery staple"


def test_a_proof_is_hmac_sha256_over_rank_and_nonces():
    nonces = [new_nonce() for _ in range(3)]
    message = json.dumps(["p2p-llm-forge rendezvous 1", 2, nonces]).encode()
    expected = hmac.new(SECRET, message, hashlib.sha256).hexdigest()
    assert proof(SECRET, 2, nonces) == expected
    assert is_proven(SECRET, 2, nonces, expected)


def test_a_proof_is_good_for_one_secret_one_rank_and_one_rendezvous():
    nonces = [new_nonce() for _ in range(3)]
    answer = proof(SECRET, 1, nonces)
    assert not is_proven(b"another secret of that length", 1, nonces, answer)
    assert not is_proven(SECRET, 0, nonces, answer), (
        "a rank's own proof cannot be handed back to it"
    )
    for rank in range(3):  # heard in another rendezvous, where one's own nonce was another
        others = [new_nonce() if rank == other else nonce for other, nonce in enumerate(nonces)]
        assert not is_proven(SECRET, 1, others, answer)
    assert not is_proven(SECRET, 1, ["a", "b"], proof(SECRET, 1, ['a", "b']))
    for nonsense in ("", "None", "ü", answer[:-1]):
        assert not is_proven(SECRET, 1, nonces, nonsense)


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
