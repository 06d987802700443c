"""What is only evaluated comes from who has the newest, and no other machine keeps it."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock
from p2p_llm_forge.training import checkpoint, fetching, modes
from p2p_llm_forge.training.lent_model import (
    lent,
    model_files,
    newest_anywhere,
    refuse_two_runs,
    steps_by_rank,
)
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.starts import new_start
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks
from tests.training.begun import IDENTITY, START, machine
from tests.training.saved import WEIGHTS, writer


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, which is empty before and after."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not [*folder.iterdir()]


def config_of(folder, **settings):
    return TrainConfig("data", str(folder), **settings)


def test_a_model_is_lent_for_as_long_as_it_is_read(tmp_path):
    folders = [machine(tmp_path / "a", 2), tmp_path / "b", machine(tmp_path / "c", 2, 4)]
    (folders[0] / "checkpoint-6").mkdir()
    before = [tree(folders[0]), tree(folders[2])]

    def act(cluster):
        steps = steps_by_rank(cluster, folders[cluster.rank])
        with lent(config_of(folders[cluster.rank]), cluster, 4, 2) as path:
            return steps, path, {one.name: one.read_bytes() for one in path.iterdir()}

    with clusters(3) as ranks:
        found = run_ranks(ranks, act)
    saved = folders[2] / "checkpoint-4"
    assert [steps for steps, _, _ in found] == [[[6, 2], [], [4, 2]]] * 3
    assert found[2][1] == saved
    for _, path, files in found[:2]:
        assert set(files) == {WEIGHTS, "config.json"}, "without the state of training"
        assert files[WEIGHTS] == (saved / WEIGHTS).read_bytes()
        assert not path.exists()
    assert [tree(folders[0]), tree(folders[2])] == before and not folders[1].exists()


def borrowed(folders, step=4, lender=0, **settings):
    """What each rank reads of a checkpoint, and of which folder."""

    def act(cluster, folder):
        with lent(config_of(folder, **settings), cluster, step, lender) as path:
            return path, (path / WEIGHTS).read_bytes()

    return on_each(folders, act)


def test_one_rank_of_a_machine_fetches_for_all_of_it(tmp_path, capsys):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b", tmp_path / "c"]
    found = borrowed(folders)
    paths, contents = zip(*found, strict=True)
    assert len(set(contents)) == 1 and paths[0] != paths[1] == paths[2]
    assert re.fullmatch(
        r"checkpoint \S+ kB from rank 0 \(.*\) to rank [12] .*\n", capsys.readouterr().out
    )


def test_what_may_not_travel_is_read_where_it_lies(tmp_path):
    """A tokenizer of another library's, say, beside the weights."""
    folders = [tmp_path / "a", tmp_path / "b"]

    def write(folder):
        writer(4)(folder)
        (folder / "tokens.odd").write_text("of another library")

    checkpoint.complete(folders[0], 4, write)
    shutil.copytree(folders[0], folders[1])
    for machines in (folders[:1], folders):
        assert [path for path, _ in borrowed(machines)] == [
            one / "checkpoint-4" for one in machines
        ]
    shutil.rmtree(folders[1])
    with pytest.raises(ForgeError, match="rank 0"):
        borrowed(folders)


def test_nothing_is_left_by_whoever_has_made_a_folder(tmp_path, temporary, monkeypatch):
    """A rank makes it, and another one gets the lock in it, and fetches."""
    release = Lock.release

    def of_another(lock):
        lock._made = []
        release(lock)

    monkeypatch.setattr(Lock, "release", of_another)
    borrowed([machine(tmp_path / "a", 4), tmp_path / "b"])
    assert not [*temporary.iterdir()]


def test_nothing_is_lent_to_a_machine_that_is_to_fetch_nothing(tmp_path):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b"]
    with pytest.raises(
        ForgeError, match="the checkpoint to evaluate is not whole in .*/b/"
    ) as error:
        borrowed(folders, fetch="never")
    assert "leave --fetch out, or copy the folder there" in str(error.value)
    borrowed(folders)
    shutil.copytree(folders[0], folders[1])
    borrowed(folders, fetch="never")


def test_a_large_model_is_lent_only_if_that_was_asked_for(tmp_path, monkeypatch):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b"]
    monkeypatch.setattr(fetching, "UNASKED", 100)
    with pytest.raises(ForgeError, match="are not fetched unasked") as error:
        borrowed(folders)
    (problem,) = error.value.problems
    assert str(folders[1] / "checkpoint-4") in problem.found
    assert "add --fetch yes on all machines, or copy the folder there" in problem.fix
    borrowed(folders, fetch="yes")
    shutil.copytree(folders[0], folders[1])
    borrowed(folders)


def test_the_fix_of_a_full_disk_for_temporary_files_is_another_one(tmp_path, monkeypatch):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b"]
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda it: usage(it)._replace(free=9))
    with pytest.raises(ForgeError, match="TMPDIR .* has no room for the checkpoint") as error:
        borrowed(folders)
    assert "or set TMPDIR to a folder that has it" in str(error.value)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "another").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another"))
    borrowed(folders)
    assert not [*(tmp_path / "another").iterdir()]


