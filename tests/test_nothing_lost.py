"""What others have put into a folder stays as it is, and so does what a run has saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import checkpoint
from prepare_data import prepare
from tests import ROOT
from tests.folders import tree
from tests.runs import TINY_MODEL
from train import train


@pytest.fixture
def config(prepared, tmp_path):
    return TrainConfig(
        dataset_path=str(prepared),
        output_dir=str(tmp_path / "run"),
        config_overrides=TINY_MODEL,
        batch_size=8,
        max_steps=6,
        save_every=3,
        log_every=2,
        lr_scheduler="constant",
        report_to="none",
        cpu_threads=1,
    )


# --- folders of others ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainers_folder(tmp_path_factory):
    """What transformers.Trainer has left, in a process of its own."""
    folder = tmp_path_factory.mktemp("other") / "out"
    program = [sys.executable, "-m", "tests.other_trainer", folder]
    subprocess.run(program, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert {"checkpoint-1", "checkpoint-2", "all_results.json"} <= set(os.listdir(folder))
    return folder


def of_a_trainer(folder, trainers_folder):
    shutil.copytree(trainers_folder, folder)


def a_repository(folder, _):
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "README.md").write_text("a thesis")


def notes_of_a_user(folder, _):
    (folder / "runs" / "2019").mkdir(parents=True)
    (folder / "runs" / "2019" / "diary.txt").write_text("dear diary")
    (folder / "README.md").write_text("mine")


def a_manifest_of_another_program(folder, _):
    saved = folder / "checkpoint-7"
    saved.mkdir(parents=True)
    (saved / "weights.bin").write_bytes(b"\0" * 9)
    manifest = {"format_version": 1, "step": 7, "files": {"weights.bin": {"size": 9}}}
    (saved / "manifest.json").write_text(json.dumps(manifest))


def links(folder, trainers_folder):
    folder.mkdir()
    (folder / "checkpoint-3").symlink_to(trainers_folder)
    (folder / "runs").symlink_to(trainers_folder)
    (folder / "nowhere").symlink_to("gone")


def a_record_of_another_program(folder, _):
    folder.mkdir()
    (folder / "run.json").write_text('{"name": "my run", "wrote": ["notes.txt"]}')
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("settings", [{}, {"resume": "auto"}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize(
    "made",
    [
        of_a_trainer, a_repository, notes_of_a_user, a_manifest_of_another_program, links,
        a_record_of_another_program,
    ],
)  # fmt: skip
def test_a_folder_of_others_is_refused_and_left_alone(
    config, tmp_path, trainers_folder, made, settings
):
    made(tmp_path / "run", trainers_folder)
    before, beyond = tree(tmp_path / "run"), tree(trainers_folder)
    with pytest.raises(ForgeError, match="no run of this program|run.json cannot be read") as error:
        train(replace(config, **settings))
    assert "--overwrite" not in str(error.value), "it would not help"
    assert tree(tmp_path / "run") == before and tree(trainers_folder) == beyond
    assert error.value.problems[0].fix.startswith(("choose another", "give another --output-dir"))
    train(replace(config, output_dir=str(tmp_path / "run" / "new"), max_steps=1, **settings))
    assert {k: v for k, v in tree(tmp_path / "run").items() if not k.startswith("new")} == before


def add_things_of_others(folder, trainers_folder):
    """Puts them into the folder of a run, where they may be; returns how they are."""
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-3" / "notes").mkdir()
    (folder / "checkpoint-3" / "notes" / "a.txt").write_text("of step 3")
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "diary.txt").write_text("dear diary")
    (folder / "tmp-checkpoint-5").mkdir()
    (folder / "tmp-data.1.2").write_text("mine, too")
    (folder / "checkpoint-007").mkdir()
    (folder / "checkpoint-best").symlink_to("checkpoint-6")
    (folder / "checkpoint-4").symlink_to(trainers_folder)
    (folder / "checkpoint-5").write_text("a file")
    shutil.copytree(trainers_folder / "checkpoint-2", folder / "checkpoint-2")
    shutil.copytree(trainers_folder / "checkpoint-1", folder / "checkpoint-500")
    names = ("notes.txt", "runs/diary.txt", "tmp-checkpoint-5", "tmp-data.1.2", "checkpoint-007")
    names += ("checkpoint-best", "checkpoint-4", "checkpoint-5", "checkpoint-3/notes/a.txt")
    names += ("checkpoint-2", "checkpoint-500")
    return lambda: {k: v for k, v in tree(folder).items() if k.startswith(names)}


@pytest.mark.parametrize("again", [{"resume": "auto", "max_steps": 12}, {"overwrite": True}])
def test_what_others_put_into_the_folder_of_a_run_stays(
    config, tmp_path, trainers_folder, again, capsys
):
    config = replace(config, report_to="tensorboard", keep_checkpoints=2)
    train(config)
    theirs = add_things_of_others(tmp_path / "run", trainers_folder)
    before, beyond = theirs(), tree(trainers_folder)
    result = train(replace(config, keep_checkpoints=1, seed=0, **again))
    assert theirs() == before and tree(trainers_folder) == beyond
    last = result.steps
    good = [s for s in checkpoint.steps_saved(tmp_path / "run") if s not in (2, 500, 3)]
    assert good == [last] and checkpoint.damage(tmp_path / "run" / f"checkpoint-{last}") is None
    assert os.listdir(tmp_path / "run" / "checkpoint-3") == ["notes"] or last == 6
    if "resume" in again:
        skipped = capsys.readouterr().err
        for name in ("007: no checkpoint", "-best: it is a link", "-5: it is no folder", "-500: "):
            assert f"checkpoint{name}" in skipped or f"checkpoint-{name}" in skipped, skipped


def test_what_is_in_the_way_of_the_last_checkpoint_is_refused_at_once(
    config, tmp_path, trainers_folder
):
    train(config)
    shutil.copytree(trainers_folder / "checkpoint-1", tmp_path / "run" / "checkpoint-9")
    before = tree(tmp_path / "run")
    with pytest.raises(ForgeError, match="checkpoint-9 is in the way") as error:
        train(replace(config, max_steps=9, resume="auto"))
    assert tree(tmp_path / "run") == before
    assert error.value.problems[0].fix == "move it out of --output-dir"
    (tmp_path / "run" / "checkpoint-9").rename(tmp_path / "elsewhere")
    assert train(replace(config, max_steps=9, resume="auto")).steps == 9


def test_a_readme_and_a_model_of_others_are_not_replaced(config, tmp_path):
    """They were put there while the run was interrupted, say."""
    train(replace(config, max_steps=3))
    folder = tmp_path / "run"
    for name in ("README.md", "model.safetensors", "all_results.json"):
        (folder / name).unlink()
    longer = replace(config, resume="auto")
    (folder / "README.md").write_text("mine")
    checkpoint_3 = (folder / "checkpoint-3").rename(tmp_path / "away")
    with pytest.raises(ForgeError):  # nothing to resume from: a start that takes no names
        train(replace(config, config_overrides="n_layer=2,n_head=3,n_embd=32", resume="auto"))
    checkpoint_3.rename(folder / "checkpoint-3")
    record = json.loads((folder / "run.json").read_text())
    gone = {"README.md", "model.safetensors", "all_results.json"}
    (folder / "run.json").write_text(
        json.dumps({**record, "wrote": sorted(set(record["wrote"]) - gone)})
    )
    (folder / "model.safetensors").write_text("mine")
    with pytest.raises(ForgeError, match="model.safetensors is not of this run") as error:
        train(longer)
    assert (folder / "README.md").read_text() == (folder / "model.safetensors").read_text()
    assert json.loads((folder / "all_results.json").read_text())["steps"] == 6
    assert "move it out" in error.value.problems[0].fix
    (folder / "model.safetensors").rename(tmp_path / "moved")
    assert train(longer).is_published
    assert (folder / "README.md").read_text() == "mine"


def test_a_checkpoint_without_a_run_is_not_trained_over(config, tmp_path):
    train(config)
    (tmp_path / "copy").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "copy" / "checkpoint-6")
    copy = replace(config, output_dir=str(tmp_path / "copy"))
    with pytest.raises(ForgeError, match="checkpoint-6 is there already") as error:
        train(copy)
    assert "--resume auto" in error.value.problems[0].fix
    assert train(replace(copy, resume="auto")).steps == 6


def test_a_refused_start_leaves_no_prepared_text(config, text_file, tmp_path):
    train(config)
    before = tree(tmp_path / "run")
    text = {"dataset_path": str(text_file), "vocab_size": 280, "sequence_length": 32}
    for settings in ({}, {"resume": "auto"}, {"resume": "auto", "seed": 3}):
        with pytest.raises(ForgeError, match="holds (another|this) run"):
            train(replace(config, **text, **settings))
        assert tree(tmp_path / "run") == before
    notes_of_a_user(tmp_path / "other", None)
    with pytest.raises(ForgeError, match="no run of this program"):
        train(replace(config, **text, output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other" / "prepared").exists()


def test_a_prepared_dataset_does_not_replace_things_of_others(text_file, tmp_path):
    folder = tmp_path / "data"
    asked = PrepareConfig(
        [str(text_file)], str(folder), vocab_size=300, sequence_length=32, overwrite=True
    )
    for name in ("train", "tokenizer", "unfinished"):
        (folder / name).mkdir(parents=True)
        (folder / name / "novel.txt").write_text("chapter one")
    (folder / "manifest.json").write_text('{"name": "of a browser extension"}')
    before = tree(folder)
    with pytest.raises(ForgeError, match="holds no prepared dataset|is not of a dataset"):
        prepare(asked)
    assert tree(folder) == before
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ForgeError, match="unfinished/novel.txt"):
        prepare(asked)
    assert (folder / "unfinished" / "novel.txt").read_text() == "chapter one"
    (folder / "unfinished" / "novel.txt").unlink()
    prepare(asked)
    (folder / "train" / "novel.txt").write_text("chapter two")
    before = tree(folder)
    with pytest.raises(ForgeError, match="train/novel.txt"):
        prepare(replace(asked, vocab_size=280))
    assert tree(folder) == before
