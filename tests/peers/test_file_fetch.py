"""Who brings which piece, what is done about whom, and what is said when nobody can."""

from __future__ import annotations

import re
import resource
import shutil
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import file_fetch, partial_files
from p2p_llm_forge.peers.file_exchange import FileFacts, Watch
from p2p_llm_forge.peers.partial_files import PartialFile
from tests.memory_channel import clusters, run_ranks
from tests.peers.offered_files import MANY_PIECES, damage, made, same


@pytest.fixture
def exchanges():
    with clusters(4) as ranks:
        yield run_ranks(ranks, lambda rank: rank.open_files())


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(partial_files, "PIECE_BYTES", 10_000)


def problems(fetch) -> list[str]:
    with pytest.raises(ForgeError) as raised:
        fetch()
    return [one.found for one in raised.value.problems]


def test_several_sources_bring_pieces_of_one_file(tmp_path, exchanges, monkeypatch):
    """They begin together: on a busy machine one has brought all before another was asked."""
    all_there, connect = threading.Barrier(3), exchanges[3]._connect

    def connected(rank):
        stream = connect(rank)
        all_there.wait(60)
        return stream

    monkeypatch.setattr(exchanges[3], "_connect", connected)
    files = made(tmp_path / "from", {"a": 4 * MANY_PIECES})
    for rank in (0, 1, 2):
        exchanges[rank].offer("key", tmp_path / "from", files)
    fetched = exchanges[3].fetch(files, dict.fromkeys((0, 1, 2), "key"), tmp_path / "into")
    assert min(fetched.bytes_by_rank.values()) > 0
    assert sum(fetched.bytes_by_rank.values()) >= 4 * MANY_PIECES
    assert same(tmp_path / "from", tmp_path / "into", files)


def test_files_that_only_some_have_come_from_those(tmp_path, exchanges):
    files = made(tmp_path / "from", {f"{n}": 1000 * n for n in range(30)})
    exchanges[0].offer("even", tmp_path / "from", [f"{n}" for n in range(0, 30, 2)])
    exchanges[1].offer("odd", tmp_path / "from", [f"{n}" for n in range(1, 30, 2)])
    fetched = exchanges[3].fetch(files, {0: "even", 1: "odd"}, tmp_path / "into")
    assert fetched.bytes_by_rank == {0: sum(range(0, 30, 2)) * 1000, 1: sum(range(1, 30, 2)) * 1000}
    assert same(tmp_path / "from", tmp_path / "into", files)


def test_each_source_that_cannot_bring_a_file_is_named_with_its_reason(tmp_path, exchanges):
    files = made(tmp_path / "from", {"a": 50_000, "b": 3})
    shutil.copytree(tmp_path / "from", tmp_path / "shorter")
    (tmp_path / "shorter/a").write_bytes(b"x")
    exchanges[0].offer("key", tmp_path / "from", ["b"])
    exchanges[1].offer("key", tmp_path / "shorter", files)
    sources = {0: "key", 1: "key", 2: "key"}
    found = problems(lambda: exchanges[3].fetch(files, sources, tmp_path / "into"))
    expected = [
        r"a cannot be fetched from rank 0 \(.*\): it does not have the file",
        r"a cannot be fetched from rank 1 \(.*\): its file is damaged: 1 bytes instead of 50000",
        r"a cannot be fetched from rank 2 \(.*\): it does not offer these files \(any more\)",
    ]
    assert all(re.fullmatch(*pair) for pair in zip(expected, found, strict=True)), found
    # The fix: a whole copy on a machine of this run.
    exchanges[2].offer("key", tmp_path / "from", files)
    exchanges[3].fetch(files, sources, tmp_path / "into")
    assert same(tmp_path / "from", tmp_path / "into", files)


def test_a_file_of_nobody_comes_once_somebody_has_it(tmp_path, exchanges):
    files, into = made(tmp_path / "from", {"a": 50_000}), tmp_path / "into"
    assert problems(lambda: exchanges[3].fetch(files, {}, into)) == [
        "a cannot be fetched: no machine offers it"
    ]
    exchanges[2].offer("key", tmp_path / "from", files)
    exchanges[3].fetch(files, {2: "key"}, into)
    assert same(tmp_path / "from", into, files)


def test_what_is_withdrawn_and_removed_in_the_middle_comes_from_another(tmp_path, exchanges):
    files = made(tmp_path / "from", {"a": 2 * MANY_PIECES})
    shutil.copytree(tmp_path / "from", tmp_path / "pruned")

    class Pruning(Watch):
        def advance(self, count):
            super().advance(count)
            if self.bytes_done > MANY_PIECES and (tmp_path / "pruned").exists():
                exchanges[0].withdraw("key")
                shutil.rmtree(tmp_path / "pruned", ignore_errors=True)

    exchanges[0].offer("key", tmp_path / "pruned", files)
    into = tmp_path / "into"
    (found,) = problems(lambda: exchanges[3].fetch(files, {0: "key"}, into, Pruning()))
    assert re.fullmatch(r"a cannot be fetched from rank 0 .*: it .*", found), found
    exchanges[1].offer("key", tmp_path / "from", files)
    fetched = exchanges[3].fetch(files, {0: "key", 1: "key"}, into)
    assert fetched.bytes_received < 1.5 * MANY_PIECES
    assert same(tmp_path / "from", into, files)


