"""Which documents are held out, and what a piece gives to each split."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.describe import describe
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.splits import (
    TRAIN,
    VALIDATION,
    EncodeOptions,
    encode_piece,
    held_out,
    with_document_ends,
)
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import with_tokenizer
from tests.texts import contents, decoded_documents, write_rows

EOS = 7


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
    chosen = held_out(3, 1_000, 0.1, seed)
    base = splitmix64((splitmix64(seed % 2**64) + 3) % 2**64)
    expected = [splitmix64((base + n) % 2**64) < int(0.1 * 2**64) for n in range(1_000)]
    assert chosen.tolist() == expected
    assert 70 < sum(expected) < 130


def test_held_out_documents_are_spread_and_change_with_the_seed():
    chosen = np.concatenate([held_out(unit, 5_000, 0.2, 0) for unit in range(10)])
    thirds = [part.mean() for part in np.array_split(chosen, 3)]
    assert all(abs(fraction - 0.2) < 0.02 for fraction in thirds)
    other = np.concatenate([held_out(unit, 5_000, 0.2, 1) for unit in range(10)])
    assert 0.02 < (chosen & other).mean() < 0.06
    assert not held_out(0, 1_000, 0.0, 0).any()


def test_every_document_is_followed_by_eos():
    tokens = np.array([1, 2, 3, 4], np.uint32)
    joined = with_document_ends(tokens, np.array([2, 0, 1, 1]), EOS, "uint16")
    assert joined.dtype == np.uint16
    assert joined.tolist() == [1, 2, EOS, EOS, 3, EOS, 4, EOS]


def lengths_as_tokens(documents):
    """An encoder for tests: of a document of n bytes, n times the token n."""
    lengths = np.array([len(document.as_py()) for document in documents], np.int64)
    return np.repeat(lengths, lengths).astype(np.uint32), lengths


@pytest.mark.parametrize("is_validation", [False, True])
def test_a_piece_gives_its_documents_in_order_to_train_on_and_then_those_held_out(is_validation):
    sizes = [100 + n for n in range(50)]
    column = pa.array([b"x" * size for size in sizes], pa.large_binary())
    options = EncodeOptions(lengths_as_tokens, EOS, "uint16", validation_fraction=0.3, seed=1)
    encoded = encode_piece(4, column, is_validation, options)
    tokens, counts = encoded.tokens, encoded.splits
    hidden = [True] * 50 if is_validation else held_out(4, 50, 0.3, 1).tolist()
    of_split = {
        TRAIN: [size for size, is_hidden in zip(sizes, hidden, strict=True) if not is_hidden],
        VALIDATION: [size for size, is_hidden in zip(sizes, hidden, strict=True) if is_hidden],
    }
    assert is_validation or 5 < len(of_split[VALIDATION]) < 30
    expected = [
        token for sizes in of_split.values() for size in sizes for token in [size] * size + [EOS]
    ]
    assert tokens.tolist() == expected and tokens.dtype == np.uint16
    for split, sizes_of_split in of_split.items():
        assert counts[split].documents == len(sizes_of_split)
        assert counts[split].bytes == sum(sizes_of_split)
        assert counts[split].tokens == sum(sizes_of_split) + len(sizes_of_split)


@pytest.mark.usefixtures("small_pieces")
def test_documents_of_too_few_or_many_tokens_are_left_out_and_counted(
    tmp_path, tokenizer_folder, capsys
):
    texts = [f"{n} " + "kürzer und länger 模型 " * (n % 23) + "." for n in range(300)]
    path = write_rows(tmp_path / "a.jsonl", texts)
    asked = {"min_document_tokens": 30, "max_document_tokens": 170, "validation_fraction": 0.2}
    for name, workers in (("one", 1), ("two", 3)):
        how = asked | {"num_workers": workers}
        prepare(with_tokenizer(path, tmp_path / name, tokenizer_folder, **how))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    kept, left_out = [], {"too_short": [0, 0, 0], "too_long": [0, 0, 0]}
    for text in texts:
        length = len(tokenizer(text)["input_ids"])
        if 30 <= length <= 170:
            kept.append(text)
            continue
        counts = left_out["too_short" if length < 30 else "too_long"]
        for place, more in enumerate((1, len(text.encode()), length + 1)):
            counts[place] += more
    assert all(counts[0] > 20 for counts in left_out.values()) and len(kept) > 80
    manifest = Manifest.load(tmp_path / "one")
    for why, (documents, text_bytes, tokens) in left_out.items():
        found = manifest.left_out[why]
        assert (found.documents, found.bytes, found.tokens) == (documents, text_bytes, tokens)
    assert sum(facts.documents for facts in manifest.splits.values()) == len(kept)
    there = [*decoded_documents(tmp_path / "one", "train")]
    there += decoded_documents(tmp_path / "one", "validation")
    assert len(kept) - 2 <= len(set(there) & set(kept)) and len(there) <= len(kept)
    printed, described = capsys.readouterr().out, describe(tmp_path / "one")
    for text in (printed, described):
        short, long = (left_out[why][0] for why in ("too_short", "too_long"))
        assert f"{short} documents shorter than --min-document-tokens" in text
        assert f"{long} documents longer than --max-document-tokens" in text


def test_other_limits_are_another_dataset(tmp_path, tokenizer_folder):
    path = write_rows(tmp_path / "a.jsonl", ["some text " * n for n in range(1, 60)])
    out, asked = tmp_path / "out", {"min_document_tokens": 10}
    first = prepare(with_tokenizer(path, out, tokenizer_folder, **asked))
    assert prepare(with_tokenizer(path, out, tokenizer_folder, **asked)) == first
    with pytest.raises(ForgeError, match="min_document_tokens: 10 there, None asked"):
        prepare(with_tokenizer(path, out, tokenizer_folder))
    other = prepare(with_tokenizer(path, tmp_path / "other", tokenizer_folder))
    assert other.fingerprint != first.fingerprint and not other.left_out


def test_where_every_document_is_left_out_the_error_names_the_flag(tmp_path, tokenizer_folder):
    path = write_rows(tmp_path / "a.jsonl", ["some text " * n for n in range(1, 60)])
    asked = {"min_document_tokens": 100_000}
    with pytest.raises(ForgeError, match="59 documents shorter than --min-document-tokens") as why:
        prepare(with_tokenizer(path, tmp_path / "out", tokenizer_folder, **asked))
    assert "leave out fewer documents" in why.value.problems[0].fix
