"""A proof is made once for a tokenizer, and what is kept of it holds for that one alone."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken

from p2p_llm_forge.data import fast_path, kept_proofs
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.fast_path import FastPathDiffers
from p2p_llm_forge.data.kept_proofs import KeptProof
from p2p_llm_forge.data.parts import column_of
from tests.data.tokenizers import byte_tokenizer


@pytest.fixture
def proofs_made(monkeypatch):
    """How often the texts of the proof were compared."""
    made = []
    right = fast_path.texts_of_proof
    monkeypatch.setattr(fast_path, "texts_of_proof", lambda t: (made.append(t), right(t))[1])
    return made


def kept(cache: Path) -> list[Path]:
    return [path for path in (cache / "p2p-llm-forge" / "proofs").glob("*") if path.is_file()]


def test_a_proof_is_made_once_and_again_for_what_is_not_the_same(
    no_kept_proofs, proofs_made, monkeypatch
):
    cache = no_kept_proofs()
    for _ in range(3):
        assert Encoders(byte_tokenizer()).is_fast
    assert len(proofs_made) == 1 and len(kept(cache)) == 1
    Encoders(byte_tokenizer(added=(AddedToken("peer"),)))
    assert len(proofs_made) == 2
    versions = kept_proofs.version
    for package in ("gigatoken", "tokenizers"):
        monkeypatch.setattr(
            kept_proofs,
            "version",
            lambda name, package=package: "99" if name == package else versions(name),
        )
        Encoders(byte_tokenizer())
    assert len(proofs_made) == 4
    # Another version of the proof itself: of the code that it is written in.
    monkeypatch.setattr(kept_proofs, "version", versions)
    monkeypatch.setattr(kept_proofs, "SOURCES", kept_proofs.SOURCES[:-1])
    Encoders(byte_tokenizer())
    assert len(proofs_made) == 5


def test_a_refusal_is_kept_with_its_reason(no_kept_proofs, proofs_made):
    tokenizer = byte_tokenizer(added=(AddedToken("d|>x", normalized=False),))
    first, second = Encoders(tokenizer), Encoders(tokenizer)
    assert len(proofs_made) == 1
    assert not first.is_fast and not second.is_fast
    assert "differ on" in first.reason and second.reason == first.reason


def test_a_difference_that_is_found_during_the_work_is_kept(no_kept_proofs, monkeypatch):
    right = fast_path.fast_encoder

    def make(rules):
        encode = right(rules)

        def wrong(documents):
            tokens, lengths = encode(documents)
            is_odd = any("🦀👽".encode() in document for document in documents.to_pylist())
            return (tokens[::-1].copy() if is_odd else tokens), lengths

        return wrong

    monkeypatch.setattr(fast_path, "fast_encoder", make)
    encoders = Encoders(byte_tokenizer())
    assert encoders.is_fast
    with pytest.raises(FastPathDiffers):
        encoders.encode(column_of(["🦀👽 peers".encode()]))
    assert not Encoders(byte_tokenizer()).is_fast


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(os.urandom(200)),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text(file.read_text().replace('"reason": ""', '"reason": "no"')),
        lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"reason": None})),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_proof_is_made_again(no_kept_proofs, proofs_made, damage):
    cache = no_kept_proofs()
    Encoders(byte_tokenizer())
    [file] = kept(cache)
    damage(file)
    for _ in range(2):
        assert Encoders(byte_tokenizer()).is_fast
    assert len(proofs_made) == (3 if file.is_dir() else 2)


def test_the_proof_of_one_tokenizer_is_not_that_of_another(no_kept_proofs, proofs_made):
    cache = no_kept_proofs()
    safe, unsafe = byte_tokenizer(), byte_tokenizer(added=(AddedToken("peer", single_word=True),))
    Encoders(safe)
    [file] = kept(cache)
    Encoders(unsafe)
    [other] = set(kept(cache)) - {file}
    other.write_bytes(file.read_bytes())
    assert not Encoders(unsafe).is_fast


@pytest.mark.parametrize("home", ["a file", "nowhere", "relative"])
def test_where_nothing_can_be_kept_the_proof_is_made_each_time(
    tmp_path, monkeypatch, proofs_made, home
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    places = {"a file": tmp_path / "file" / "below", "nowhere": "/proc/nowhere", "relative": "x"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(places[home]))
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for _ in range(2):
        assert Encoders(byte_tokenizer()).is_fast
    assert len(proofs_made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def keep_often(number: int) -> None:
    proof = KeptProof(byte_tokenizer())
    for _ in range(50):
        proof.keep(f"reason {number} " * 1000)
        assert (proof.reason() or "").startswith("reason ")


def test_many_can_keep_the_same_at_once(no_kept_proofs):
    cache = no_kept_proofs()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=keep_often, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(kept(cache)) == 1
