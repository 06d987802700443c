"""Blocks on disk hold the stream, whatever the pieces in which it came."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from p2p_llm_forge.data import blocks
from p2p_llm_forge.data.blocks import Blocks, BlockWriter
from p2p_llm_forge.errors import ForgeError
from tests.texts import contents

EOS = 7
COLUMNS = ("input_ids", "trained", "begins")


def write_blocks(folder: Path, pieces: list[np.ndarray], length: int, dtype: str = "uint16"):
    writer = BlockWriter(folder, length, dtype)
    for piece in pieces:
        writer.append(piece)
    tail = writer.finish()
    digests = writer.describe("train", "0123456789abcdef")
    found = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
    assert digests == {name: hashlib.sha256(raw).hexdigest() for name, raw in found.items()}
    return writer, tail


def of_conversations(count: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What `count` blocks of conversations hold: tokens and marks, by the names of their columns.

    Each block begins a conversation, and some of its tokens but the first are trained.
    """
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 2**16, (count, length)).astype(np.uint16)
    trained, begins = draw.random((2, count, length)) < 0.3
    begins[:, 0], trained[:, 0], trained[:, -1] = True, False, True
    return {name: a.reshape(-1) for name, a in zip(COLUMNS, (tokens, trained, begins), strict=True)}


def cut_up(tokens: np.ndarray, seed: int) -> list[np.ndarray]:
    cuts = sorted(random.Random(seed).choices(range(len(tokens) + 1), k=9))
    return np.split(tokens, cuts)


@pytest.fixture
def small_batches(monkeypatch):
    """Record batches of 5 blocks of 8 uint16, files of 3 batches."""
    monkeypatch.setattr(blocks, "BATCH_BYTES", 80)
    monkeypatch.setattr(blocks, "BATCHES_PER_SHARD", 3)


