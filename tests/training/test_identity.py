"""A folder belongs to one run: another one is refused, and so are files of others."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock
from p2p_llm_forge.peers.preflight import CHECKED
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.identity import (
    claim,
    refuse_another_run,
    refuse_file_of_trackers,
    settings_changed,
)
from p2p_llm_forge.training.run_record import RUN, RunRecord
from tests.folders import tree
from tests.training.saved import writer


def refuse(folder, identity, resume=False, resume_changed=False):
    refuse_another_run(folder, identity, resume, resume_changed)


def test_an_output_directory_belongs_to_one_run(tmp_path):
    identity = {"dataset": "aaa", "model_type": "gpt2"}
    folder = tmp_path / "run"
    refuse(folder, identity)
    claim(folder, identity)
    checkpoint.commit(folder, 10, writer(10), TrainConfig(keep_checkpoints=1))
    with pytest.raises(ForgeError, match="--resume auto"):
        refuse(folder, identity)
    refuse(folder, identity, resume=True)
    other = {"dataset": "bbb", "model_type": "llama"}
    with pytest.raises(ForgeError) as error:
        refuse(folder, other, resume=True)
    assert "dataset: the run has aaa, asked was bbb" in str(error.value)
    assert "model_type: the run has gpt2, asked was llama" in str(error.value)
    assert checkpoint.newest_good(folder)[0] is not None
    claim(folder, other, overwrite=True)
    assert checkpoint.newest_good(folder)[0] is None
    refuse(folder, other, resume=True)


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer.json"])
def test_files_of_others_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ForgeError, match=f"holds {name}, but no run of this program"):
        refuse(tmp_path, {})
    assert (tmp_path / name).read_text() == "mine"


def test_an_output_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ForgeError, match="cannot be written"):
        claim(tmp_path / "file" / "run", {})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_place_of_the_figures_is_refused(tmp_path, overwrite):
    claim(tmp_path, {})
    (tmp_path / "metrics.jsonl").mkdir()
    before = tree(tmp_path)
    with pytest.raises(ForgeError, match="metrics.jsonl is no file of this run") as error:
        claim(tmp_path, {}, overwrite)
    assert error.value.problems[0].fix == "move it out of --output-dir"
    assert tree(tmp_path) == before


def test_a_broken_run_file_is_told(tmp_path):
    (tmp_path / RUN).write_text("")
    with pytest.raises(ForgeError, match="run.json cannot be read"):
        refuse(tmp_path, {}, resume=True)


def test_changes_that_make_sense_are_allowed_by_resume_changed(tmp_path):
    identity = {"dataset": "aaa", "seed": 0, "batch_size": 8, "model_type": "gpt2"}
    claim(tmp_path, identity)
    changed = {**identity, "seed": 1, "dataset": "bbb"}
    with pytest.raises(ForgeError, match="--resume auto --resume-changed") as error:
        refuse(tmp_path, changed, resume=True)
    assert "seed: the run has 0, asked was 1" in str(error.value)
    assert "dataset: the run has aaa, asked was bbb" in str(error.value)
    refuse(tmp_path, changed, resume=True, resume_changed=True)
    other_model = {**changed, "model_type": "llama"}
    with pytest.raises(ForgeError, match="model_type: the run has gpt2, asked was llama"):
        refuse(tmp_path, other_model, resume=True, resume_changed=True)


def test_a_claim_removes_what_killed_writers_have_left(tmp_path):
    for name in (
        "tmp-run.json.17.140",
        "tmp-checkpoint-5-ab12cd34",
        "tmp-rank-00001.safetensors.abcdef01",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "tmp-notes").write_text("mine")
    claim(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "tmp-notes"]


def test_a_check_that_was_killed_is_in_no_runs_way(tmp_path):
    """It may have been killed at any step of taking its lock, or of a training's start."""
    held = Lock(tmp_path / CHECKED, "--output-dir", None)
    held.acquire()
    aside = tmp_path / f"tmp-{CHECKED}-{held.token}"
    aside.mkdir()
    (aside / held.mark.name).touch()
    refuse(tmp_path, {})
    claim(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKED, "run.json"]
    again = Lock(tmp_path / CHECKED, "--output-dir", None)
    assert again.acquire(friends=[held.token]) == held.token, "it may be at work"


