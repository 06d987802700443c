"""Describe and verify: what a dataset holds is shown, and every damaged file is named."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from p2p_llm_forge.data.dataset import Manifest, open_prepared
from p2p_llm_forge.data.describe import END_MARK, describe, verify, vocabulary_use
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
