"""Cutting: a file of source code or Markdown is one document, and the run says how it cut."""

from __future__ import annotations

import gzip
from collections import Counter

import pytest

from p2p_llm_forge.data import cutting, sources
from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config
from tests.data.reading import documents
from tests.texts import decoded_documents

CODE = "import os\n\n\ndef first():\n    return 1\n\n\ndef second():\n\n    return os.name\n"
PAGE = "# Title\n\nA paragraph.\n\n```\ncode\n\nmore\n```\n"
PROSE = "one\n\ntwo\nstill two\n\nthree\n"


@pytest.fixture
def folder(tmp_path):
    """Source code, Markdown, prose, rows, and files that are no text by their names."""
    folder = tmp_path / "text"
    (folder / "lib").mkdir(parents=True)
    for name in ("a.py", "b.py", "lib/c.rs"):
        (folder / name).write_text(f"# {name}\n{CODE}")
    (folder / "d.js.gz").write_bytes(gzip.compress(f"// d\n{CODE}".encode()))
    (folder / "e.md").write_text(PAGE)
    (folder / "f.txt").write_text(PROSE)
    (folder / "g.csv").write_text('n;text\n1;"a row\n\nof two lines"\n2;another\n')
    for name in ("logo.png", "icon.PNG", "Makefile"):
        (folder / name).write_bytes(b"\x89PNG\0")
    return folder


def whole_files(folder) -> list[str]:
    names = ("a.py", "b.py", "lib/c.rs", "e.md")
    return [f"// d\n{CODE}", *((folder / name).read_bytes().decode() for name in names)]


def test_a_run_says_how_it_cut_and_keeps_what_decided_that(folder, tmp_path, capsys):
    out = tmp_path / "out"
    manifest = prepare(config(folder, out, vocab_size=300, validation_fraction=0))
    printed = capsys.readouterr().out
    assert "4 files, 4 documents, one each: source code; " in printed
    assert "1 file, 1 document, one each: Markdown and other markup" in printed
    assert "1 file, 3 documents divided at blank lines" in printed
    assert "1 file, 2 documents, one in each row" in printed
    assert "left out 3 files, no text by their names: 2 .png, 1 without a suffix" in printed
    expected = [*whole_files(folder), "one", "two\nstill two", "three"]
    expected += ["a row\n\nof two lines", "another"]
    tail = manifest.splits["train"].dropped_tokens
    found = decoded_documents(out, "train")
    assert tail < 32 and not set(found[:-1]) - set(expected) and len(found) >= len(expected) - 2
    assert manifest.arguments["one_document_each"] == ["code", "markdown"]
    assert Manifest.load(out).arguments == manifest.arguments


def test_a_separator_that_is_asked_for_wins(folder, tmp_path, capsys):
    assert sorted(documents(folder / "*.py")) == sorted(
        d.encode() for d in whole_files(folder)[1:3]
    )
    out = tmp_path / "out"
    asked = config(folder, out, document_separator="\\n\\n", vocab_size=300, validation_fraction=0)
    manifest = prepare(asked)
    divided = 4 * 4 + 4 + 3  # each file's parts between blank lines, counted by hand
    assert f"6 files, {divided} documents divided at blank lines" in capsys.readouterr().out
    assert manifest.arguments["one_document_each"] is None
    whole = prepare(config(folder, tmp_path / "whole", vocab_size=300, validation_fraction=0))
    assert whole.fingerprint != manifest.fingerprint
    assert "def second():" in decoded_documents(out, "train")
    with pytest.raises(ForgeError, match="(?s)another dataset.*one_document_each: None there"):
        prepare(config(folder, out, vocab_size=300, validation_fraction=0))


def test_another_separator_divides_code_too(folder):
    found = documents(folder / "a.py", separator="def ", whole_sources=False)
    assert found == [part.encode() for part in f"# a.py\n{CODE}".split("def ")]


def test_one_document_per_file_goes_for_every_text(folder, tmp_path, capsys):
    out = tmp_path / "out"
    asked = config(folder, out, one_document_per_file=True, vocab_size=300, validation_fraction=0)
    prepare(asked)
    assert "6 files, 6 documents, one each; " in capsys.readouterr().out


def test_too_little_text_is_answered_by_how_it_was_divided(folder, tmp_path):
    asked = config(folder / "a.py", tmp_path / "out", sequence_length=1000, vocab_size=300)
    with pytest.raises(ForgeError, match="(?s)too short.*1 document, one each: source code"):
        prepare(asked)


def test_one_file_is_too_few_documents_to_hold_out_some_and_the_fix_works(folder, tmp_path):
    text = folder / "long.md"
    text.write_text(PAGE * 100)
    asked = {"sequence_length": 16, "vocab_size": 300}
    with pytest.raises(
        ForgeError, match=r"(?s)1 document, one.*at blank.*--document-separator '\\n\\n'"
    ):
        prepare(config(text, tmp_path / "out", **asked))
    divided = prepare(config(text, tmp_path / "out", document_separator="\\n\\n", **asked))
    assert divided.splits["validation"].blocks


def test_large_files_are_counted_once(tmp_path):
    (tmp_path / "a.txt").write_text("word\n\n" * 1000)
    (tmp_path / "b.log").write_text("word\n\nword")
    options = ReadOptions(piece_bytes=500)
    parts = sources.find([str(tmp_path / "*")], options).parts
    assert len(parts) > 5
    found = cutting.summary(parts, options, lambda part: 100)
    assert found == f"2 files, {100 * len(parts):,} documents divided at blank lines"
    assert cutting.ways(parts, ReadOptions("--")) == ["divided at '--'"]


def test_many_kinds_of_files_are_left_out_in_few_words():
    suffixes = Counter({f".k{n}": 20 - n for n in range(12)})
    expected = "20 .k0, 19 .k1, 18 .k2, 17 .k3, 16 .k4, 15 .k5, 14 .k6, 13 .k7, 42 others"
    assert cutting.left_out(suffixes).endswith(
        f"left out 174 files, no text by their names: {expected}"
    )
