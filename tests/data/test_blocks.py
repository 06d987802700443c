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


def write_blocks(folder: Path, pieces: list[np.ndarray], length: int, dtype: str = "uint16"):
    writer = BlockWriter(folder, length, dtype)
    for piece in pieces:
        writer.append(piece)
    tail = writer.finish()
    digests = writer.describe("train", "0123456789abcdef")
    found = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
    assert digests == {name: hashlib.sha256(raw).hexdigest() for name, raw in found.items()}
    return writer, tail


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
