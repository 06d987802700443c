"""Sources: files, folders, globs and weights; what is not there is named."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents


def test_many_small_files_are_few_parts_and_each_document_its_own(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number}\n\nand more")
    assert len(sources.find([str(tmp_path)], ReadOptions()).parts) == 1
    found = documents(tmp_path)
    assert found[:3] == [b"document 0", b"and more", b"document 1"] and len(found) == 100
    whole = documents(tmp_path, one_document_per_file=True)
    assert whole[7] == b"document 7\n\nand more" and len(whole) == 50


def test_globs_and_folders_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/one.md", "two.md", "a.md", "data.bin"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "**/*.md") == [b"a.md", b"b/one.md", b"two.md"]
    assert documents(tmp_path) == [b"a.md", b"b/one.md", b"two.md"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.bin").write_text("no text")
    with pytest.raises(ForgeError, match="(?s)without text.*glob"):
        documents(tmp_path / "other")
    with pytest.raises(ForgeError, match="no file matches"):
        documents(tmp_path / "*.rst")


def test_an_unreadable_file_in_a_glob_is_named_or_counted(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text("closed")
    right = Path.open

    def refuse(path, *arguments, **names):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return right(path, *arguments, **names)

    with mock.patch.object(Path, "open", refuse):
        with pytest.raises(ForgeError, match="b.txt cannot be read: Permission denied"):
            sources.find([str(tmp_path / "*.txt")], ReadOptions())
        found = sources.find([str(tmp_path / "*.txt")], ReadOptions(skip_bad_rows=True))
    assert found.unreadable == 1 and len(found.parts) == 1


def test_weights_are_read_from_the_paths(tmp_path):
    for name in ("a.txt", "b.txt", "odd:0.5"):
        (tmp_path / name).write_text("text")
    found = sources.find([f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt:1.0"], ReadOptions())
    assert found.weights == (0.75, 0.25)
    assert [part.source for part in found.parts] == [0, 1]
    assert sources.find([f"{tmp_path}/odd:0.5"], ReadOptions()).weights == ()
    with pytest.raises(ForgeError, match="(?s)b.txt has no weight and others have"):
        sources.find([f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt"], ReadOptions())
    with pytest.raises(ForgeError, match="(?s)'0' is no weight.*above 0"):
        sources.find([f"{tmp_path}/a.txt:0", f"{tmp_path}/b.txt:1"], ReadOptions())


@pytest.mark.parametrize("end", ["1e3", "-1", "nan", "inf", "0", "0.0", "half", ""])
def test_what_is_no_weight_is_called_so_and_the_fix_works(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    for paths in ([f"a.txt:{end}", "b.txt:1"], [f"a.txt:{end}"], [f"a.*:{end}", "b.txt:1"]):
        if paths[0].startswith("a.*") and end in ("half", ""):
            continue  # what this is meant for is not known
        with pytest.raises(ForgeError, match=f"{paths[0].replace('*', '.')}: '{end}'") as error:
            sources.find(paths, ReadOptions())
        (problem,) = error.value.problems
        fix = "a weight is a decimal number above 0, as in "
        assert problem.fix.startswith(fix)
        assert sources.find([problem.fix.removeprefix(fix), *paths[1:]], ReadOptions()).parts
    Path(f"a.txt:{end}").write_text("a file of this name")
    assert sources.find([f"a.txt:{end}"], ReadOptions()).weights == ()


def test_a_weight_of_text_that_is_held_out_is_refused_and_the_fix_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("v.txt").write_text("text")
    with pytest.raises(ForgeError, match="--validation-path v.txt:0.2 has a weight") as error:
        sources.find(["v.txt:0.2"], ReadOptions(), validation=True)
    assert error.value.problems[0].fix.startswith("give v.txt, for")
    assert len(sources.find(["v.txt"], ReadOptions(), validation=True).parts) == 1


def test_hidden_files_of_folders_are_left_out_and_counted_and_read_where_they_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name in ("._a.txt", ".DS_Store", ".notes.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    found = sources.find([str(tmp_path)], ReadOptions())
    assert [span.path for part in found.parts for span in part.spans] == [f"{tmp_path}/a.txt"]
    assert found.left_out == {"hidden": 3}
    (tmp_path / "._a.txt").write_text("named")
    assert documents(tmp_path / "._a.txt") == [b"named"]
