"""A checkpoint is complete or absent, and a damaged one is passed over by name."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import checkpoint


def write_two_files(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")


def flip_a_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def save(folder, model, optimizer, state):
    from safetensors.torch import save_file

    tensors = checkpoint.optimizer_tensors(model, optimizer)
    assert tensors or isinstance(optimizer, torch.optim.SGD)
    save_file(tensors, folder / checkpoint.OPTIMIZER)
    checkpoint.write_json(folder / checkpoint.TRAINER_STATE, state)


DAMAGES = {
    "has changed since it was written": flip_a_byte,
    "has 7 bytes instead of 7000": truncate,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
    "cannot be read (invalid": lambda folder: (folder / "manifest.json").write_text(
        '{"format_version": "x", "step": 20, "files": {}}'
    ),
    "is that of step 10": lambda folder: shutil.copy(
        folder.parent / "checkpoint-10" / "manifest.json", folder / "manifest.json"
    ),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, told):
    checkpoint.commit(tmp_path, 10, write_two_files, keep=2)
    newest = checkpoint.commit(tmp_path, 20, write_two_files, keep=2)
    assert checkpoint.newest_good(tmp_path) == (newest, [])
    DAMAGES[told](newest)
    found, passed_over = checkpoint.newest_good(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert len(passed_over) == 1
    assert str(newest) in passed_over[0] and told in passed_over[0]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / "tmp-checkpoint-5").mkdir()
    (tmp_path / "tmp-notes").mkdir()
    for step in (9, 10, 100):
        checkpoint.commit(tmp_path, step, write_two_files, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-100", "tmp-notes"]


def test_a_save_that_fails_leaves_the_older_ones(tmp_path):
    checkpoint.commit(tmp_path, 10, write_two_files, keep=1)

    def run_out_of_disk(folder):
        write_two_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ForgeError, match="No space left on device"):
        checkpoint.commit(tmp_path, 20, run_out_of_disk, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert checkpoint.damage(tmp_path / "checkpoint-10") is None


def test_a_newer_format_is_refused_by_its_version(tmp_path):
    folder = checkpoint.commit(tmp_path, 10, write_two_files, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ForgeError, match="format version 99"):
        checkpoint.newest_good(tmp_path)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
def test_an_optimizer_goes_on_from_its_saved_state(tmp_path, kind):
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.model.optimizer import build_optimizer

    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
        return model, build_optimizer(TrainConfig(optimizer=kind, learning_rate=0.01), model)

    def update(model, optimizer, step):
        torch.manual_seed(step)
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight = model_and_optimizer()
    for step in range(6):
        update(*straight, step)
    first = model_and_optimizer()
    for step in range(3):
        update(*first, step)
    save(tmp_path, *first, {"step": 3})
    second = model_and_optimizer()
    second[0].load_state_dict(first[0].state_dict())
    checkpoint.load_optimizer(tmp_path, *second)
    assert checkpoint.read_state(tmp_path)["step"] == 3
    for step in range(3, 6):
        update(*second, step)
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save(tmp_path, model, optimizer, {"step": 1})
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ForgeError, match="another model"):
        checkpoint.load_optimizer(tmp_path, other, torch.optim.AdamW(other.parameters()))


def refuse(folder, identity, resume=False, resume_changed=False):
    checkpoint.refuse_another_run(folder, identity, resume, resume_changed)


def test_an_output_directory_belongs_to_one_run(tmp_path):
    identity = {"dataset": "aaa", "model_type": "gpt2"}
    folder = tmp_path / "run"
    refuse(folder, identity)
    checkpoint.claim(folder, identity)
    checkpoint.commit(folder, 10, write_two_files, keep=1)
    with pytest.raises(ForgeError, match="--resume auto"):
        refuse(folder, identity)
    refuse(folder, identity, resume=True)
    other = {"dataset": "bbb", "model_type": "llama"}
    with pytest.raises(ForgeError) as error:
        refuse(folder, other, resume=True)
    assert "dataset: the run has aaa, asked was bbb" in str(error.value)
    assert "model_type: the run has gpt2, asked was llama" in str(error.value)
    assert checkpoint.newest_good(folder)[0] is not None
    checkpoint.claim(folder, other, overwrite=True)
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
        checkpoint.claim(tmp_path / "file" / "run", {})


def test_a_broken_run_file_is_told(tmp_path):
    (tmp_path / checkpoint.RUN).write_text("")
    with pytest.raises(ForgeError, match="run.json cannot be read"):
        refuse(tmp_path, {}, resume=True)


def test_going_on_from_an_older_checkpoint_leaves_the_later_branch(tmp_path):
    for step in (4, 6, 8):
        checkpoint.commit(tmp_path, step, write_two_files, keep=3)
    checkpoint.commit(tmp_path, 5, write_two_files, keep=2)
    assert checkpoint.steps_saved(tmp_path) == [5, 4]


def write_with_loss(loss):
    def write(folder):
        write_two_files(folder)
        state = {"figures": {"eval_loss": loss}}
        checkpoint.write_json(folder / checkpoint.TRAINER_STATE, state)

    return write


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        checkpoint.commit(tmp_path, step, write_with_loss(loss), keep=1, keep_best=True)
    assert checkpoint.steps_saved(tmp_path) == [5, 2]
    checkpoint.commit(tmp_path, 6, write_with_loss(0.5), keep=1, keep_best=True)
    assert checkpoint.steps_saved(tmp_path) == [6]


def test_the_writer_has_one_save_in_flight_and_is_waited_for():
    running, finished, may_end = [], [], threading.Event()

    def save(name):
        def act():
            running.append(name)
            assert len(running) - len(finished) == 1, "two saves at once"
            may_end.wait(10)
            finished.append(name)

        return act

    writer = checkpoint.Writer(in_background=True)
    writer.start(save("first"))
    assert finished == [], "the caller went on while it was written"
    threading.Timer(0.2, may_end.set).start()
    writer.start(save("second"))
    assert finished[:1] == ["first"], "the second save waited for the first"
    writer.wait()
    assert finished == ["first", "second"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_save_is_told_once_and_a_mistake_of_ours_is_raised(in_background):
    def fail(error):
        def act():
            raise error

        return act

    writer = checkpoint.Writer(in_background)
    writer.start(fail(ForgeError("the disk is full")))
    writer.wait()
    assert (writer.failure(), writer.failure()) == ("the disk is full", None)
    writer.start(fail(KeyError("bug")))
    writer.wait()
    with pytest.raises(KeyError):
        writer.failure()


def test_changes_that_make_sense_are_allowed_by_resume_changed(tmp_path):
    identity = {"dataset": "aaa", "seed": 0, "batch_size": 8, "model_type": "gpt2"}
    checkpoint.claim(tmp_path, identity)
    changed = {**identity, "seed": 1, "dataset": "bbb"}
    with pytest.raises(ForgeError, match="--resume auto --resume-changed") as error:
        refuse(tmp_path, changed, resume=True)
    assert "seed: the run has 0, asked was 1" in str(error.value)
    assert "dataset: the run has aaa, asked was bbb" in str(error.value)
    refuse(tmp_path, changed, resume=True, resume_changed=True)
    other_model = {**changed, "model_type": "llama"}
    with pytest.raises(ForgeError, match="model_type: the run has gpt2, asked was llama"):
        refuse(tmp_path, other_model, resume=True, resume_changed=True)
