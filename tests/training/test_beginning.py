"""The peers begin from the newest checkpoint that is whole among them, and nothing else is lost."""

from __future__ import annotations

import math
import shutil

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.beginning import (
    Candidate,
    candidates,
    digest_of,
    files_of,
    require_saved,
)
from p2p_llm_forge.training.run_record import METRICS, SAMPLES, RunRecord
from p2p_llm_forge.training.starts import new_start
from tests.folders import tree
from tests.training.begun import IDENTITY, START, at, begin, begun, machine
from tests.training.saved import WEIGHTS, writer

GOOD = {"size": 1, "sha256": "0" * 64}  # of a file


def test_who_lacks_the_newest_checkpoint_fetches_it_with_what_belongs_to_the_run(tmp_path):
    """Rank 0 is a new machine, rank 1 was away for a while, rank 2 has it."""
    folders = [tmp_path / "new", machine(tmp_path / "away", 2), machine(tmp_path / "b", 2, 4)]
    for name, last in ((METRICS, '{"step": 4}\n'), (SAMPLES, '{"step": 4, "text": "x"}\n')):
        (folders[2] / name).write_text('{"step": 2}\n' + last)
    RunRecord(IDENTITY, frozenset({METRICS, SAMPLES}), START).write(folders[2])
    assert begun(folders) == at(folders, 4)
    whole = tree(folders[2] / "checkpoint-4")
    assert all(tree(one) == whole for one in at(folders, 4))
    assert all(checkpoint.damage(one) is None for one in at(folders, 4))
    for name in (METRICS, SAMPLES):
        for folder in folders[:2]:  # whichever is lost from then on, the other has it
            assert (folder / name).read_bytes() == (folders[2] / name).read_bytes()
    assert {RunRecord.read(folder).started for folder in folders} == {START}
    assert {"checkpoint-4", METRICS} <= RunRecord.read(folders[0]).wrote


def test_a_checkpoint_whose_files_lie_on_different_machines_is_put_together(tmp_path, capsys):
    folders = [machine(tmp_path / name, 2, 4) for name in "abc"]
    shutil.rmtree(folders[2] / "checkpoint-4")
    (folders[0] / "checkpoint-4" / WEIGHTS).unlink()
    optimizer = folders[1] / "checkpoint-4" / "optimizer.safetensors"
    optimizer.write_bytes(b"\0" * optimizer.stat().st_size)
    assert begun(folders) == at(folders, 4)
    assert all(checkpoint.damage(one) is None for one in at(folders, 4))
    printed = capsys.readouterr().err
    assert f"{folders[0]}/checkpoint-4: {WEIGHTS} is missing; what is good" in printed
    assert f"rank 1: {folders[1]}/checkpoint-4: optimizer.safetensors has changed" in printed


@pytest.mark.parametrize("how", ["missing", "not finite"])
def test_one_that_is_whole_nowhere_is_skipped_with_a_reason(tmp_path, capsys, how):
    folders = [machine(tmp_path / "a", 2), machine(tmp_path / "b", 2)]
    for folder in folders if how == "missing" else folders[1:]:
        fill = 1.0 if how == "missing" else math.nan
        checkpoint.complete(folder, 4, writer(4, fill, config=IDENTITY))
        if how == "missing":
            (folder / "checkpoint-4" / WEIGHTS).unlink()
    before = [tree(folder / "checkpoint-4") for folder in folders[1:]]
    assert begun(folders) == at(folders, 2)
    assert [tree(folder / "checkpoint-4") for folder in folders[1:]] == before
    said = "is missing" if how == "missing" else "holds "
    assert f"skipped rank 1: {folders[1]}/checkpoint-4: " in (found := capsys.readouterr().err)
    assert said in found