def test_a_partial_file_of_a_damaged_source_harms_no_other(tmp_path, exchanges, small_pieces):
    """What an earlier try has brought is damaged, and by now nobody knows who brought it."""
    files = made(tmp_path / "from", {"a": 95_000})
    shutil.copytree(tmp_path / "from", tmp_path / "damaged")
    damage(tmp_path / "damaged/a")

    class Ending(Watch):
        def advance(self, count):
            super().advance(count)
            self.is_given_up |= self.bytes_done > 70_000

    exchanges[0].offer("key", tmp_path / "damaged", files)
    exchanges[1].offer("key", tmp_path / "from", files)
    with pytest.raises(Exception):  # noqa: B017 (given up, or whole and found to be damaged)
        exchanges[3].fetch(files, {0: "key"}, tmp_path / "into", Ending())
    exchanges[3].fetch(files, {1: "key"}, tmp_path / "into")
    assert same(tmp_path / "from", tmp_path / "into", files)


def test_what_this_machine_loses_is_no_sources_fault(tmp_path, exchanges, small_pieces):
    files, into = made(tmp_path / "from", {"a": 95_000}), tmp_path / "into"

    class Spoiling(Watch):
        """A disk that does not keep what is written to it."""

        def advance(self, count):
            super().advance(count)
            if self.bytes_done > 90_000:
                (into / "a.part").write_bytes(bytes(95_000))

    exchanges[0].offer("key", tmp_path / "from", files)
    (found,) = problems(lambda: exchanges[3].fetch(files, {0: "key"}, into, Spoiling()))
    assert re.fullmatch("a arrives whole and is not what was sent when .* from .*into", found)
    assert not (into / "a").exists()
    exchanges[3].fetch(files, {0: "key"}, into)  # after it was checked
    assert same(tmp_path / "from", into, files)


@pytest.mark.parametrize("count", [1, 1000])
def test_what_no_disk_has_room_for_costs_no_memory(tmp_path, exchanges, count):
    """Sizes come from another machine, and what is noted of each piece takes a byte."""
    files = {f"{n}": FileFacts(2**59, "0" * 64) for n in range(count)}
    tracemalloc.start()
    try:
        (found,) = problems(lambda: exchanges[3].fetch(files, {0: "key"}, tmp_path / "into"))
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()
    assert "has no room for the files to fetch: " in found


def test_more_files_come_than_can_be_open(tmp_path, exchanges):
    files, into = made(tmp_path / "from", {f"{n}": n for n in range(300)}), tmp_path / "into"
    exchanges[0].offer("key", tmp_path / "from", files)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(one.name) for one in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, limits[1]))
    try:
        exchanges[3].fetch(files, {0: "key"}, into)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert same(tmp_path / "from", into, files)


def test_a_piece_that_comes_late_from_a_damaged_source_changes_nothing(
    tmp_path, exchanges, monkeypatch
):
    files, into = made(tmp_path / "from", {"a": 1000}), tmp_path / "into"
    shutil.copytree(tmp_path / "from", tmp_path / "damaged")
    damage(tmp_path / "damaged/a")
    good = (tmp_path / "from/a").read_bytes()
    has_come, is_hashed, was_tried = (threading.Event() for _ in range(3))
    write, publish = PartialFile.write, PartialFile.publish

    def late(file, offset, content, *more):
        """What is damaged comes first, and is written when the other one was hashed."""
        if bytes(content) == good:
            assert has_come.wait(60)
            return write(file, offset, content, *more)
        has_come.set()
        assert is_hashed.wait(60)
        try:
            return write(file, offset, content, *more)
        finally:
            was_tried.set()

    def wait_and_publish(file):
        is_hashed.set()
        assert was_tried.wait(60)
        publish(file)

    monkeypatch.setattr(file_fetch, "LEAST_LATE_S", 0.0)
    monkeypatch.setattr(PartialFile, "write", late)
    monkeypatch.setattr(PartialFile, "publish", wait_and_publish)
    exchanges[0].offer("key", tmp_path / "damaged", files)
    exchanges[1].offer("key", tmp_path / "from", files)
    exchanges[3].fetch(files, {0: "key", 1: "key"}, into)
    assert same(tmp_path / "from", into, files)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "", "a\\b", "b//c", "."])
def test_a_list_from_elsewhere_writes_nothing_outside(tmp_path, exchanges, name):
    files = made(tmp_path / "from", {"a": 3})
    exchanges[0].offer("key", tmp_path / "from", files)
    for wrong in ({name: files["a"]}, {"a": replace(files["a"], sha256="../../x")},
                  {"a": FileFacts(-1, files["a"].sha256)}):  # fmt: skip
        (found,) = problems(lambda: exchanges[3].fetch(wrong, {0: "key"}, tmp_path / "into"))  # noqa: B023
        assert "which cannot be a file of it" in found
    assert not (tmp_path / "into").exists()
    exchanges[3].fetch(files, {0: "key"}, tmp_path / "into")  # of the same version


@pytest.mark.parametrize("is_there", ["a/b/c/folder", "a/b", "a"])
def test_a_place_that_is_taken_is_one_message_before_the_first_byte(tmp_path, exchanges, is_there):
    files, into = made(tmp_path / "from", {"a/b/c": 3}), tmp_path / "into"
    taken = into / is_there
    taken.parent.mkdir(parents=True)
    taken.write_text("of the user")
    exchanges[0].offer("key", tmp_path / "from", files)
    with pytest.raises(ForgeError) as raised:
        exchanges[3].fetch(files, {0: "key"}, into)
    (problem,) = raised.value.problems
    assert problem.found.startswith(f"{into} cannot be written: ")
    assert taken.read_text() == "of the user"
    (moved,) = re.fullmatch("move (.*) away, and start this again", problem.fix).groups()
    shutil.move(moved, tmp_path / "away")
    exchanges[3].fetch(files, {0: "key"}, into)
    assert same(tmp_path / "from", into, files)
