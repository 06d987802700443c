"""A dataset that is there already is found by what it is made of, and never overwritten unasked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config
from tests.texts import contents, some_text, stream


def test_a_second_run_finds_the_dataset_prepared(corpus, prepared_corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared_corpus.rglob("*")}
    again = prepare(config(corpus, prepared_corpus, num_workers=3))
    assert "already prepared" in capsys.readouterr().out
    assert again == Manifest.load(prepared_corpus)
    assert before == {path: path.stat().st_mtime_ns for path in prepared_corpus.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"sequence_length": 64}, "sequence_length: 32 there, 64 asked"),
        ({"seed": 1}, "seed: 0 there, 1 asked"),
        ({"vocab_size": 500}, "vocab_size: 400 there, 500 asked"),
        ({"document_separator": "---"}, "document_separator"),
    ],
)
def test_another_dataset_in_the_folder_is_not_overwritten(
    corpus, prepared_corpus, changes, difference
):
    before = contents(prepared_corpus)
    with pytest.raises(ForgeError, match=f"(?s)another dataset.*{difference}.*fix: .*--overwrite"):
        prepare(config(corpus, prepared_corpus, **changes))
    assert contents(prepared_corpus) == before


def test_weights_are_the_same_as_their_shares_are(tmp_path, ready_tokenizer, capsys):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for seed, path in enumerate(paths):
        path.write_text(some_text(seed=seed))

    def mixture(folder, *weights):
        weighted = [f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True)]
        asked = PrepareConfig(
            weighted, str(tmp_path / folder), tokenizer=ready_tokenizer, sequence_length=32
        )
        prepare(asked)
        return contents(tmp_path / folder)

    made = mixture("one", "0.1", "0.2")
    for weights in (("1", "2"), ("0.10", ".2"), ("7", "14.0")):
        capsys.readouterr()
        assert mixture("one", *weights) == made
        assert "already prepared" in capsys.readouterr().out
        assert mixture("-".join(weights), *weights) == made, "byte for byte"
    with pytest.raises(ForgeError, match="holds another dataset.*weights"):
        mixture("one", "2", "1")
    # As versions until now have recorded them.
    there = Manifest.load(tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()
    replace(there, arguments=there.arguments | {"weights": [0.1, 0.2]}).save(tmp_path / "one")
    capsys.readouterr()
    mixture("one", "0.1", "0.2")
    assert "already prepared" in capsys.readouterr().out


def test_another_text_or_tokenizer_is_another_dataset(corpus, prepared_corpus, tmp_path):
    other = tmp_path / corpus.name
    other.write_text(some_text(seed=4))
    with pytest.raises(ForgeError, match="another text"):
        prepare(config(other, prepared_corpus))
    with pytest.raises(ForgeError, match="another tokenizer"):
        prepare(config(corpus, prepared_corpus, tokenizer=str(prepared_corpus / "tokenizer")))


def test_overwrite_replaces_the_dataset_and_nothing_else(corpus, tmp_path):
    folder, fresh = tmp_path / "a", tmp_path / "b"
    prepare(config(corpus, folder))
    (folder / "notes.md").write_text("mine")
    prepare(config(corpus, folder, validation_fraction=0, overwrite=True))
    prepare(config(corpus, fresh, validation_fraction=0))
    assert (folder / "notes.md").read_text() == "mine"
    (folder / "notes.md").unlink()
    assert contents(folder) == contents(fresh)


def test_the_tokenizer_of_a_dataset_can_prepare_another(corpus, prepared_corpus, tmp_path):
    used = config(corpus, tmp_path / "a", tokenizer=str(prepared_corpus / "tokenizer"))
    manifest = prepare(used)
    assert manifest.tokenizer_fingerprint == Manifest.load(prepared_corpus).tokenizer_fingerprint
    assert stream(tmp_path / "a", "train") == stream(prepared_corpus, "train")
    assert prepare(used) == manifest
