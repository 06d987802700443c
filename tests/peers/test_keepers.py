"""Of the ranks that see one folder one keeps it, and nobody takes it from a rank of its start."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Holder, only_writer
from p2p_llm_forge.peers.keepers import Keepers, keep, kept_by
from tests.memory_channel import clusters, run_ranks


def folders(tmp_path, names):
    """A path for each rank; those of one name lead to one folder, as mounts of a share do."""
    paths = []
    for rank, name in enumerate(names):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / f"rank-{rank}").symlink_to(tmp_path / name)
        paths.append(tmp_path / f"rank-{rank}" / "run.lock")
    return paths


def kept(paths, launch=None):
    """What each rank finds, and which of them hold a lock that the disk confirms."""

    def act(cluster):
        with keep(cluster, paths[cluster.rank], "--output-dir") as (keepers, lock):
            if lock is not None:
                lock.confirm()
            cluster.barrier()
            return keepers, lock is not None

    with clusters(len(paths), **(launch or {})) as ranks:
        found = run_ranks(ranks, act)
    assert not any(path.exists() for path in paths), "all locks are left"
    (keepers,) = {tuple(one.of) for one, _ in found}
    assert [has_lock for _, has_lock in found] == [
        keeper == rank for rank, keeper in enumerate(keepers)
    ]
    return list(keepers)


def test_a_shared_folder_is_kept_by_rank_0(tmp_path):
    assert kept(folders(tmp_path, "aaa")) == [0, 0, 0]


def test_a_process_alone_keeps_its_folder(tmp_path):
    assert kept([tmp_path / "new" / "run.lock"]) == [0]
    assert not (tmp_path / "new").exists(), "nothing was written there"


def test_folders_of_their_own_are_kept_by_their_own(tmp_path):
    assert kept(folders(tmp_path, "abc")) == [0, 1, 2]


@pytest.mark.parametrize("names", ["abb", "abba", "abbcc", "abbbbbbb"])
def test_of_those_that_share_another_folder_one_keeps_it(tmp_path, names):
    """Which one, a race decides: over and over, there is one for each folder."""
    paths = folders(tmp_path, names)
    for _ in range(20):
        keepers = kept(paths)
        by_folder = {}
        for rank, name in enumerate(names):
            by_folder.setdefault(name, set()).add(keepers[rank])
        assert all(len(found) == 1 for found in by_folder.values()), keepers
        assert all(names[keepers[rank]] == names[rank] for rank in range(len(names)))
        assert keepers[0] == 0


def test_who_needs_no_folder_leaves_none_and_waits_for_no_lock(tmp_path):
    paths = [None, *folders(tmp_path, "aab")]

    def act(cluster):
        with keep(cluster, paths[cluster.rank], "--output-dir") as (keepers, lock):
            return keepers.of, lock is not None

    with clusters(4) as ranks:
        (of, _), *others = found = run_ranks(ranks, act)
    assert of in ([0, 1, 1, 3], [0, 2, 2, 3]) and all(one == of for one, _ in others)
    assert [has_lock for _, has_lock in found] == [False, of[1] == 1, of[1] == 2, True]


def test_an_elastic_launch_takes_over_from_its_earlier_starts_and_from_no_rank_of_this_one(
    tmp_path,
):
    """Rank 1 would take the lock of rank 0 for one of an earlier start: they have one run id."""
    paths = folders(tmp_path, "aab")
    for path in {path.resolve() for path in (paths[0], paths[2])}:
        left = replace(Holder.this_process("home"), host="elsewhere", table="elsewhere")
        path.mkdir()
        (path / left.name()).touch()
    assert kept(paths, {"run_id": "home", "is_elastic": True}) == [0, 0, 2]


def test_a_folder_that_another_run_holds_is_named_with_its_rank_and_nothing_is_left(tmp_path):
    paths = folders(tmp_path, "abc")
    with only_writer(paths[1], "--output-dir"), pytest.raises(ForgeError) as error:
        kept(paths)
    (problem,) = error.value.problems
    assert problem.where == f"rank 1 ({platform.node()})"
    assert f"in use by process {os.getpid()}" in problem.found
    assert [os.listdir(path.parent) for path in paths] == [[], [], []]


def test_the_folder_of_rank_0_that_is_in_use_is_said_once(tmp_path):
    paths = folders(tmp_path, "aa")
    with only_writer(paths[0], "--output-dir"), pytest.raises(ForgeError) as error:
        kept(paths)
    assert len(error.value.problems) == 1 and "in use by" in str(error.value)


def test_what_the_keepers_say_of_themselves():
    keepers = Keepers([0, 1, 0, 1])
    assert keepers.ranks == [0, 1] and not keepers.is_shared and Keepers([0, 0]).is_shared
    assert [keepers.keeps(rank) for rank in range(4)] == [True, True, False, False]
    assert keepers.sharing(3) == [1, 3]


@pytest.mark.parametrize("said", [[1, 1], [0, 2], [0, -1], [0, None], [0, 2, 1], [0, True]])
def test_what_no_rank_says_is_refused(said):
    with pytest.raises(ForgeError, match="sent what no rank of this program sends"):
        kept_by(said)
