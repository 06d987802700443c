"""What of a checkpoint travels, and what is here already."""

from __future__ import annotations

import errno
import os

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.file_exchange import FileExchange
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.fetched_checkpoint import Delivery, link
from tests.peers.offered_files import damage
from tests.training.begun import IDENTITY, at, begin, begun, machine
from tests.training.saved import WEIGHTS, writer


def delivery(**changes):
    files = {"a": {"size": 5, "sha256": "0" * 64}, "b": {"size": 7, "sha256": "1" * 64}}
    holds = {0: frozenset("a"), 1: frozenset("ab"), 2: frozenset()}
    facts = {"step": 4, "digest": "f" * 64, "files": files, "here": None, "holds": holds}
    return Delivery(**{**facts, "wanting": (0, 2), **changes})


def test_who_has_something_is_a_source_and_what_is_lacking_travels(tmp_path):
    one = delivery()
    assert set(one.sources(0)) == {1} and set(one.sources(2)) == {0, 1}
    assert [one.bytes_for(rank) for rank in range(3)] == [7, 0, 12]
    assert one.partial(tmp_path).name == "tmp-fetched-4-ffffffff"
    assert one.partial(tmp_path) != delivery(digest="e" * 64).partial(tmp_path)


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_here_is_linked_or_copied_in_place_of_what_was(tmp_path, monkeypatch, has_links):
    def fail(*_):
        raise OSError(errno.EPERM, "no links on this file system")

    if not has_links:
        monkeypatch.setattr(os, "link", fail)
    (tmp_path / "a").write_text("new")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "b").write_text("old and longer")
    link(tmp_path / "a", tmp_path / "to" / "b")
    assert (tmp_path / "to" / "b").read_text() == "new"
    assert (tmp_path / "to" / "b").samefile(tmp_path / "a") is has_links


def test_what_came_before_a_kill_is_not_sent_again(tmp_path, monkeypatch):
    folders = [tmp_path / "a", machine(tmp_path / "b", 4)]
    whole = folders[1] / "checkpoint-4"
    partial = []

    def dies(output_dir, step, write, confirm, promised):
        partial.extend(output_dir.glob("tmp-fetched-4-*"))
        raise ForgeError("killed", "start again")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "complete", dies)
        with pytest.raises(ForgeError, match="killed"):
            begin(folders)
    (folder,) = partial
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    before = (folder / WEIGHTS).stat().st_ino
    assert begun(folders) == at(folders, 4)
    assert (folders[0] / "checkpoint-4" / WEIGHTS).stat().st_ino == before


def test_what_has_changed_since_it_came_is_no_checkpoint_until_it_comes_again(
    tmp_path, monkeypatch
):
    folders, fetch = [tmp_path / "a", machine(tmp_path / "b", 4)], FileExchange.fetch

    def change(exchange, files, sources, into, *more, **how):
        fetched = fetch(exchange, files, sources, into, *more, **how)
        if WEIGHTS in files:
            damage(into / WEIGHTS)
        return fetched

    with monkeypatch.context() as patched:
        patched.setattr(FileExchange, "fetch", change)
        with pytest.raises(ForgeError, match=f"{WEIGHTS} of .*checkpoint-4 is not what was sent"):
            begin(folders)
    assert not list(folders[0].glob("*checkpoint-4*"))
    assert begun(folders) == at(folders, 4)  # after the machine was checked


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/optimizer.pt", "modeling.py"])
def test_no_pickle_and_no_program_travels_with_a_checkpoint(tmp_path, name):
    """The machine that sends it has the secret; still, nothing of it is executed here."""
    folders = [tmp_path / "a", machine(tmp_path / "b")]

    def write(folder):
        writer(4, config=IDENTITY)(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    checkpoint.complete(folders[1], 4, write)
    with pytest.raises(ForgeError, match="rank 1 sent what no rank .* may travel"):
        begin(folders)
    assert not list(tmp_path.glob(f"a/**/{name}"))
    shared = [folders[1]] * 2
    assert begun(shared) == at(shared, 4), "where nothing travels it is what it was"
    if name == "modeling.py":
        assert begun(folders, trust_remote_code=True) == at(folders, 4)


def test_a_fetch_that_was_given_up_is_cleared_away_with_the_next_save(tmp_path):
    folder = machine(tmp_path / "a")
    left = delivery().partial(folder)
    left.mkdir()
    (left / "a.part").write_text("half")
    checkpoint.commit(folder, 6, writer(6), TrainConfig())
    assert not left.exists()