def test_no_pickle_is_lent(tmp_path):
    folders = [machine(tmp_path / "a"), tmp_path / "b"]

    def write(folder):
        writer(4)(folder)
        (folder / "pytorch_model.bin").write_bytes(b"x")

    checkpoint.complete(folders[0], 4, write)
    with pytest.raises(ForgeError, match="rank 0 sent what no rank .* may travel"):
        borrowed(folders)


@pytest.mark.parametrize("what", ["gone", "cut"])
def test_a_checkpoint_that_is_not_whole_is_none(tmp_path, what):
    saved = machine(tmp_path / "a", 2) / "checkpoint-2"
    assert set(model_files(saved)) == {WEIGHTS, "config.json"}
    file = saved / WEIGHTS
    file.unlink() if what == "gone" else file.write_bytes(file.read_bytes()[:-1])
    assert model_files(saved) is None


def on_each(folders, act):
    """What `act` gives on machines with these folders."""
    with clusters(len(folders)) as ranks:
        return run_ranks(ranks, lambda cluster: act(cluster, folders[cluster.rank]))


def spoil(folder, step):
    """Change a byte of the weights, so that only their hash tells; returns where."""
    file = folder / f"checkpoint-{step}" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file.parent


def test_the_newest_good_one_is_found_past_those_that_are_damaged_elsewhere(tmp_path):
    folders = [machine(tmp_path / "a", 8), machine(tmp_path / "b", 8, 12, 16)]
    folders += [machine(tmp_path / "c", 12)]
    spoiled = [spoil(folders[1], 16), spoil(folders[1], 12)]
    found = on_each(folders, newest_anywhere)
    assert [(step, rank) for step, rank, _ in found] == [(12, 2)] * 3, "another lender is asked"
    for line, path in zip(found[0][2], spoiled, strict=True):
        assert line.startswith(f"skipped rank 1: {path}: {WEIGHTS} has changed")
    spoil(folders[2], 12)
    spoil(folders[1], 8)
    assert on_each(folders, newest_anywhere)[0][:2] == (8, 0)

    def read(cluster, folder):
        with lent(config_of(folder), cluster, 8, 0) as path:
            return (path / WEIGHTS).read_bytes()

    assert len(set(on_each(folders, read))) == 1, "nobody reads what is damaged"
    spoil(folders[0], 8)
    assert on_each(folders, newest_anywhere)[0][:2] == (-1, 0)
    shared = on_each([folders[0]] * 2, newest_anywhere)
    assert len(shared[0][2]) == 1, "said once of one folder"


def test_two_runs_are_never_taken_for_one(tmp_path):
    folders = [machine(tmp_path / "a", 8), machine(tmp_path / "b", 12, started=new_start())]
    with pytest.raises(ForgeError, match="rank 1 .* holds another start of a run"):
        on_each(folders, refuse_two_runs)
    for seed, is_refused in ((0, False), (7, True)):
        folder = machine(tmp_path / f"seed {seed}", 12, started=None)
        RunRecord({**IDENTITY, "seed": seed}, frozenset(), None).write(folder)
        if not is_refused:
            on_each([folders[0], folder], refuse_two_runs)
            continue
        with pytest.raises(ForgeError, match="rank 1 holds another run"):
            on_each([folders[0], folder], refuse_two_runs)


def test_what_would_be_refused_is_neither_evaluated_nor_announced(tmp_path):
    """Machines with two starts, with a damaged checkpoint, with another seed, and with a good one;
    a job with all that is looked at."""

    def looked(*folders, **settings):
        def act(cluster, folder):
            config = TrainConfig("data", str(folder), **settings)
            job = SimpleNamespace(cluster=cluster, config=config, output_dir=folder)
            job.identity = lambda: IDENTITY
            return modes.look_elsewhere(job)

        return "".join(on_each(folders, act)[0])

    mine = machine(tmp_path / "mine", 8)
    other = machine(tmp_path / "other", 12, started=new_start())
    shown = looked(mine, other)
    assert "holds another start of a run" in shown and "fetches" not in shown
    assert looked(mine, other, overwrite=True) == ""
    with pytest.raises(ForgeError, match="rank 1 .* holds another start of a run"):
        config = TrainConfig("data", "")
        on_each([mine, other], lambda cluster, folder: evaluated(config, cluster, folder))

    seven = machine(tmp_path / "seven", 12)
    RunRecord({**IDENTITY, "seed": 7}, frozenset(), START).write(seven)
    shown = looked(mine, seven)
    assert "rank 1 (" in shown and "seed: the run has 7, asked was 0" in shown
    assert "fetches" not in shown
    assert looked(seven, seven) == "", "said by rank 0 alone"

    later = machine(tmp_path / "later", 8, 12)
    shown = looked(mine, later)
    assert shown.endswith("saved after step 12; --resume auto fetches it")
    assert looked(mine, later, fetch="never").endswith("fetches it, without --fetch never")
    spoil(later, 12)
    assert looked(mine, later) == ""


def evaluated(config, cluster, folder):
    """What is read of the newest checkpoint of machines with folders of their own."""
    return modes.load_newest(replace(config, output_dir=str(folder)), cluster, None)
