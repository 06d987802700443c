"""What others have put into a folder stays as it is, and so does what a run has saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import checkpoint
from prepare_data import prepare
from tests import ROOT
from tests.folders import tree
from train import TrainResult, train


@pytest.fixture
def config(config):
    """The same run, whatever its length."""
    return replace(config, lr_scheduler="constant")


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


@pytest.mark.parametrize("again", [{"resume": "auto"}, {"overwrite": True}], ids=str)
def test_a_file_in_the_way_of_tensorboard_is_refused_before_training(config, tmp_path, again):
    train(replace(config, max_steps=3))
    (tmp_path / "run" / "runs").write_text("mine")
    before = tree(tmp_path / "run")
    shown = replace(config, report_to="tensorboard", **again)
    with pytest.raises(ForgeError, match="runs is no folder") as error:
        train(shown)
    assert tree(tmp_path / "run") == before
    assert error.value.problems[0].fix == "move it out of --output-dir, or add --report-to none"
    assert train(replace(shown, report_to="none")).steps == 6
    (tmp_path / "run" / "runs").rename(tmp_path / "elsewhere")
    assert train(replace(shown, resume="auto", overwrite=False, max_steps=7)).steps == 7


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


def test_overwriting_a_run_on_a_text_prepares_it_again_where_it_differs(
    config, text_file, tmp_path
):
    text = {"dataset_path": str(text_file), "vocab_size": 300, "sequence_length": 32}
    asked = replace(config, max_steps=1, **text)
    train(asked)
    prepared = tmp_path / "run" / "prepared"
    (prepared / "notes.md").write_text("mine")
    written = (prepared / "manifest.json").stat().st_mtime_ns
    train(replace(asked, overwrite=True))
    assert (prepared / "manifest.json").stat().st_mtime_ns == written, "the same text is found"
    train(replace(asked, vocab_size=280, overwrite=True))
    assert json.loads((prepared / "manifest.json").read_text())["vocab_size"] == 280
    assert (prepared / "notes.md").read_text() == "mine"


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


# --- what is saved is finite ----------------------------------------------------------------------

RUINOUS = {"learning_rate": 1e38, "save_every": 1, "keep_checkpoints": 1, "log_every": 100}
OF_ROUNDS = {"sync": "diloco", "sync_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}


@pytest.mark.parametrize("strategy", [{}, {**OF_ROUNDS, "outer_warmup_rounds": 0}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rate_that_ruins_the_weights_costs_no_good_checkpoint(config, strategy, optimizer):
    config = replace(config, optimizer=optimizer, **strategy)
    train(replace(config, max_steps=3))
    folder = Path(config.output_dir)
    before = tree(folder / "checkpoint-3")
    longer = replace(config, resume="auto", max_steps=8)
    with pytest.raises(ForgeError, match="NaN or infinite|too large to compute with") as error:
        train(replace(longer, **RUINOUS))
    assert tree(folder / "checkpoint-3") == before and not list(folder.glob("tmp-*"))
    found, skipped = checkpoint.newest_good(folder)
    assert found == folder / "checkpoint-3" and not skipped
    assert "lower --learning-rate and use --resume auto" in str(error.value)
    assert train(replace(longer, learning_rate=1e-3)).eval_loss < 7


def spoil(folder, name, value):
    """Put a value into the first tensor of a file, and make the manifest true again."""
    tensors = load_file(folder / name)
    tensors[min(tensors)].view(-1)[3] = value
    save_file(tensors, folder / name, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_run_resumes_past_a_bad_checkpoint_of_an_earlier_version(config, name, capsys):
    train(config)
    folder = Path(config.output_dir)
    spoil(folder / "checkpoint-6", name, float("nan"))
    with pytest.raises(ForgeError, match=f"{name} holds NaN or infinite values in") as error:
        train(replace(config, max_steps=9, resume=str(folder / "checkpoint-6")))
    assert "--resume auto" in error.value.problems[0].fix
    assert train(replace(config, eval_only=True)).steps == 3
    capsys.readouterr()
    assert train(replace(config, max_steps=9, resume="auto")).steps == 9
    shown = capsys.readouterr()
    assert f"skipped {folder / 'checkpoint-6'}: {name} holds NaN or infinite values" in shown.err
    assert "after step 3" in shown.out and "causal" not in shown.err + shown.out
    assert checkpoint.newest_good(folder) == (folder / "checkpoint-9", [])


# --- late steps -----------------------------------------------------------------------------------


def test_a_family_that_writes_no_sample_loses_no_results(config, monkeypatch, capsys):
    """As model families fail in generate: by errors of any kind."""
    from transformers import GPT2LMHeadModel

    def broken(*_, **__):
        raise AttributeError("no such cache\nat all")

    monkeypatch.setattr(GPT2LMHeadModel, "generate", broken)
    result = train(config)
    folder = Path(config.output_dir)
    assert result.sample is None and result.eval_loss and result.is_published
    assert TrainResult.load(folder) == result
    assert {"README.md", "model.safetensors", "config.json"} <= set(os.listdir(folder))
    printed = capsys.readouterr().out
    assert "warning: no sample of text (AttributeError: no such cache)" in printed
    assert "held out  loss" in printed
    assert train(replace(config, resume="auto")) == result


def test_a_model_that_cannot_be_published_loses_no_results(config, monkeypatch, capsys):
    copyfile = shutil.copyfile

    def full(source, target, **how):
        if Path(target).parent == Path(config.output_dir):
            raise OSError(28, "No space left on device")
        return copyfile(source, target, **how)

    monkeypatch.setattr("p2p_llm_forge.training.run_folder.shutil.copyfile", full)
    with pytest.raises(ForgeError, match="could not be written into .*No space left") as error:
        train(config)
    folder = Path(config.output_dir)
    assert json.loads((folder / "all_results.json").read_text())["eval_loss"] < 7
    assert (folder / "README.md").exists() and "held out  loss" in capsys.readouterr().out
    assert "use --resume auto" in error.value.problems[0].fix
    monkeypatch.undo()
    again = train(replace(config, resume="auto"))
    assert again.is_published and again.steps == 6 and (folder / "model.safetensors").exists()


def test_a_tracker_that_fails_at_the_end_costs_its_lines_only(config, monkeypatch, capsys):
    from accelerate import Accelerator

    def broken(*_, **__):
        raise ConnectionError("the service is gone")

    for name in ("log", "end_training"):
        monkeypatch.setattr(Accelerator, name, broken)
    result = train(replace(config, report_to="tensorboard"))
    assert TrainResult.load(Path(config.output_dir)) == result
    printed = capsys.readouterr().out
    assert printed.count("warning: a tracker could not be written (the service is gone)") == 1


def test_metrics_are_not_written_into_a_folder_that_was_taken_over(config, monkeypatch):
    from p2p_llm_forge.training.run import Run

    folder, right, logged = Path(config.output_dir), Run.log_lines, []

    def log_lines(self):
        logged.append(self)
        if len(logged) == 3:
            mark = next((folder / "run.lock").iterdir())
            mark.rename(mark.with_name("0123456789abcdef~17~1~~~elsewhere"))
        right(self)

    monkeypatch.setattr(Run, "log_lines", log_lines)
    with pytest.raises(ForgeError, match="taken over"):
        train(replace(config, log_every=1, save_every=0))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [1, 2], "the third line is the other one's to write"


def test_eval_only_takes_another_checkpoint_when_one_is_pruned_meanwhile(config, monkeypatch):
    from p2p_llm_forge.training import modes

    train(config)
    right, folder = modes.load_model, Path(config.output_dir)

    def load_while_a_run_prunes(name, *arguments, **options):
        if name.endswith("checkpoint-6"):
            (folder / "checkpoint-6" / "model.safetensors").unlink()
            (folder / "checkpoint-6" / "manifest.json").unlink()
        return right(name, *arguments, **options)

    monkeypatch.setattr(modes, "load_model", load_while_a_run_prunes)
    assert train(replace(config, eval_only=True)).steps == 3
