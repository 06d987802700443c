"""Folders of two starts of a run are never mixed; those without a word of it go with any."""

from __future__ import annotations

import platform

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.run_record import RunRecord, is_token
from p2p_llm_forge.training.starts import agreed_history, agreed_start, new_start, newest_saved
from tests.memory_channel import clusters, run_ranks
from tests.training.saved import writer


def agreed(tmp_path, started, keepers=None, holds=None):
    """What ranks agree on; started: by rank what run.json says, or "" where there is none; holds:
    by rank the step of a checkpoint that is there as well, or None."""
    folders = [tmp_path / f"of {rank}" for rank in range(len(started))]
    holds = holds or [2] * len(started)
    for rank, (folder, token) in enumerate(zip(folders, started, strict=True)):
        folder.mkdir(exist_ok=True)
        if token != "":
            RunRecord({}, frozenset(), token).write(folder)
            (folder / "checkpoint-99").mkdir(exist_ok=True)  # somebody else's
            if holds[rank] is not None:
                checkpoint.complete(folder, holds[rank], writer(holds[rank]))
    keepers = keepers or Keepers(list(range(len(started))))

    def act(cluster):
        return agreed_start(cluster, keepers, folders[cluster.rank])

    with clusters(len(started)) as ranks:
        (found,) = set(run_ranks(ranks, act))
    return found


def test_the_token_of_those_that_have_one_is_that_of_all(tmp_path):
    token = new_start()
    assert is_token(token) and token != new_start()
    assert agreed(tmp_path, [None, token, "", token]) == token


def test_a_new_run_and_one_of_an_older_version_have_none(tmp_path):
    assert agreed(tmp_path, ["", None]) is None


def test_two_starts_are_refused_with_what_to_move_away(tmp_path):
    one, other, here = new_start(), new_start(), platform.node()
    with pytest.raises(ForgeError) as error:
        agreed(tmp_path, ["", one, other, one])
    (problem,) = error.value.problems
    assert problem.found == (
        f"rank 2 ({here}) holds another start of a run in {tmp_path}/of 2 than rank 1 ({here}) in"
        f" {tmp_path}/of 1"
    )
    assert f"mv '{tmp_path}/of 2' '{tmp_path}/of 2.other'; or" in problem.fix
    (tmp_path / "of 2").rename(tmp_path / "of 2.other")
    assert agreed(tmp_path, ["", one, "", one]) == one


def test_the_line_that_moves_a_folder_away_names_it_as_it_is(tmp_path):
    home = tmp_path / ("two  spaces " + "and a long name/" * 60)
    home.mkdir(parents=True)
    with pytest.raises(ForgeError) as error:
        agreed(home, [new_start(), new_start()])
    assert f"move it away: mv '{home}/of 1' '{home}/of 1.other'; or" in error.value.problems[0].fix


def test_a_start_of_which_nothing_was_saved_is_that_of_the_others(tmp_path):
    """As where --overwrite was killed between two machines: there is nothing to mix."""
    one, other = new_start(), new_start()
    assert agreed(tmp_path, [one, other], holds=[None, None]) == one
    assert agreed(tmp_path, [one, other], holds=[None, 4]) == other
    (tmp_path / "of 0" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ForgeError, match="rank 1 .* holds another start"):
        agreed(tmp_path, [one, other], holds=[None, None])


def test_who_keeps_no_folder_is_not_asked(tmp_path):
    one, other = new_start(), new_start()
    assert agreed(tmp_path, [one, other], Keepers([0, 0])) == one


# --- machines that went on apart ------------------------------------------------------------------

T1, T2, T3 = (new_start() for _ in range(3))


def test_a_machine_whose_checkpoint_is_damaged_has_still_gone_on_by_itself(tmp_path):
    folder = tmp_path / "run"
    checkpoint.complete(folder, 4, writer(4))
    (folder / "checkpoint-8").mkdir()
    assert newest_saved(folder) == 4
    (folder / "checkpoint-8" / "manifest.json").write_text("damaged")
    assert newest_saved(folder) == 8


def history(tmp_path, *machines):
    """What ranks agree on; machines: by rank when it was resumed, and the newest step saved."""
    folders = [tmp_path / f"of {rank}" for rank in range(len(machines))]
    for folder, (resumed, newest) in zip(folders, machines, strict=True):
        checkpoint.complete(folder, newest, writer(newest))
        (folder / "checkpoint-99").mkdir()  # somebody else's
        RunRecord({}, frozenset(), T1, resumed).write(folder)

    def act(cluster):
        return agreed_history(cluster, Keepers([*range(len(machines))]), folders[cluster.rank])

    with clusters(len(machines)) as ranks:
        (found,) = set(run_ranks(ranks, act))
    return found


def test_a_machine_that_was_absent_follows_those_that_went_on(tmp_path):
    assert history(tmp_path, ((), 8), (((T2, 8),), 14)) == ((T2, 8),)


def test_a_machine_that_alone_saved_more_is_followed_by_those_that_saved_nothing_since(tmp_path):
    assert history(tmp_path, (((T2, 8),), 8), ((), 16)) == ()
    # Killed between the claims of two folders, the one without a word of it goes on.
    assert history(tmp_path / "b", (((T2, 8), (T3, 12)), 12), (((T2, 8),), 12)) == (
        (T2, 8),
        (T3, 12),
    )


@pytest.mark.parametrize("resumed", [(), ((T3, 8),)])
def test_two_machines_that_both_saved_without_the_other_are_not_mixed(tmp_path, resumed):
    with pytest.raises(ForgeError) as error:
        history(tmp_path, (((T2, 8),), 14), (resumed, 16), (((T2, 8),), 12))
    (first, second) = error.value.problems
    assert "checkpoint-16" in first.found and "checkpoint-14" in first.found
    assert "after step 8 they went on without each other" in first.found
    assert "checkpoint-12" in second.found
    mv = f"mv '{tmp_path}/of 1' '{tmp_path}/of 1.other'"
    assert mv in first.fix and mv in second.fix
