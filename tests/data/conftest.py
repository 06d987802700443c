"""Fixtures of the data wing's tests: a text in small pieces, and what a whole run makes of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.tokenizer import train_tokenizer
from tests.data.preparations import config, make_pieces_small, write_text_of_every_kind
from tests.texts import contents, some_text


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces of work, record batches and files, of which a small text would have one."""
    make_pieces_small(monkeypatch.setattr)


@pytest.fixture
def no_kept_proofs(tmp_path, monkeypatch):
    """A cache of this test alone, and what to call for another one that is empty."""

    def another() -> Path:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        return folder

    another()
    return another


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with text of every way of reading."""
    return write_text_of_every_kind(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def ready_tokenizer(text, tmp_path_factory):
    """The folder of a tokenizer that was trained on the text."""
    folder = tmp_path_factory.mktemp("ready") / "out"
    prepare(config(text, folder))
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def undisturbed(text, tmp_path_factory):
    """The checksums of what an undisturbed run of one worker writes, in small pieces."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as small:
        make_pieces_small(small.setattr)
        prepare(config(text, folder, num_workers=1))
    found = contents(folder)
    assert len([name for name in found if name.endswith(".arrow")]) > 3
    return found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of 400 documents."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_bytes(some_text().encode())
    return path


@pytest.fixture(scope="session")
def prepared_corpus(corpus, tmp_path_factory):
    """That file as a prepared dataset; not to be changed."""
    folder = tmp_path_factory.mktemp("prepared_corpus") / "a"
    prepare(config(corpus, folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a tokenizer of 400 entries."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_text(100).split("\n\n"), 400).save_pretrained(folder)
    return folder
