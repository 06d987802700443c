"""A run resumes in the precision in which it was begun, whatever this machine would choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.job import open_job
from p2p_llm_forge.training.precision import precision_begun
from p2p_llm_forge.training.run_folder import run_folder
from p2p_llm_forge.training.setup import set_up
from tests.training.saved import writer

ALONE = TrainConfig(dataset_path="x", output_dir="y")


@pytest.fixture
def saved(tmp_path):
    """Saves a checkpoint of a run that was computed in `precision`."""

    def save(step: int, precision: str) -> None:
        write = writer(step, config={"mixed_precision": precision})
        checkpoint.commit(tmp_path, step, lambda folder: write(folder), TrainConfig())

    return save


def test_the_newest_checkpoint_says_what_the_run_was_computed_in(saved, tmp_path):
    saved(3, "no")
    saved(9, "bf16")
    asked = TrainConfig(dataset_path="x", output_dir=str(tmp_path), resume="auto")
    assert precision_begun(asked) == "bf16"
    assert precision_begun(replace(asked, resume=str(tmp_path / "checkpoint-3"))) == "no"
    assert precision_begun(replace(asked, resume=None)) is None
    assert precision_begun(replace(asked, resume=None, overwrite=True)) is None


@pytest.mark.parametrize("damage", ["auto", "gone", "cut", "list"])
def test_what_is_not_known_is_none(saved, tmp_path, damage):
    saved(3, "auto")  # of a version that did not record what it came to
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    if damage == "gone":
        state.unlink()
    elif damage != "auto":
        state.write_text({"cut": '{"step": ', "list": "[]"}[damage])
    asked = TrainConfig(dataset_path="x", output_dir=str(tmp_path), resume="auto")
    assert precision_begun(asked) is None


@pytest.mark.parametrize("here", [True, False])
def test_what_was_begun_rules_over_this_machine_and_flags_rule_over_both(monkeypatch, here):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr("p2p_llm_forge.peers.join.bf16_pays", lambda device: here)
    for begun in ("no", "bf16"):
        with join(ALONE, lambda cluster, begun=begun: begun) as cluster:
            assert cluster.accelerator.mixed_precision == begun
        asked = replace(ALONE, mixed_precision="no" if begun == "bf16" else "bf16")
        with join(asked, lambda cluster, begun=begun: begun) as cluster:
            assert cluster.accelerator.mixed_precision == asked.mixed_precision
    with join(ALONE) as cluster:
        assert cluster.accelerator.mixed_precision == ("bf16" if here else "no")


def test_what_auto_came_to_is_recorded(config, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr("p2p_llm_forge.peers.join.bf16_pays", lambda device: True)
    with join(config) as cluster:
        job = open_job(config, cluster)
        with run_folder(job) as folder, set_up(job, folder) as run:
            assert (run.job.config.mixed_precision, run.job.config.compile) == ("bf16", "off")
