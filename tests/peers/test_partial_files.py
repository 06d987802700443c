"""What has come of a file stays, and nothing else counts."""

from __future__ import annotations

import hashlib
import os

import pytest

from p2p_llm_forge.peers import partial_files
from p2p_llm_forge.peers.partial_files import FileFacts, PartialFile, bytes_missing

CONTENT = os.urandom(95)
FACTS = FileFacts(95, hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(partial_files, "PIECE_BYTES", 10)


def opened(path, facts=FACTS):
    file = PartialFile(path, facts)
    file.look()
    file.open()
    return file


def bring(file, *pieces):
    for piece in pieces:
        offset, size = file.span(piece)
        file.write(offset, memoryview(CONTENT)[offset : offset + size])
        file.note(piece)


def test_pieces_come_in_any_order_over_several_tries(tmp_path):
    path = tmp_path / "sub/a"
    for number, pieces in enumerate([(9, 1), (), (0, 5, 4), (2, 3, 6, 7, 8)]):
        file = opened(path)
        assert file.was_begun == (number > 0)
        bring(file, *pieces)
        file.close()
        assert not path.exists()
    file = opened(path)
    assert file.bytes_missing() == 0 and file.digest(lambda piece: None) == FACTS.sha256
    file.publish()
    assert path.read_bytes() == CONTENT and [*path.parent.iterdir()] == [path]
    assert PartialFile(path, FACTS).is_whole()


def test_what_is_missing_of_several_files_is_counted_by_pieces(tmp_path):
    file = opened(tmp_path / "begun")
    bring(file, 9, 1)  # of which the last one has 5 bytes
    file.close()
    (tmp_path / "whole").write_bytes(CONTENT)
    (tmp_path / "longer").write_bytes(CONTENT + b"more")
    files = dict.fromkeys(("begun", "whole", "longer", "nowhere/at all"), FACTS)
    assert bytes_missing(tmp_path, files) == 95 - 15 + 0 + 95 + 95


def spoil_record(path):
    path.with_name("a.part.pieces").write_bytes(b"something else")


def shorten_record(path):
    record = path.with_name("a.part.pieces")
    record.write_bytes(record.read_bytes()[:-1])


def remove_part(path):
    path.with_name("a.part").unlink()


@pytest.mark.parametrize("harm", [spoil_record, shorten_record, remove_part])
def test_what_cannot_be_known_comes_again(tmp_path, harm):
    path = tmp_path / "a"
    file = opened(path)
    bring(file, 1, 2)
    file.close()
    harm(path)
    file = opened(path)
    assert file.bytes_missing() == 95 and not file.was_begun
    bring(file, *range(10))
    assert file.digest(lambda piece: None) == FACTS.sha256


def test_pieces_beyond_the_end_of_what_is_there_come_again(tmp_path):
    file = opened(tmp_path / "a")
    bring(file, 0, 5)
    file.close()
    with (tmp_path / "a.part").open("r+b") as part:
        part.truncate(55)
    file = opened(tmp_path / "a")
    assert file.bytes_missing() == 85


def test_another_content_begins_from_scratch(tmp_path):
    file = opened(tmp_path / "a")
    bring(file, *range(10))
    file.close()
    other = FileFacts(95, hashlib.sha256(b"another").hexdigest())
    assert opened(tmp_path / "a", other).bytes_missing() == 95


def test_only_the_same_content_is_whole(tmp_path):
    for content in (CONTENT[:-1], CONTENT + b"x", bytes(95)):
        (tmp_path / "a").write_bytes(content)
        assert not PartialFile(tmp_path / "a", FACTS).is_whole()
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    assert not PartialFile(tmp_path / "a", FACTS).is_whole()


def test_what_a_kill_before_the_last_step_leaves_is_tidied(tmp_path):
    file = opened(tmp_path / "a")
    bring(file, *range(10))
    record = (tmp_path / "a.part.pieces").read_bytes()
    file.publish()
    (tmp_path / "a.part.pieces").write_bytes(record)
    file = PartialFile(tmp_path / "a", FACTS)
    assert file.is_whole()
    file.tidy()
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize(
    "facts",
    [(-1, "0" * 64), (2**60, "0" * 64), (1.0, "0" * 64), (1, "x" * 64), (1, "0" * 63 + "\n")],
)
def test_facts_of_no_file_are_not_valid(facts):
    assert FACTS.is_valid() and not FileFacts(*facts).is_valid()
