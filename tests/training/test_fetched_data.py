"""Machines that lack a dataset get it from those that have it; nothing else is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.dataset import MANIFEST, open_prepared
from p2p_llm_forge.data.fetched import Found, look, place_for
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import partial_files
from p2p_llm_forge.peers.partial_files import FileFacts, PartialFile
from p2p_llm_forge.training import fetched_data, fetching
from p2p_llm_forge.training.fetched_data import Brought, look_everywhere, what_to_bring
from p2p_llm_forge.training.job import identity_without_data
from p2p_llm_forge.training.run_record import RunRecord
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks
from tests.training.machines import Machines, of_text, on_record, other_data, same_dataset

HALF = 20 * 1024
A, B, OLDER = "a" * 64, "b" * 64, "c" * 64


def dataset(fingerprint=A, manifest=None, is_fetched=False):
    return Found("dataset", "there", fingerprint, manifest or fingerprint, 10, 99, is_fetched)


NOTHING, FILE, OTHER = Found("nothing"), Found("file"), Found("other")


@pytest.mark.parametrize(
    "seen, brought",
    [
        ([dataset(), NOTHING], (A, (0,), (1,))),
        ([NOTHING, dataset(), NOTHING], (A, (1,), (0, 2))),
        ([dataset(), NOTHING, dataset()], (A, (0, 2), (1,))),
        # Of two files that say the same of the same blocks, one is what all get.
        ([dataset(), NOTHING, dataset(A, B)], (A, (0,), (1,))),
        ([dataset(OLDER, is_fetched=True), dataset()], (A, (1,), (0,))),
        # Of two that were fetched either may be the last of its kind.
        ([dataset(B, is_fetched=True), dataset(OLDER, is_fetched=True)], None),
        ([dataset(), dataset()], None),
        ([NOTHING, NOTHING], None),
        ([dataset(), dataset(B), NOTHING], None),  # of which two people think they are the one
        ([dataset(), OTHER, NOTHING], None),
        ([dataset(), FILE, NOTHING], None),
    ],
)
def test_who_brings_what_to_whom(seen, brought):
    found = what_to_bring(seen)
    assert (found and (found.dataset.fingerprint, found.sources, found.lacking)) == brought


def test_what_was_made_for_a_run_that_is_thrown_away_gives_way():
    assert what_to_bring([dataset(), dataset(B)]) is None
    found = what_to_bring([dataset(), dataset(B)], replace_all=True)
    assert found == Brought(dataset(), (0,), (1,), replaces_all=True)


@pytest.fixture
def machines(config, tmp_path):
    return lambda count: Machines(config, tmp_path, count)


@pytest.mark.parametrize("secret", [None, b"of these machines alone"])
@pytest.mark.parametrize("having", [(0,), (1,), (0, 2)])
def test_who_lacks_the_data_fetches_them_whoever_has_them(
    machines, prepared, capsys, having, secret
):
    home = machines(3)
    for rank in having:
        shutil.copytree(prepared, home.data[rank])
    opened = home.open_data(secret)
    for rank in range(3):
        assert same_dataset(prepared, home.data[rank]), rank
        assert opened[rank].path == home.data[rank] and len(opened[rank].train_blocks()) > 9
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("data ")]
    assert all(f"rank {rank} (" in line for rank in range(3)) and " kB" in line
    assert not capsys.readouterr().out, "the second start has nothing to say"
    home.open_data(fetch="never")


def test_of_two_that_see_one_folder_one_fetches(machines, prepared, tmp_path, capsys):
    home = machines(3)
    shutil.copytree(prepared, home.data[0])
    (tmp_path / "share").mkdir()
    for rank in (1, 2):
        home.data[rank].symlink_to(tmp_path / "share")
    home.open_data()
    assert same_dataset(prepared, tmp_path / "share")
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("data ")]
    assert ("to rank 1 (" in line) != ("to rank 2 (" in line)


def test_what_was_fetched_is_replaced_by_what_was_prepared_since(machines, prepared, text_file):
    home = machines(3)
    shutil.copytree(prepared, home.data[0])
    home.open_data()
    before = tree(home.data[0])
    shutil.rmtree(home.data[0])
    newer = other_data(text_file, home.data[0])
    opened = home.open_data()
    assert before != tree(newer)
    assert all(same_dataset(newer, folder) for folder in home.data)
    assert {one.manifest.sequence_length for one in opened} == {16}


def two_versions(machines, prepared, text_file):
    """Two machines that have fetched from a third, which prepared its data again in between, and is
    lost. The second has the newer ones, and the record of a run that was trained on them."""
    home = machines(2)
    source = Machines(home.config, home.homes[0].parent / "lost", 2)
    shutil.copytree(prepared, source.data[0])
    source.open_data()
    source.data[1].rename(home.data[0])
    shutil.rmtree(source.data[0])
    other_data(text_file, source.data[0])
    source.open_data()
    source.data[1].rename(home.data[1])
    newer = open_prepared(home.data[1]).manifest.fingerprint
    for folder, fingerprint in zip(home.homes, (A, newer), strict=True):
        (folder / "run").mkdir()  # of which the first was not there when the run changed its data
        resumed = (("2" * 32, 8),) if fingerprint == newer else ()
        identity = {**identity_without_data(home.config), "dataset": fingerprint}
        RunRecord(identity, started="1" * 32, resumed=resumed).write(folder / "run")
    return home, newer


def test_of_versions_that_were_fetched_the_run_that_is_resumed_gets_its_own(
    machines, prepared, text_file
):
    home, newer = two_versions(machines, prepared, text_file)
    before = tree(home.data[1])
    opened = home.open_data(resume="auto")
    assert [one.manifest.fingerprint for one in opened] == [newer] * 2
    assert tree(home.data[1]) == before


def test_without_a_run_neither_of_two_that_were_fetched_is_thrown_away(
    machines, prepared, text_file
):
    home, newer = two_versions(machines, prepared, text_file)
    shutil.rmtree(home.homes[0] / "run")
    before = [tree(folder) for folder in home.homes]
    with pytest.raises(ForgeError, match="rank 1 has fetched other data .* than rank 0") as error:
        home.open_data()
    assert [tree(folder) for folder in home.homes] == before
    (problem,) = error.value.problems
    assert problem.fix.startswith("move away the one that is out of date")
    home.data[0].rename(home.homes[0] / "kept")
    assert {one.manifest.fingerprint for one in home.open_data()} == {newer}


@pytest.fixture
def between_look_and_lock(monkeypatch):
    """Has something happen when a start has looked into all folders, and locked none yet."""

    def happen(act):
        real = fetched_data.run_errand

        def then(config, cluster, errand):
            if cluster.rank == 1:
                act()
            return real(config, cluster, errand)

        monkeypatch.setattr(fetched_data, "run_errand", then)
        return lambda: monkeypatch.setattr(fetched_data, "run_errand", real)

    return happen


@pytest.mark.parametrize("had_older", [False, True])
def test_what_is_prepared_between_look_and_lock_is_not_replaced(
    machines, prepared, text_file, between_look_and_lock, had_older
):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    other_data(text_file, kept := home.homes[1] / "newer", length=24)
    if had_older:
        other_data(text_file, home.data[1])
        manifest = look(home.data[1]).manifest
        (home.data[1] / "fetched.json").write_text(json.dumps({"manifest": manifest}))

    def prepare_there():
        shutil.rmtree(home.data[1], ignore_errors=True)
        shutil.copytree(kept, home.data[1])

    nothing_happens = between_look_and_lock(prepare_there)
    with pytest.raises(ForgeError, match="has been prepared there since this start") as error:
        home.open_data()
    assert same_dataset(kept, home.data[1])
    (problem,) = error.value.problems
    assert problem.fix == "move it away, and start this again" and "rank 1" in problem.where
    home.data[1].rename(home.homes[1] / "moved away")
    nothing_happens()
    home.open_data()
    assert same_dataset(prepared, home.data[1])


def test_what_comes_into_the_way_between_look_and_lock_stays(
    machines, prepared, between_look_and_lock
):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    between_look_and_lock(lambda: notes_of_somebody(home.data[1]))
    with pytest.raises(ForgeError, match="data: something else has come there since") as error:
        home.open_data()
    assert (home.data[1] / "notes.txt").read_text() and len(os.listdir(home.data[1])) == 1
    assert error.value.problems[0].fix == "move it away, and start this again"


def test_what_all_have_after_all_is_not_fetched(machines, prepared, between_look_and_lock, capsys):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    between_look_and_lock(lambda: shutil.copytree(prepared, home.data[1]))
    home.open_data()
    assert same_dataset(prepared, home.data[1]) and "fetched.json" not in tree(home.data[1])
    assert "data " not in capsys.readouterr().out


def test_a_file_of_somebody_in_a_fetched_dataset_is_moved_before_that_is_replaced(
    machines, prepared, text_file
):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    home.open_data()
    (home.data[1] / "train" / "notes.txt").write_text("mine")
    shutil.rmtree(home.data[0])
    newer = other_data(text_file, home.data[0])
    before = tree(home.data[1])
    with pytest.raises(ForgeError, match=r"holds train/notes\.txt, which is of no data") as error:
        home.open_data()
    assert tree(home.data[1]) == before
    (problem,) = error.value.problems
    assert problem.fix == f"move {home.data[1] / 'train' / 'notes.txt'} away"
    (home.data[1] / "train" / "notes.txt").rename(home.homes[1] / "notes.txt")
    home.open_data()
    assert same_dataset(newer, home.data[1])


def test_what_was_prepared_there_and_is_another_one_is_refused(machines, prepared, text_file):
    home = machines(3)
    shutil.copytree(prepared, home.data[0])
    other_data(text_file, home.data[1])
    before = tree(home.homes[1])
    with pytest.raises(ForgeError, match="rank 1 has other data .* than rank 0") as error:
        home.open_data()
    assert len(error.value.problems) == 1
    assert tree(home.homes[1]) == before and not home.data[2].exists()
    shutil.rmtree(home.data[1])  # as its fix says: rank 0's folder is to be there
    shutil.copytree(home.data[0], home.data[1])
    home.open_data()


@pytest.mark.parametrize("is_fetched", [True, False])
def test_data_prepared_since_give_way_to_those_of_the_run_that_goes_on(
    machines, prepared, text_file, is_fetched
):
    home, newer = two_versions(machines, prepared, text_file)
    if not is_fetched:
        (home.data[1] / "fetched.json").unlink()
    shutil.rmtree(home.data[0])
    other_data(text_file, home.data[0], length=24)
    before = tree(home.data[1])
    with pytest.raises(ForgeError, match="rank 0 has prepared other data .* go on") as error:
        home.open_data(resume="auto")
    (problem,) = error.value.problems
    assert problem.fix.startswith("on rank 0, move that folder away")
    home.data[0].rename(home.homes[0] / "kept")
    opened = home.open_data(resume="auto")
    assert [one.manifest.fingerprint for one in opened] == [newer] * 2
    assert tree(home.data[1]) == before


def test_never_fetches_nothing(machines, prepared):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    with pytest.raises(ForgeError, match="no such folder") as error:
        home.open_data(fetch="never")
    (problem,) = error.value.problems
    assert problem.where.startswith("rank 1 (") and not os.listdir(home.homes[1])
    assert "; rank 0 (" in problem.found and "--fetch never brings nothing" in problem.found
    assert "leave --fetch never out on all machines" in problem.fix
    home.open_data()


def test_never_says_who_has_newer_data(machines, prepared, text_file):
    home = machines(2)
    shutil.copytree(prepared, home.data[1])
    home.open_data()
    shutil.rmtree(home.data[1])
    other_data(text_file, home.data[1])
    with pytest.raises(ForgeError, match=r"not the data of the others; rank 1 \(") as error:
        home.open_data(fetch="never")
    assert error.value.problems[0].where.startswith("rank 0 (")


def test_what_a_run_is_refused_for_is_known_before_its_data_travel(machines, prepared):
    home = machines(2)
    shutil.copytree(prepared, home.data[1])
    (home.homes[0] / "run").mkdir()
    (home.homes[0] / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ForgeError, match=r"run holds thesis\.tex"):
        home.open_data()
    assert os.listdir(home.homes[0]) == ["run"]


def test_a_dry_run_says_what_would_be_fetched_and_writes_nothing(machines, prepared):
    home = machines(3)
    shutil.copytree(prepared, home.data[0])
    with pytest.raises(ForgeError, match="--dry-run fetches nothing") as error:
        home.open_data(dry_run=True)
    found = [one.found for one in error.value.problems]
    assert len(found) == 2 and all("from rank 0 (" in one for one in found)
    assert "to rank 1 (" in found[0] and str(home.data[2]) in found[1]
    assert [os.listdir(folder) for folder in home.homes] == [["data"], [], []]
    home.open_data()  # as its fix says, without it
    home.open_data(dry_run=True)


def test_where_nobody_has_the_data_that_is_said_once(machines):
    home = machines(3)
    home.data = [home.homes[0].parent / "on no machine"] * 3
    with pytest.raises(ForgeError, match="on no machine: no such folder") as error:
        home.open_data()
    (problem,) = error.value.problems
    assert "prepare_data.py --dataset-path TEXT" in problem.fix and not problem.where


def test_a_misspelt_text_is_one_in_an_elastic_launch_too(machines, text_file):
    home = machines(1)
    shutil.copy(text_file, home.homes[0] / "corpus.txt")
    home.data = [home.homes[0] / "corpus.tx"]
    with pytest.raises(ForgeError) as error:
        home.open_data(launch={"is_elastic": True})
    assert "did you mean" in error.value.problems[0].fix
    home.data = [home.homes[0] / "other.txt"]
    with pytest.raises(ForgeError, match="the only machine that is here lacks it"):
        home.open_data(launch={"is_elastic": True})
    with pytest.raises(ForgeError, match="no such file"):
        home.open_data(launch={"is_elastic": True}, fetch="never")


@pytest.mark.parametrize("count, said", [(1, "the only machine that is"), (2, "none of the 2")])
def test_an_elastic_launch_can_wait_for_the_machine_that_has_the_data(
    machines, prepared, count, said
):
    home = machines(count + 1)
    home.count = count
    with pytest.raises(ForgeError, match=said) as error:
        home.open_data(launch={"is_elastic": True})
    assert f" --min-peers {count + 1} before train.py on the main" in error.value.problems[0].fix
    home.count += 1
    shutil.copytree(prepared, home.data[count])
    home.open_data(launch={"is_elastic": True})


def notes_of_somebody(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def files_like_ours(folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "data-00000-of-00001.arrow").write_bytes(b"mine")


def a_preparation_that_was_killed(folder: Path) -> None:
    (folder / "unfinished" / "pieces").mkdir(parents=True)
    (folder / "unfinished" / "pieces" / "0-0.tokens").write_bytes(b"hours of work")


def a_file(folder: Path) -> None:
    folder.write_text("a text, say")


def a_link_to_nothing(folder: Path) -> None:
    folder.symlink_to("nowhere")


def a_damaged_manifest(folder: Path) -> None:
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    "something, said",
    [
        (notes_of_somebody, "is not a prepared dataset: found no manifest.json"),
        (files_like_ours, "is not a prepared dataset: found no manifest.json"),
        (a_preparation_that_was_killed, "found a preparation that did not finish"),
        (a_file, "is a file, and a prepared dataset is a folder"),
        (a_link_to_nothing, "is a link to nothing"),
        (a_damaged_manifest, "cannot be read as a manifest"),
    ],
)
def test_a_path_that_is_something_else_is_left_as_it_is_until_it_is_moved(
    machines, prepared, something, said
):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    something(home.data[1])
    before = tree(home.homes[1])
    with pytest.raises(ForgeError) as error:
        home.open_data()
    (problem,) = error.value.problems
    assert str(home.data[1]) in problem.found and said in problem.found
    assert problem.where.startswith("rank 1 (")
    assert problem.fix.startswith("move it away, and the data come from rank 0 (")
    assert tree(home.homes[1]) == before
    home.data[1].rename(home.homes[1] / "kept")  # as the fix says
    home.open_data()
    assert same_dataset(prepared, home.data[1])


def test_a_copy_by_hand_that_was_interrupted_is_seen_and_can_be_replaced(machines, prepared):
    home = machines(2)
    for folder in home.data:
        shutil.copytree(prepared, folder)
    shutil.rmtree(home.data[0] / "train")
    before = tree(home.data[0])
    with pytest.raises(ForgeError, match="that is not whole: it lacks train/") as error:
        home.open_data(fetch="never")
    (problem,) = error.value.problems
    assert problem.fix.startswith("move it away, and copy the folder of rank 1 (")
    with pytest.raises(ForgeError, match="that is not whole") as error:
        home.open_data()
    assert error.value.problems[0].fix.startswith("move it away, and the data come from rank 1 (")
    assert tree(home.data[0]) == before
    home.data[0].rename(home.homes[0] / "kept")
    home.open_data()
    assert same_dataset(prepared, home.data[0])


@pytest.fixture
def half_fetched(machines, prepared, monkeypatch):
    """Two machines, of which the first has the data, and the second what has come of them until
    a kill: the tokenizer, and the first HALF bytes of the blocks."""
    monkeypatch.setattr(partial_files, "PIECE_BYTES", 1024)
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    found = look(prepared)
    place = place_for(home.data[1], found.manifest)
    shutil.copy(prepared / MANIFEST, place)
    shutil.copytree(prepared / "tokenizer", place / "tokenizer")
    (blocks,) = (prepared / "train").glob("*.arrow")
    content = memoryview(blocks.read_bytes())
    (place / "train").mkdir()
    sha256 = hashlib.sha256(content).hexdigest()
    partial = PartialFile(place / "train" / blocks.name, FileFacts(len(content), sha256))
    partial.open()
    assert partial.count > HALF // 1024
    for piece in range(HALF // 1024):
        offset, size = partial.span(piece)
        partial.write(offset, content[offset : offset + size])
        partial.note(piece)
    partial.close()
    return home


def test_what_has_come_before_a_kill_is_not_announced_again(half_fetched, prepared, capsys):
    manifest = open_prepared(prepared).manifest
    missing = sum(
        facts["bytes"] - (HALF if name.startswith("train/") and name.endswith(".arrow") else 0)
        for name, facts in manifest.files.items()
        if not name.startswith("tokenizer/")
    )
    half_fetched.open_data()
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("data ")]
    assert f" {round(missing / 1000)} kB " in line, missing
    assert same_dataset(prepared, half_fetched.data[1])


def test_what_has_come_of_a_dataset_is_not_taken_for_a_preparation_nor_lost_by_one(
    half_fetched, prepared, text_file
):
    folder = half_fetched.data[1]
    pieces = folder / "unfinished" / "pieces"
    pieces.mkdir()
    with pytest.raises(ForgeError, match="found a preparation that did not finish"):
        open_prepared(folder)
    pieces.rmdir()
    before = tree(folder / "unfinished")
    with pytest.raises(ForgeError, match="one that has not come whole from another") as error:
        open_prepared(folder)
    assert "start train.py together with the machine that has it" in error.value.problems[0].fix
    with pytest.raises(ForgeError):  # without any document to validate on
        prepare(PrepareConfig([str(text_file)], str(folder), vocab_size=300, sequence_length=10**6))
    after = tree(folder / "unfinished")
    assert {name: after[name] for name in before} == before
    half_fetched.open_data()  # as the fix says
    assert same_dataset(prepared, folder)


def of_another_version(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 3'))


def test_a_dataset_of_another_version_is_refused_where_it_was_prepared(machines, prepared):
    home = machines(2)
    for folder in home.data:
        shutil.copytree(prepared, folder)
    of_another_version(home.data[1])
    before = tree(home.data[1])
    with pytest.raises(ForgeError, match="format version 3, this program reads 4") as error:
        home.open_data()
    assert "rank 1" in error.value.problems[0].where
    assert tree(home.data[1]) == before


def test_a_fetched_dataset_of_another_version_is_replaced(machines, prepared):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    home.open_data()
    of_another_version(home.data[1])  # and the note of the version that fetched it
    sha256 = hashlib.sha256((home.data[1] / MANIFEST).read_bytes()).hexdigest()
    (home.data[1] / "fetched.json").write_text(f'{{"manifest": "{sha256}"}}')
    home.open_data()
    assert same_dataset(prepared, home.data[1])


def test_more_than_10_gb_is_fetched_only_if_it_was_asked_for(machines, prepared, monkeypatch):
    assert fetching.UNASKED == 10 * 10**9
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    size = sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file())
    monkeypatch.setattr(fetching, "UNASKED", size - 1)
    with pytest.raises(ForgeError, match="more than .* are not fetched unasked") as error:
        home.open_data()
    (problem,) = error.value.problems
    assert fetching.size_in_words(size) in problem.found and "rank 1 (" in problem.found
    assert "add --fetch yes" in problem.fix and not home.data[1].exists()
    home.open_data(fetch="yes")
    assert same_dataset(prepared, home.data[1])


def test_the_fix_of_what_cannot_be_written_is_another_folder(machines, prepared):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    name = look(prepared).manifest[:20]
    (home.data[1] / "unfinished").mkdir(parents=True)
    (home.data[1] / "unfinished" / f"fetched-{name}").write_text("in the way")
    with pytest.raises(ForgeError, match="data cannot be written: File exists") as error:
        home.open_data()
    (problem,) = error.value.problems
    assert problem.fix == "make it writable, or give another folder" and "rank 1" in problem.where
    home.data[1] = home.homes[1] / "another"
    home.open_data()


def test_the_fix_of_what_cannot_be_read_is_another_folder(machines, prepared):
    home = machines(2)
    shutil.copytree(prepared, home.data[0])
    home.data[1].mkdir()
    (home.data[1] / MANIFEST).symlink_to("/proc/self/mem")
    with pytest.raises(ForgeError, match="data cannot be read: Input/output error") as error:
        home.open_data()
    assert error.value.problems[0].fix == "make it readable, or give another folder"
    home.data[1] = home.homes[1] / "another"
    home.open_data()


# --- a text as --dataset-path ---------------------------------------------------------------------


@pytest.mark.parametrize("having", [(0,), (2,), (0, 1)])
def test_a_text_is_prepared_by_one_and_what_it_became_is_fetched_by_the_others(
    machines, text_file, having, capsys
):
    home = of_text(machines, text_file, having)
    home.open_data(vocab_size=300)
    first, *others = [folder / "run" / "prepared" for folder in home.homes]
    made = home.homes[having[0]] / "run" / "prepared"
    assert open_prepared(first).train_blocks() and "fetched.json" not in tree(made)
    assert all(same_dataset(made, folder) for folder in (first, *others))
    assert capsys.readouterr().out.count("prepared ") == 1
    for rank, path in enumerate(home.data):
        assert path.exists() == (rank in having), "the text itself need not travel"


def test_a_text_that_no_machine_has_any_more_is_not_missed_by_its_run(machines, text_file, capsys):
    home = of_text(machines, text_file, (0,))
    made = home.open_data(vocab_size=300)[0].manifest.fingerprint
    on_record(home, made)
    shutil.rmtree(home.homes[0])  # the main machine, with its text and its folder
    home.homes[0].mkdir()
    opened = home.open_data(vocab_size=300, resume="auto")
    assert len({one.manifest.fingerprint for one in opened}) == 1
    assert f"{home.data[0]} is on no machine" in capsys.readouterr().out
    # But what was made of another text is not taken for it.
    home.data = [path.with_name("other.txt") for path in home.data]
    with pytest.raises(ForgeError, match=r"other\.txt: no such file"):
        home.open_data(vocab_size=300, resume="auto")


def test_the_output_folder_of_another_run_is_not_written_into(machines, text_file):
    home = of_text(machines, text_file, (0,), count=2)
    (home.homes[1] / "run").mkdir()
    (home.homes[1] / "run" / "thesis.tex").write_text("mine")
    before = tree(home.homes[1])
    with pytest.raises(ForgeError, match=r"run holds thesis\.tex"):
        home.open_data(vocab_size=300)
    assert tree(home.homes[1]) == before


def test_a_run_that_throws_the_one_before_away_replaces_what_that_was_made_of(machines, text_file):
    home = of_text(machines, text_file, (0,), count=2)
    other = home.homes[1] / "run" / "prepared"
    other_data(text_file, other)
    with pytest.raises(ForgeError, match="rank 1 has other data"):
        home.open_data(vocab_size=300)
    opened = home.open_data(vocab_size=300, overwrite=True)
    assert {one.manifest.sequence_length for one in opened} == {256}


def a_text_that_rank_0_had_once(machines, text_file, count=3):
    """Rank 0 has prepared one and has it no more; rank 1 has the one that counts."""
    home = of_text(machines, text_file, (1,), count=count)
    home.data[1].write_bytes(text_file.read_bytes()[: text_file.stat().st_size // 2])
    older = other_data(text_file, home.homes[0] / "run" / "prepared", length=256)
    return home, older


def test_the_text_that_is_there_counts_where_a_run_is_thrown_away(machines, text_file):
    home, older = a_text_that_rank_0_had_once(machines, text_file)
    before = open_prepared(older).manifest.fingerprint
    opened = home.open_data(vocab_size=300, overwrite=True)
    alone = PrepareConfig([str(home.data[1])], str(home.homes[1] / "alone"), vocab_size=300)
    prepare(replace(alone, sequence_length=256))
    wanted = open_prepared(home.homes[1] / "alone").manifest.fingerprint
    assert {one.manifest.fingerprint for one in opened} == {wanted} != {before}


@pytest.mark.parametrize("is_fetched", [False, True])
def test_data_of_another_text_are_moved_away_and_those_of_the_text_that_is_there_come(
    machines, text_file, is_fetched
):
    home, older = a_text_that_rank_0_had_once(machines, text_file)
    if is_fetched:  # what the text becomes, by a machine that is gone
        prepare(
            PrepareConfig(
                [str(home.data[1])],
                str(made := home.homes[1] / "run" / "prepared"),
                vocab_size=300,
                sequence_length=256,
            )
        )
        (made / "fetched.json").write_text(json.dumps({"manifest": look(made).manifest}))
    with pytest.raises(ForgeError, match="rank 0 has other data .* than rank 1 ") as error:
        home.open_data(vocab_size=300)
    (problem,) = error.value.problems
    assert problem.fix.startswith("on rank 0, move that folder away: what rank 1 has made of")
    before = tree(older)
    older.rename(home.homes[0] / "kept")  # as the fix says
    opened = home.open_data(vocab_size=300)
    assert len({one.manifest.fingerprint for one in opened}) == 1
    assert same_dataset(home.homes[1] / "run" / "prepared", older) or is_fetched
    assert tree(home.homes[0] / "kept") == before


def test_without_fetching_the_data_of_the_text_that_is_there_are_copied(machines, text_file):
    home, older = a_text_that_rank_0_had_once(machines, text_file, count=2)
    with pytest.raises(ForgeError, match="rank 0 has other data .* than rank 1 ") as error:
        home.open_data(vocab_size=300, fetch="never")
    assert "that folder away" in (fix := error.value.problems[0].fix)
    assert fix.endswith("(with --fetch never, copy it there)")
    older.rename(home.homes[0] / "kept")
    shutil.copytree(home.homes[1] / "run" / "prepared", older)
    home.open_data(vocab_size=300, fetch="never")


def test_what_a_rank_says_of_its_data_is_read_with_care(tmp_path):
    def act(cluster):
        with contextlib.suppress(ForgeError):
            return look_everywhere(cluster, tmp_path / "nothing")

    with clusters(2) as ranks:
        for seen in run_ranks(ranks, act):
            assert [one.kind for one in seen] == ["nothing", "nothing"]