def test_that_nobody_has_anything_is_a_new_run(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    assert begun(folders) == [None, None]
    assert not folders[0].exists() and not folders[1].exists()


def test_of_two_versions_of_a_step_all_take_that_of_rank_0(tmp_path):
    folders = [machine(tmp_path / "a", 4), machine(tmp_path / "b", 4, fill=2.0)]
    first = tree(folders[0])
    assert begun(folders) == at(folders, 4)
    assert tree(folders[0]) == first
    assert tree(folders[1] / "checkpoint-4") == tree(folders[0] / "checkpoint-4")


def test_a_shared_folder_is_read_by_rank_0_alone_and_stays_as_it_is(tmp_path):
    folder = machine(tmp_path / "run", 2, 4)
    (folder / "checkpoint-4" / WEIGHTS).unlink()
    before = tree(folder)
    assert begun([folder] * 3) == at([folder] * 3, 2)
    assert tree(folder) == before


def test_who_shares_a_folder_with_another_than_rank_0_finds_there_what_that_one_fetched(tmp_path):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b", tmp_path / "b", tmp_path / "b"]
    assert begun(folders) == at(folders, 4)
    assert tree(folders[1] / "checkpoint-4") == tree(folders[0] / "checkpoint-4")
    old = machine(tmp_path / "old", 2)
    there, nowhere = str(old / "checkpoint-2"), str(tmp_path / "no" / "checkpoint-2")
    found = begin([tmp_path / "c", *folders[1:]], resume=[there, there, nowhere, there])
    elsewhere = folders[1] / "checkpoint-2"
    assert [one.checkpoint for one in found] == [old / "checkpoint-2", *[elsewhere] * 3]


def test_two_starts_are_refused_before_anything_is_fetched(tmp_path):
    folders = [
        machine(tmp_path / "a", 2),
        machine(tmp_path / "b", 4, started=new_start()),
        tmp_path / "new",
    ]
    before = [tree(folder) for folder in folders[:2]]
    with pytest.raises(ForgeError, match=r"rank 1 \(.*\) holds another start of a run in"):
        begin(folders)
    assert [tree(folder) for folder in folders[:2]] == before and not folders[2].exists()


def test_another_run_is_refused_on_every_machine_before_anything_is_fetched(tmp_path):
    folders = [machine(tmp_path / "a", 2), tmp_path / "new", machine(tmp_path / "b", 4)]
    before = [tree(folders[0]), tree(folders[2])]
    with pytest.raises(ForgeError, match="holds another run:") as error:
        begin(folders, seed=7)
    assert [problem.where[:6] for problem in error.value.problems] == ["rank 0", "rank 2"]
    assert [tree(folders[0]), tree(folders[2])] == before and not folders[1].exists()


def test_a_record_of_an_older_version_goes_with_any(tmp_path):
    folders = [machine(tmp_path / "a", 2, started=None), machine(tmp_path / "b", 4)]
    assert begun(folders) == at(folders, 4)


@pytest.mark.parametrize("has_run", [True, False])
def test_what_others_have_put_in_its_place_is_named_with_the_rank_and_stays(tmp_path, has_run):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b"]
    if has_run:
        machine(folders[1])
    (folders[1] / "checkpoint-4").mkdir(parents=True)
    (folders[1] / "checkpoint-4" / "thesis.txt").write_text("mine")
    before = tree(folders[1])
    expected = "is in the way of a checkpoint" if has_run else "holds checkpoint-4, but no run"
    with pytest.raises(ForgeError, match=expected) as error:
        begin(folders)
    assert [problem.where[:6] for problem in error.value.problems] == ["rank 1"]
    assert tree(folders[1]) == before


def test_fetch_never_is_obeyed_until_the_fix_is_followed(tmp_path):
    folders = [machine(tmp_path / "a", 4), machine(tmp_path / "b", 2)]
    with pytest.raises(ForgeError, match="not whole in .*b/checkpoint-4, and --fetch never"):
        begin(folders, fetch="never")
    assert checkpoint.steps_saved(folders[1]) == [2]
    shutil.copytree(*at(folders, 4))  # by hand, as the fix says
    assert begun(folders, fetch="never") == at(folders, 4)


def test_a_folder_that_is_asked_for_is_fetched_by_those_who_do_not_see_it(tmp_path):
    """It lies elsewhere on rank 0, so the others have it as a checkpoint of their own."""
    old = machine(tmp_path / "old", 2, 4)
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    asked = [str(old / "checkpoint-2"), str(tmp_path / "nowhere" / "checkpoint-2"), "auto"]
    found = begin(folders, resume=asked)
    expected = [old / "checkpoint-2", *at(folders[1:], 2)]
    assert [one.checkpoint for one in found] == expected
    assert [one.config.resume for one in found] == list(map(str, expected))
    assert all(tree(one) == tree(old / "checkpoint-2") for one in expected)
    with pytest.raises(ForgeError, match="checkpoint-3: there is no such folder"):
        begin(folders, resume=str(old / "checkpoint-3"))


def test_a_folder_that_is_asked_for_is_that_of_rank_0(tmp_path):
    """Not a newer one, or another version, that somebody else calls so."""
    folders = [machine(tmp_path / "a", 2), machine(tmp_path / "b", 2, 6, fill=2.0)]
    asked = [str(folders[0] / "checkpoint-2"), str(folders[1] / "checkpoint-6")]
    assert [one.checkpoint for one in begin(folders, resume=asked)] == at(folders, 2)
    assert tree(folders[1] / "checkpoint-2") == tree(folders[0] / "checkpoint-2")


@pytest.mark.parametrize("other", ["auto", "checkpoint-6", None])
def test_a_folder_that_rank_0_lacks_is_no_other_that_somebody_has(tmp_path, other):
    folders = [machine(tmp_path / "a", 2), machine(tmp_path / "b", 2, 6)]
    before = [tree(folder) for folder in folders]
    of_other = str(folders[1] / other) if other and "-" in other else other
    with pytest.raises(ForgeError, match="checkpoint-4: there is no such folder"):
        begin(folders, resume=[str(tmp_path / "none" / "checkpoint-4"), of_other])
    assert [tree(folder) for folder in folders] == before
    same = [str(folder / "checkpoint-6") for folder in folders]
    assert [one.checkpoint for one in begin(folders, resume=same)] == at(folders, 6)


@pytest.mark.parametrize("flag", [{"overwrite": True}, {"dry_run": True}, {"resume": None}])
def test_who_resumes_nothing_fetches_nothing(tmp_path, flag):
    folders = [machine(tmp_path / "a", 4), tmp_path / "b"]
    found = begin(folders, **flag)
    assert not any(one.is_agreed or one.checkpoint for one in found)
    assert not folders[1].exists()


@pytest.mark.parametrize("mode", [{}, {"dry_run": True}, {"eval_only": True}], ids=str)
def test_whether_anything_is_resumed_is_the_word_of_rank_0(tmp_path, capsys, mode):
    folders = [machine(tmp_path / "a", 4), machine(tmp_path / "b", 4), tmp_path / "c"]
    here = str(folders[1] / "checkpoint-4")
    found = begin(folders, resume=[None, "auto", here], **mode)
    assert {one.config.resume for one in found} == {None}
    assert not any(one.is_agreed or one.checkpoint for one in found)
    said = "note      ranks 1 and 2 got --resume, rank 0 did not: nothing is resumed\n"
    assert capsys.readouterr().out == said
    found = begin(folders, resume=["auto", None, here], **mode)
    assert {one.config.resume for one in found} == {"auto"}
    assert [one.checkpoint for one in found] == ([None] * 3 if mode else at(folders, 4))


def test_what_is_tried_first():
    one, two = "1" * 64, "2" * 64
    saved = [[[2, one]], [[4, one], [2, two]], [[4, two], [2, two]], [[4, two]]]
    assert candidates(saved) == [
        Candidate(4, two, (2, 3)),
        Candidate(4, one, (1,)),
        Candidate(2, one, (0,)),
        Candidate(2, two, (1, 2)),
    ]


@pytest.mark.parametrize(
    "sent",
    [
        *(None, [], {"a": 1}, {"a": {"size": 1}}, {"a": {"size": -1, "sha256": "0" * 64}}),
        *({f"{one}x": GOOD} for one in ("../", "/", "a/../../")),
        {"manifest.json": GOOD},
    ],
)
def test_what_no_rank_sends_of_a_checkpoint_is_refused(sent):
    """Whoever reaches the store can answer for a rank where there is no secret."""
    digest = digest_of(4, sent) if sent and "x" in "".join(sent) else "0" * 64
    with pytest.raises(ForgeError, match="rank 1 sent what no rank of this program sends"):
        files_of(Candidate(4, digest, (1, 2)), sent)


def test_what_a_rank_sends_of_a_checkpoint_is_taken():
    sent = {"a": GOOD, "b/c": GOOD}
    assert files_of(Candidate(4, digest_of(4, sent), (1,)), sent) == sent
    for wrong in ([[-1, "0" * 64]], [[1]], [[1, "x"]], {}, [["1", "0" * 64]]):
        with pytest.raises(ValueError):
            require_saved(wrong)
    require_saved([[1, "0" * 64]])


@pytest.mark.parametrize("is_behind_on_record", [True, False])
def test_a_machine_that_comes_back_follows_also_if_it_is_killed_before_it_has_claimed_the_run(
    tmp_path, is_behind_on_record
):
    went_on = ((new_start(), 8),)
    kept = machine(tmp_path / "kept", 8, 14, resumed=went_on if is_behind_on_record else ())
    back = machine(tmp_path / "back", 8, resumed=() if is_behind_on_record else went_on)
    for _ in range(2):  # the second finds what the first has fetched, as after a kill
        assert begun([back, kept]) == at([back, kept], 14)
    assert RunRecord.read(back).resumed == RunRecord.read(kept).resumed


def test_a_machine_that_comes_back_takes_over_what_the_run_has_changed_meanwhile(tmp_path):
    went_on = ((new_start(), 8),)
    back = machine(tmp_path / "back", 8, dataset="a" * 64)
    kept = machine(tmp_path / "kept", 8, 14, resumed=went_on, dataset="b" * 64)
    assert begun([back, kept]) == at([back, kept], 14)
    assert RunRecord.read(back).identity == RunRecord.read(kept).identity
    assert RunRecord.read(kept).identity["dataset"] == "b" * 64
