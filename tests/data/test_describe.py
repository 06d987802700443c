"""Describe and verify: what a dataset holds is shown, and every damaged file is named."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter

import pytest

from p2p_llm_forge.data.dataset import Manifest, open_prepared
from p2p_llm_forge.data.describe import END_MARK, describe, documents_of, verify, vocabulary_use
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from prepare_data import main
from tests.data.preparations import config
from tests.texts import contents, decoded_documents, stream, write_rows


@pytest.fixture
def prepared(tmp_path, ready_tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [f"document {n} 👩🏽" for n in range(100)])
    prepare(config(path, tmp_path / "out", tokenizer=str(ready_tokenizer)))
    return tmp_path / "out"


def test_describe_shows_what_a_dataset_holds(prepared, capsys):
    assert main(["--describe", str(prepared), "--verify"]) == 0
    text = capsys.readouterr().out
    facts = Manifest.load(prepared).splits["train"]
    assert f"train: {facts.documents} documents, {facts.blocks} blocks, {facts.tokens:,}" in text
    used = len(set(stream(prepared, "train")))
    assert f"{used} entries of the vocabulary used" in text
    assert "document" in text and END_MARK in text
    assert f"all {len(contents(prepared)) - 1} files are as they were written" in text


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_verify_names_every_damaged_file(prepared, damage):
    names = ["tokenizer/tokenizer.json", "train/data-00000-of-00001.arrow"]
    for path in (prepared / name for name in names):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink() if damage == "missing" else path.write_bytes(content)
        if damage == "shorter":
            path.write_bytes(content[:-1])
    with pytest.raises(ForgeError, match=f"(?s){names[0]}.*{names[1]}.*--overwrite"):
        verify(prepared)


def test_checksums_are_those_of_sha256sum(prepared):
    files = Manifest.load(prepared).files
    assert set(files) == set(contents(prepared)) - {"manifest.json"} and len(files) > 5
    for name, facts in files.items():
        content = (prepared / name).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()


def test_verify_without_a_dataset_is_a_clear_error():
    with pytest.raises(ForgeError, match="add --describe FOLDER"):
        main(["--verify", "--dataset-path", "a.txt", "--output-dir", "b"])


def test_damage_is_found_by_describe_and_first_by_verify(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    arrow = next((folder / "train").glob("*.arrow"))
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    for path, there in ((arrow, arrow.read_bytes()), (tokenizer, tokenizer.read_bytes())):
        middle = len(there) // 2
        path.write_bytes(there[:middle] + b"\xff" * 64 + there[middle + 64 :])
        found = "holds the token 65535" if path == arrow else "tokenizer cannot be read"
        with pytest.raises(ForgeError, match=found):
            main(["--describe", str(folder)])
        with pytest.raises(ForgeError, match=f"{path.name} has another checksum"):
            main(["--describe", str(folder), "--verify"])
        path.write_bytes(there)
    assert main(["--describe", str(folder), "--verify"]) == 0


def test_the_first_block_is_shown_as_text_with_the_ends_of_documents_marked(prepared):
    shown = describe(prepared).partition("ends a document):\n")[2]
    first = decoded_documents(prepared, "train")
    documents = shown.split(f"{END_MARK}\n")
    assert len(documents) > 1
    assert documents[:-1] == first[: len(documents) - 1]
    assert first[len(documents) - 1].startswith(documents[-1].rstrip("\ufffd"))


def test_the_vocabulary_in_use_is_that_of_the_blocks(prepared):
    data = open_prepared(prepared)
    for split in ("train", "validation"):
        assert vocabulary_use(data, split) == len(set(stream(prepared, split)))
    assert vocabulary_use(data, "no such split") == 0


def split_at_ends(folder, split) -> list[tuple[int, ...]]:
    """The tokens of every document that has its end in a split's blocks, in a plain loop."""
    end, documents, tokens = Manifest.load(folder).eos_token_id, [], []
    for token in stream(folder, split):
        if token == end:
            documents.append(tuple(tokens))
            tokens = []
        else:
            tokens.append(token)
    return documents