def test_settings_that_change_at_a_resume_are_named():
    before = {"learning_rate": 0.1, "seed": 0, "output_dir": "a"}
    now = dict.fromkeys(
        [
            *("lr_scheduler", "warmup_steps", "epochs", "max_steps", "batch_size"),
            *("weight_decay", "max_grad_norm", "mixed_precision", "sync", "compress"),
            *("sync_every", "outer_lr", "outer_momentum", "outer_warmup_rounds", "fragments"),
            *("overlap_steps", "ddp_warmup_steps", "compile"),
        ]
    )
    now |= {"learning_rate": 0.2, "seed": 0, "output_dir": "b"}
    assert settings_changed(before, now) == ["learning_rate: 0.1 -> 0.2"]


def test_what_older_versions_wrote_down_and_nobody_asked_for_has_not_changed():
    now = vars(TrainConfig("data", "run", compile="off"))
    before = {**now, "epochs": 1.0, "lr_scheduler": "cosine", "compile": False}
    assert settings_changed(before, now) == []
    assert settings_changed({**before, "epochs": 2.0}, now) == ["epochs: 2.0 -> 1.0"]


def test_a_long_or_odd_record_leaves_room_for_what_can_be_done(tmp_path):
    own = {"dataset": "aaa", "model_type": "gpt2"}
    odd = {"z" * 20_000: 1, "a\nfix: rm -rf": "b\x1b[2Jc", **{f"k{n}": n for n in range(30)}}
    claim(tmp_path / "run", {**own, "model_type": "x" * 20_000, **odd})
    with pytest.raises(ForgeError) as error:
        refuse(tmp_path / "run", own, resume=True)
    (problem,) = error.value.problems
    assert len(problem.found) < 3000 and problem.found.endswith("\n    and 23 more")
    assert "a fix: rm -rf: the run has bc, asked was None" in problem.found
    assert "--overwrite" in problem.fix
    claim(tmp_path / "run", own, overwrite=True)
    refuse(tmp_path / "run", own, resume=True)


def test_names_that_no_file_can_have_are_in_nobodys_way(tmp_path):
    identity = {"dataset": "aaa"}
    claim(tmp_path, identity)
    wrote = frozenset(["README.md", "x" * 300, "runs/" + "y" * 300])
    RunRecord(identity, wrote).write(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    claim(tmp_path, identity, overwrite=True)
    own = {"metrics.jsonl", "samples.jsonl", "loss.png", "peers.png"}
    assert RunRecord.read(tmp_path).wrote == own
    assert sorted(path.name for path in tmp_path.iterdir()) == [RUN]


def test_a_wrong_name_in_a_record_is_the_one_that_is_shown(tmp_path):
    claim(tmp_path, {})
    RunRecord({}, frozenset([*(f"file-{n}" for n in range(50)), "../theirs"])).write(tmp_path)
    with pytest.raises(ForgeError, match=r"'wrote'\[0\] is '\.\./theirs'"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize("in_the_way", ["a file", "a link to nowhere", "a folder", "nothing"])
def test_what_is_in_the_way_of_trackers_is_refused(tmp_path, in_the_way):
    runs = tmp_path / "runs"
    if in_the_way == "a file":
        runs.write_text("mine")
    elif in_the_way == "a link to nowhere":
        runs.symlink_to("gone")
    elif in_the_way == "a folder":
        runs.mkdir()
    refuse_file_of_trackers(tmp_path, "none")
    if in_the_way in ("a folder", "nothing"):
        return refuse_file_of_trackers(tmp_path, "wandb,tensorboard")
    with pytest.raises(ForgeError, match="runs is no folder, so TensorBoard cannot") as error:
        refuse_file_of_trackers(tmp_path, "wandb,tensorboard")
    assert error.value.problems[0].fix == "move it out of --output-dir, or add --report-to none"
