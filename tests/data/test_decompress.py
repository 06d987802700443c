"""Decompressing: what Python's own compressors made is read to the end, or up to the damage."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zlib
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import decompress
from p2p_llm_forge.data.decompress import open_compressed
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents, pieces

# Without the time: the workers that run tests have to find the same ones.
COMPRESS = {"gzip": partial(gzip.compress, mtime=0), "bz2": bz2.compress, "xz": lzma.compress}
TEXT = b"a stream of its own"
STREAM = lzma.compress(TEXT)
# A zstd frame by its specification (RFC 8878): magic, flags, no window, one raw block; and one that
# holds no content.
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"


def zstd_frame(content: bytes) -> bytes:
    size, block = len(content), len(content) << 3 | 1
    return b"\x28\xb5\x2f\xfd\x20" + bytes([size]) + block.to_bytes(3, "little") + content


def read_by(size: int, content: bytes, name: str = "xz") -> bytes:
    stream, found = open_compressed(io.BytesIO(content), name), b""
    while more := stream.read(size):
        found += more
    return found


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 3)), max_size=4),
    st.integers(1, 99),
    st.sampled_from(list(COMPRESS)),
)
def test_streams_and_padding_are_read_to_the_end(streams, size, name):
    pack = COMPRESS[name]
    content = b"".join(pack(part) + bytes(4 * padding) for part, padding in streams)
    assert read_by(size, content, name) == b"".join(part for part, _ in streams)
    assert read_by(-1, content, name) == b"".join(part for part, _ in streams)


@pytest.mark.parametrize("size", [-1, 1, 4, 1000])
def test_frames_of_zstd_are_read_to_the_end(size):
    content = zstd_frame(b"one") + SKIPPABLE + zstd_frame(b"two") + SKIPPABLE
    assert read_by(size, content, "zstd") == b"onetwo"


def test_chunks_of_the_file_end_anywhere(monkeypatch):
    for chunk in (1, 2, 7):
        monkeypatch.setattr(decompress, "CHUNK_BYTES", chunk)
        for name, pack in COMPRESS.items():
            stream = pack(TEXT)
            assert read_by(5, stream + bytes(8) + stream, name) == 2 * TEXT


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_small_file_of_a_long_text_is_read_whole(name, size):
    text = b"ever the same" * 30_000
    assert read_by(size if size > 1 else 97, COMPRESS[name](text), name) == text


@pytest.mark.parametrize("damage", [zstd_frame(TEXT)[:-3], b"no frame", bytes(100)], ids=len)
def test_frames_of_zstd_before_damage_are_kept(damage):
    frames = b"".join(zstd_frame(b"%d" % n * 40) for n in range(1_000, 5_000))
    text = b"".join(b"%d" % n * 40 for n in range(1_000, 5_000))
    stream = open_compressed(io.BytesIO(frames + damage), "zstd")
    found = stream.read(len(text) + 1_000)
    assert text.startswith(found) and len(text) - len(found) < 10_000 < len(text)
    with pytest.raises(OSError):
        stream.read(1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, pack(TEXT)[:-1]) for name, pack in COMPRESS.items()),
        *((name, pack(TEXT) + pack(TEXT)[:12]) for name, pack in COMPRESS.items()),
        *((name, pack(TEXT) + b"no member") for name, pack in COMPRESS.items()),
        *((name, b"no member") for name in (*COMPRESS, "zstd")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_is_no_whole_stream_is_damage_after_all_that_could_be_read(name, content):
    stream = open_compressed(io.BytesIO(content), name)
    if content != b"no member":
        assert stream.read(1000).startswith(TEXT[:-1])
    with pytest.raises(OSError):
        stream.read(1000)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.txt.bz2", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("piece_bytes", [20_000, 8 << 20])
def test_a_truncated_file_keeps_what_comes_before(tmp_path, name, piece_bytes):
    texts = [random.Random(n).randbytes(6000).hex() for n in range(200)]
    raw = "\n\n".join(texts)
    if "json" in name:
        rows = [json.dumps({"text": text}) for text in texts]
        raw = "\n".join(rows) if "jsonl" in name else f"[{','.join(rows)}]"
    pack = COMPRESS[{"gz": "gzip"}.get(name[-2:], name.rpartition(".")[2])]
    cut = pack(raw.encode())[:-250_000]
    path = tmp_path / name
    path.write_bytes(cut)
    if "gz" in name:
        before = zlib.decompressobj(31).decompress(cut).decode()
        expected = [text for text in texts if text in before]
        # Where one that came whole does not show its end, it may be left out.
        expected = expected[
            : len(expected) - ("json" not in name and before.endswith(expected[-1]))
        ]
    found = pieces(path, skip_bad_rows=True, piece_bytes=piece_bytes)
    kept = [document.decode() for piece in found for document in piece.column.to_pylist()]
    assert 30 < len(kept) < 200 and kept == texts[: len(kept)]
    if "gz" in name:
        assert kept == expected
    assert sum(piece.skipped for piece in found) == 1
    with pytest.raises(ForgeError, match=f"(?s){name} is damaged or trunc.*--skip-bad-rows"):
        documents(path, piece_bytes=piece_bytes)


def test_a_truncated_table_keeps_the_rows_that_come_before(tmp_path):
    texts = [random.Random(n).randbytes(3000).hex() for n in range(200)]
    rows = "text,number\n" + "".join(f"{text},{n}\n" for n, text in enumerate(texts))
    cut = gzip.compress(rows.encode())[:-100_000]
    before = zlib.decompressobj(31).decompress(cut).decode()
    (tmp_path / "a.csv.gz").write_bytes(cut)
    for piece_bytes in (20_000, 8 << 20):
        found = pieces(tmp_path / "a.csv.gz", skip_bad_rows=True, piece_bytes=piece_bytes)
        kept = [document.decode() for piece in found for document in piece.column.to_pylist()]
        assert kept == texts[: before.count("\n") - 1] and len(kept) > 50
        assert sum(piece.skipped for piece in found) == 1
        with pytest.raises(ForgeError, match="(?s)a.csv.gz is damaged or truncated"):
            documents(tmp_path / "a.csv.gz", piece_bytes=piece_bytes)


@pytest.mark.parametrize("name", COMPRESS)
def test_a_file_of_several_streams_is_one_text(tmp_path, name):
    pack = COMPRESS[name]
    path = tmp_path / {"gzip": "a.txt.gz", "bz2": "a.txt.bz2", "xz": "a.txt.xz"}[name]
    path.write_bytes(pack(b"one\n\nstill t") + bytes(12) + pack(b"wo\n\nthree") + bytes(5120))
    assert documents(path) == [b"one", b"still two", b"three"]


def test_a_dictionary_beyond_the_limit_is_damage(monkeypatch):
    assert read_by(9, STREAM)
    monkeypatch.setattr(decompress, "XZ_MEMORY_BYTES", 1 << 20)  # that of STREAM takes 8 MB
    with pytest.raises(OSError, match="limit"):
        read_by(9, STREAM)