@pytest.mark.parametrize("length", [0, 7, 8, 39, 40, 41, 120, 121, 500])
def test_blocks_hold_the_stream_and_do_not_depend_on_its_pieces(tmp_path, small_batches, length):
    tokens = np.random.default_rng(length).integers(0, 2**16, length).astype(np.uint16)
    first, tail = write_blocks(tmp_path / "a", cut_up(tokens, 1), 8)
    _, same_tail = write_blocks(tmp_path / "b", cut_up(tokens, 2), 8)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert tail.tolist() == same_tail.tolist() == tokens[length // 8 * 8 :].tolist()
    assert first.blocks == length // 8
    if length >= 8:
        rows = datasets.load_from_disk(str(tmp_path / "a"))["input_ids"]
        assert [token for row in rows for token in row] == tokens[: length // 8 * 8].tolist()
    files = list((tmp_path / "a").glob("*.arrow"))
    assert len(files) == -(-(length // 8) // 15)


def test_blocks_take_two_bytes_a_token_and_one_percent(tmp_path):
    tokens = np.zeros(1_000_000, np.uint16)
    write_blocks(tmp_path / "a", [tokens], 100)
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert 2_000_000 < size < 2_020_000


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_inputs_are_the_tokens_before_the_targets(tmp_path, small_batches, dtype):
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 50 * 8).astype(dtype)
    write_blocks(tmp_path / "a", [tokens], 8, dtype)
    written = Blocks(tmp_path / "a", 8, EOS)
    assert len(written) == 50
    order = random.Random(0).sample(range(50), 50)
    inputs, targets = written.inputs_and_targets(order)
    stream = [EOS, *tokens.tolist()]
    assert targets.tolist() == [stream[n * 8 + 1 : n * 8 + 9] for n in order]
    assert inputs.tolist() == [stream[n * 8 : n * 8 + 8] for n in order]
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    empty, _ = written.inputs_and_targets([])
    assert empty.shape == (0, 8)
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            written.inputs_and_targets([outside])


def write_marked(folder: Path, columns: dict[str, np.ndarray], length: int, cuts=()) -> BlockWriter:
    writer = BlockWriter(folder, length, "uint16", has_marks=True)
    for part in zip(*(np.split(columns[name], cuts) for name in COLUMNS), strict=True):
        writer.append(part[0], trained=part[1], begins=part[2])
    assert not len(writer.finish())
    writer.describe("train", "0123456789abcdef")
    return writer


@pytest.mark.parametrize("length", [1, 7, 8, 9, 21])
def test_marks_are_one_bit_a_token_beside_the_tokens(tmp_path, small_batches, length):
    """As anybody reads them: with datasets, bit by bit."""
    columns = of_conversations(50, length)
    assert write_marked(tmp_path / "a", columns, length, cuts=(3, 40, 41)).blocks == 50
    write_marked(tmp_path / "b", columns, length, cuts=(17,))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    rows = datasets.load_from_disk(str(tmp_path / "a"))
    assert set(rows.column_names) == set(COLUMNS) and len(rows) == 50
    assert [token for row in rows["input_ids"] for token in row] == columns["input_ids"].tolist()
    for name in COLUMNS[1:]:
        assert rows.features[name].feature.dtype == "uint8"
        assert {len(row) for row in rows[name]} == {(length + 7) // 8}
        bits = [row[t // 8] >> t % 8 & 1 for row in rows[name] for t in range(length)]
        assert bits == columns[name].astype(int).tolist()


def test_blocks_of_conversations_begin_by_themselves_and_hide_what_is_not_trained(
    tmp_path, small_batches
):
    columns = of_conversations(50, 11)
    write_marked(tmp_path / "a", columns, 11)
    written = Blocks(tmp_path / "a", 11, EOS)
    assert written.is_of_conversations
    tokens, trained, begins = (columns[name].reshape(50, 11).tolist() for name in COLUMNS)
    order = random.Random(0).sample(range(50), 50)
    inputs, targets = written.inputs_and_targets(order)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist() == [[EOS, *tokens[n][:-1]] for n in order]
    assert targets.tolist() == [
        [t if is_one else -100 for t, is_one in zip(tokens[n], trained[n], strict=True)]
        for n in order
    ]
    assert written.tokens(order).tolist() == [tokens[n] for n in order]
    assert written.begins(order).tolist() == [begins[n] for n in order]
    assert written.trained_tokens(order[:9]) == sum(sum(trained[n]) for n in order[:9])
    assert written.trained_tokens([]) == 0 == len(written.begins([]))
    again = pickle.loads(pickle.dumps(written))
    assert again.inputs_and_targets(order)[1].tolist() == targets.tolist()


def test_blocks_of_text_are_trained_whole(tmp_path):
    write_blocks(tmp_path / "a", [np.arange(80, dtype=np.uint16)], 8)
    written = Blocks(tmp_path / "a", 8, EOS)
    assert not written.is_of_conversations and written.begins([0, 3]) is None
    assert written.trained([0, 3]).all() and written.trained_tokens([0, 3]) == 16
    assert datasets.load_from_disk(str(tmp_path / "a")).column_names == ["input_ids"]


def test_damaged_marks_are_an_error_that_names_the_folder(tmp_path):
    columns = of_conversations(3, 16)
    columns["trained"][16:32] = False
    write_marked(tmp_path / "a", columns, 16)
    written = Blocks(tmp_path / "a", 16, EOS)
    for read in (written.inputs_and_targets, written.trained_tokens):
        assert read([0, 2])
        with pytest.raises(ForgeError, match="a is damaged: it holds a block of which nothing is"):
            read([0, 1])
    for number, (kept, kind) in enumerate([(("trained",), "uint8"), (COLUMNS[1:], "uint16")]):
        folder = tmp_path / str(number)
        rows = datasets.load_from_disk(str(tmp_path / "a")).select_columns(["input_ids", *kept])
        for name in kept:
            bits = datasets.List(datasets.Value(kind), length=2)
            rows = rows.cast_column(name, bits)
        rows.save_to_disk(str(folder))
        with pytest.raises(ForgeError, match=f"{number} cannot be read: ") as raised:
            Blocks(folder, 16, EOS)
        assert raised.value.problems[0].fix == "prepare the text again with --overwrite"


def test_blocks_are_mapped_not_copied_and_travel_to_workers_as_a_path(tmp_path):
    tokens = np.arange(4_000_000, dtype=np.uint32)
    write_blocks(tmp_path / "a", [tokens], 100, "uint32")
    before = pa.total_allocated_bytes()
    written = Blocks(tmp_path / "a", 100, EOS)
    written.inputs_and_targets(range(1_000))
    assert pa.total_allocated_bytes() - before < 1_000_000
    message = pickle.dumps(written)
    assert len(message) < 1_000
    assert pickle.loads(message).inputs_and_targets([39_999])[1][0, -1] == 3_999_999


def test_a_damaged_folder_is_an_error_that_names_it(tmp_path):
    write_blocks(tmp_path / "a", [np.zeros(80, np.uint16)], 8)
    next((tmp_path / "a").glob("*.arrow")).write_bytes(b"no arrow file")
    with pytest.raises(ForgeError, match="a cannot be read: ") as raised:
        Blocks(tmp_path / "a", 8, EOS)
    assert raised.value.problems[0].fix == "prepare the text again with --overwrite"
