"""Xz: what Python's lzma and xz's own rules make of a file, and what of it is kept."""

from __future__ import annotations

import io
import lzma
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import xz
from p2p_llm_forge.data.xz import XzStream
from tests.data.reading import documents, pieces

STREAM = lzma.compress(b"a stream of its own")


def read_by(size: int, content: bytes) -> bytes:
    stream, found = XzStream(io.BytesIO(content)), b""
    while more := stream.read(size):
        found += more
    return found


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3)), max_size=4), st.integers(1, 99)
)
def test_streams_and_padding_are_read_to_the_end(streams, size):
    content = b"".join(lzma.compress(part) + bytes(4 * padding) for part, padding in streams)
    assert read_by(size, content) == b"".join(part for part, _ in streams)
    assert read_by(-1, content) == b"".join(part for part, _ in streams)


def test_chunks_of_the_file_end_anywhere(monkeypatch):
    for chunk in (1, 2, 7):
        monkeypatch.setattr(xz, "CHUNK_BYTES", chunk)
        assert read_by(5, STREAM + bytes(8) + STREAM) == 2 * b"a stream of its own"


@pytest.mark.parametrize(
    "content", [STREAM[:-1], STREAM + STREAM[:30], STREAM + b"no xz", b"no xz"]
)
def test_what_is_no_whole_stream_is_damage_after_all_that_could_be_read(content):
    stream = XzStream(io.BytesIO(content))
    if content.startswith(STREAM[:-1]):
        assert stream.read(1000).startswith(b"a stream of its own")
    with pytest.raises(OSError):
        stream.read(1000)


def test_a_truncated_file_keeps_what_comes_before(tmp_path):
    texts = [random.Random(n).randbytes(2000).hex() for n in range(200)]
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress("\n\n".join(texts).encode())[:-40_000])
    found = pieces(path, skip_bad_rows=True, piece_bytes=20_000)
    kept = [document.decode() for piece in found for document in piece.column.to_pylist()]
    assert 100 < len(kept) < 200 and kept[:-1] == texts[: len(kept) - 1]
    assert sum(piece.skipped for piece in found) == 1


def test_a_file_of_several_streams_is_one_text(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one\n\nstill t") + bytes(12) + lzma.compress(b"wo\n\nthree"))
    assert documents(path) == [b"one", b"still two", b"three"]


def test_a_dictionary_beyond_the_limit_is_damage(monkeypatch):
    assert read_by(9, STREAM)
    monkeypatch.setattr(xz, "MEMORY_BYTES", 1 << 20)  # that of STREAM takes 8 MB
    with pytest.raises(OSError, match="limit"):
        read_by(9, STREAM)