def test_lengths_of_documents_are_counted_by_powers_of_two(
    corpus, tmp_path, ready_tokenizer, small_pieces
):
    folder = tmp_path / "out"
    prepare(config(corpus, folder, tokenizer=str(ready_tokenizer), sequence_length=8))
    data = open_prepared(folder)
    assert len(data.blocks("train").chunks) > 5, "documents go on in another chunk"
    shown = describe(folder)
    for split in ("train", "validation"):
        documents = split_at_ends(folder, split)
        lengths = [len(document) for document in documents]
        found = documents_of(data, split)
        assert found.lengths.tolist() == lengths and max(lengths) > 64
        begins = [sum(lengths[:n]) + n for n in range(len(lengths))]
        assert found.begins.tolist() == begins
        table = shown.partition(f"lengths of documents in {split}, in tokens:\n")[2]
        rows = {}
        for line in table.splitlines():
            if not (row := re.match(r" +([\d,]+) to ([\d,]+) +([\d,]+) +([\d.]+)%( #+)?$", line)):
                break
            least, most, count = (int(row[n].replace(",", "")) for n in (1, 2, 3))
            assert not rows or least == max(rows) + 1
            rows |= {most: count}
            assert count == sum(least <= length <= most for length in lengths)
            assert float(row[4]) == pytest.approx(100 * count / len(lengths), abs=0.01)
        assert sum(rows.values()) == len(documents) and len(rows) > 3


@pytest.mark.parametrize("repeats", [True, False])
def test_the_longest_repeated_document_is_shown_with_where_it_is(
    tmp_path, ready_tokenizer, repeats
):
    texts = [f"document {n} of peers" for n in range(60)]
    if repeats:
        texts += ["a short one twice"] * 2 + ["the long one is here " * 9] * 20 + ["the end"] * 9
    path = write_rows(tmp_path / "a.jsonl", texts)
    prepare(
        config(path, tmp_path / "out", tokenizer=str(ready_tokenizer), sequence_length=8, seed=3)
    )
    times = {
        split: Counter(split_at_ends(tmp_path / "out", split)) for split in ("train", "validation")
    }
    both = times["train"] + times["validation"]
    repeated = [document for document, count in both.items() if count > 1]
    shown = describe(tmp_path / "out")
    assert bool(repeated) == repeats
    if not repeats:
        assert "no document is there twice" in shown
        return
    longest = max(repeated, key=len)
    where = ", ".join(f"{of[longest]} in {split}" for split, of in times.items())
    assert times["validation"][longest] and times["train"][longest]
    line = f"longest repeated document: {len(longest)} tokens, {both[longest]} times ({where})"
    assert f'{line}, begins "the long one is here the long' in shown


def test_a_block_with_the_end_of_a_document_is_shown(tmp_path, ready_tokenizer):
    texts = ["a long story of peers " * 30, *(f"document {n}" for n in range(50))]
    path = write_rows(tmp_path / "a.jsonl", texts)
    asked = {"tokenizer": str(ready_tokenizer), "validation_fraction": 0.0, "sequence_length": 16}
    prepare(config(path, tmp_path / "out", **asked))
    tokens = stream(tmp_path / "out", "train")
    block = tokens.index(Manifest.load(tmp_path / "out").eos_token_id) // 16
    assert block > 3
    heading, _, shown = describe(tmp_path / "out").partition("ends a document):\n")
    assert heading.endswith(f"block {block} of train, the first with an end ({END_MARK} ")
    assert END_MARK in shown and "document 0" in shown


def test_shares_of_sources_are_shown(tmp_path, ready_tokenizer):
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {n} of peers" for n in range(count)])
        for name, count in (("a", 60), ("b", 90))
    ]
    both = {"dataset_path": [str(path) for path in paths], "tokenizer": str(ready_tokenizer)}
    prepare(config(paths[0], tmp_path / "out", validation_fraction=0.0, **both))
    facts = Manifest.load(tmp_path / "out")
    for source in facts.sources:
        got = 100 * source.tokens / facts.splits["train"].tokens
        assert f"{source.name}: {got:.2f}% got, {source.tokens:,} tokens" in describe(
            tmp_path / "out"
        )
