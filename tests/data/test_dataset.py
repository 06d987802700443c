"""Splits, blocks and manifest: nothing lost, nothing that depends on how the work is cut up."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from p2p_llm_forge.data import blocks, dataset, splits
from p2p_llm_forge.data.blocks import Blocks, BlockWriter
from p2p_llm_forge.data.dataset import Manifest, SplitFacts
from p2p_llm_forge.errors import ForgeError

EOS = 7


# --- the splits ----------------------------------------------------------------------------------


def splitmix64(state: int) -> int:
    """Java's SplittableRandom, in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 5, -1])
def test_held_out_documents_are_the_hash_of_their_numbers(seed):
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "published first output for seed 0"
    chosen = splits.held_out(3, 1_000, 0.1, seed)
    base = splitmix64((splitmix64(seed % 2**64) + 3) % 2**64)
    expected = [splitmix64((base + n) % 2**64) < int(0.1 * 2**64) for n in range(1_000)]
    assert chosen.tolist() == expected
    assert 70 < sum(expected) < 130


def test_held_out_documents_are_spread_and_change_with_the_seed():
    chosen = np.concatenate([splits.held_out(unit, 5_000, 0.2, 0) for unit in range(10)])
    thirds = [part.mean() for part in np.array_split(chosen, 3)]
    assert all(abs(share - 0.2) < 0.02 for share in thirds)
    other = np.concatenate([splits.held_out(unit, 5_000, 0.2, 1) for unit in range(10)])
    assert 0.02 < (chosen & other).mean() < 0.06
    assert not splits.held_out(0, 1_000, 0.0, 0).any()


def test_every_document_is_followed_by_eos():
    tokens = np.array([1, 2, 3, 4], np.uint32)
    joined = splits.with_document_ends(tokens, np.array([2, 0, 1, 1]), EOS, "uint16")
    assert joined.dtype == np.uint16
    assert joined.tolist() == [1, 2, EOS, EOS, 3, EOS, 4, EOS]


# --- blocks on disk -------------------------------------------------------------------------------


def write_blocks(folder: Path, pieces: list[np.ndarray], length: int, dtype: str = "uint16"):
    writer = BlockWriter(folder, length, dtype)
    for piece in pieces:
        writer.append(piece)
    tail = writer.finish()
    writer.describe("train", "0123456789abcdef")
    return writer, tail


def cut_up(tokens: np.ndarray, seed: int) -> list[np.ndarray]:
    cuts = sorted(random.Random(seed).choices(range(len(tokens) + 1), k=9))
    return np.split(tokens, cuts)


@pytest.fixture
def small_batches(monkeypatch):
    """Record batches of 5 blocks of 8 uint16, files of 3 batches."""
    monkeypatch.setattr(blocks, "BATCH_BYTES", 80)
    monkeypatch.setattr(blocks, "BATCHES_PER_SHARD", 3)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("length", [0, 7, 8, 39, 40, 41, 120, 121, 500])
def test_blocks_hold_the_stream_and_do_not_depend_on_its_pieces(tmp_path, small_batches, length):
    tokens = np.random.default_rng(length).integers(0, 2**16, length).astype(np.uint16)
    first, tail = write_blocks(tmp_path / "a", cut_up(tokens, 1), 8)
    _, same_tail = write_blocks(tmp_path / "b", cut_up(tokens, 2), 8)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
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


# --- manifest -------------------------------------------------------------------------------------


def a_manifest(**changes) -> Manifest:
    facts = {"train": SplitFacts(documents=3, blocks=2, tokens=16, bytes=50, dropped_tokens=1)}
    content = {
        "sequence_length": 8,
        "vocab_size": 300,
        "eos_token_id": 0,
        "dtype": "uint16",
        "splits": facts,
        "tokenizer_fingerprint": "t",
        "content_fingerprint": "c",
        "arguments": {"dataset_path": ["a.txt"], "seed": 0},
    }
    return Manifest(**content | changes)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    a_manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == a_manifest()
    assert Manifest.load(tmp_path).fingerprint == a_manifest().fingerprint


def test_the_fingerprint_tells_datasets_apart_and_ignores_names():
    same = a_manifest(arguments={"dataset_path": ["b.txt"], "seed": 0})
    assert same.fingerprint == a_manifest().fingerprint
    others = [
        a_manifest(sequence_length=16),
        a_manifest(tokenizer_fingerprint="u"),
        a_manifest(content_fingerprint="d"),
        a_manifest(arguments={"dataset_path": ["a.txt"], "seed": 1}),
    ]
    assert len({manifest.fingerprint for manifest in [same, *others]}) == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "(?s)no manifest.json.*python prepare_data.py"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 3}', "cannot be read"),
        ('{"format_version": 2}', "format version 2, this program reads 3"),
        ('{"format_version": 99}', "(?s)format version 99.*--overwrite"),
    ],
)
def test_a_folder_without_a_good_manifest_is_no_dataset(tmp_path, content, told):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ForgeError, match=told):
        dataset.open_prepared(tmp_path)


def test_a_folder_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(ForgeError, match="no such folder"):
        dataset.open_prepared(tmp_path / "none")
