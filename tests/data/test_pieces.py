"""Pieces that are done are found again by all that decides their tokens, unless damaged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from p2p_llm_forge.data.parts import Part, Span
from p2p_llm_forge.data.pieces import PieceId, Pieces, Record, digest, digest_of
from p2p_llm_forge.data.splits import TRAIN, VALIDATION, SplitCounts
from p2p_llm_forge.errors import ForgeError

PART = Part("text", (Span("a.txt", 0, 100, 100, 100, 5),))
FIRST = PieceId(0, 0)
DECIDES = {"seed": 0, "tokenizer": "t"}
TOKENS = np.arange(1000, 1010, dtype=np.uint16)
DOCUMENTS = np.array([[4, 20, 0], [3, 30, 2], [3, 9, 1]], "<u8")
OF_DOCUMENTS = digest(DOCUMENTS)


def record_of(tokens: np.ndarray, is_last: bool = True) -> Record:
    counts = {TRAIN: SplitCounts(2, 50, 7), VALIDATION: SplitCounts(1, 9, len(tokens) - 7)}
    checksums = {"digest": "d", "checksum": digest(tokens), "documents_checksum": OF_DOCUMENTS}
    return Record(counts, **checksums, skipped=3, is_last=is_last)


@pytest.fixture
def pieces(tmp_path):
    return Pieces(tmp_path, [PART], DECIDES, "uint16")


@pytest.fixture
def written(pieces):
    """A piece that is done."""
    pieces.write(FIRST, TOKENS, DOCUMENTS, record_of(TOKENS))
    return FIRST


def test_another_process_finds_the_tokens_and_the_record_of_a_piece(written, tmp_path):
    same = dataclasses.replace(PART)  # an equal part that was found again
    elsewhere = Pieces(tmp_path, [same], dict(reversed(DECIDES.items())), "uint16")
    assert elsewhere.record(FIRST) == record_of(TOKENS)
    found = elsewhere.tokens(FIRST)
    assert found[TRAIN].tolist() == TOKENS[:7].tolist()
    assert found[VALIDATION].tolist() == TOKENS[7:].tolist()
    assert elsewhere.documents(FIRST).tolist() == DOCUMENTS.tolist()


def test_what_decides_the_tokens_decides_whether_a_piece_is_done(written, tmp_path):
    changed = Part("text", (Span("a.txt", 0, 100, 100, 100, mtime_ns=6),))
    others = [
        ([changed], DECIDES, FIRST),
        ([PART, PART], DECIDES, PieceId(1, 0)),
        ([PART], DECIDES, PieceId(0, 1)),
        ([PART], DECIDES | {"seed": 1}, FIRST),
        ([PART], DECIDES | {"tokenizer": "u"}, FIRST),
    ]
    assert Pieces(tmp_path, [PART, PART], DECIDES, "uint16").record(written)
    for parts, decides, piece in others:
        assert Pieces(tmp_path, parts, decides, "uint16").record(piece) is None


def change_a_token(tokens, record):
    tokens.write_bytes(b"\0" + tokens.read_bytes()[1:])


def cut_tokens(tokens, record):
    tokens.write_bytes(tokens.read_bytes()[:-2])


def lose_tokens(tokens, record):
    tokens.unlink()


def cut_documents(tokens, record):
    documents = tokens.with_suffix(".documents")
    documents.write_bytes(documents.read_bytes()[:-8])


def cut_record(tokens, record):
    record.write_bytes(record.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage", [change_a_token, cut_tokens, lose_tokens, cut_documents, cut_record]
)
def test_a_damaged_piece_is_not_done(written, tmp_path, damage):
    [tokens], [record] = tmp_path.glob("*.tokens"), tmp_path.glob("*.json")
    damage(tokens, record)
    assert Pieces(tmp_path, [PART], DECIDES, "uint16").record(written) is None


def test_damage_after_the_record_was_read_is_an_error(written, tmp_path):
    elsewhere = Pieces(tmp_path, [PART], DECIDES, "uint16")
    assert elsewhere.record(written)
    [tokens] = tmp_path.glob("*.tokens")
    cut_tokens(tokens, None)
    with pytest.raises(ForgeError, match="damaged on the disk.*\n.*run the same command again"):
        elsewhere.tokens(written)


def test_a_part_is_done_when_its_last_piece_and_all_before_are(pieces):
    for place, is_last in ((0, False), (2, True), (1, False)):
        assert not pieces.has_all_of(0)
        pieces.write(PieceId(0, place), TOKENS, DOCUMENTS, record_of(TOKENS, is_last))
    assert pieces.has_all_of(0)


def test_the_digest_of_documents_changes_with_their_text_and_their_borders():
    columns = [[b"ab", b"c"], [b"a", b"bc"], [b"ab", b"d"], [b"abc"], []]
    digests = {digest_of(pa.array(column, pa.large_binary())) for column in columns}
    assert len(digests) == len(columns)
    sliced = pa.array([b"zz", b"ab", b"c"], pa.large_binary())[1:]
    assert digest_of(sliced) == digest_of(pa.array([b"ab", b"c"], pa.large_binary()))


def test_text_that_was_kept_comes_back_unless_it_is_damaged(pieces, tmp_path):
    texts = pa.array([b"zz", b"ab", "ö".encode()], pa.large_binary())[1:]
    pieces.keep_text(FIRST, texts)
    record = dataclasses.replace(record_of(TOKENS), digest=digest_of(texts))
    pieces.write(FIRST, TOKENS, DOCUMENTS, record)
    assert pieces.text(FIRST).to_pylist() == texts.to_pylist()
    [path] = tmp_path.glob("*.text")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-40], whole.replace("ö".encode(), b"oo"), whole[::-1]):
        path.write_bytes(damaged)
        assert damaged == whole or pieces.text(FIRST) is None
    path.unlink()
    assert pieces.text(FIRST) is None
