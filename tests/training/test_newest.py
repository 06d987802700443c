"""Which folder holds the newest model of a run, and what holds none."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import write_json
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.newest import newest_model
from p2p_llm_forge.training.results import TrainResult
from tests.training.saved import WEIGHTS, writer


def save(folder, *steps):
    for step in steps:
        checkpoint.commit(folder, step, writer(step), TrainConfig(keep_checkpoints=9))


def publish(folder, step, is_published=True):
    (folder / "config.json").write_text("{}")
    result = TrainResult(str(folder), step, 0, None, None, 1, is_published=is_published)
    write_json(folder / "all_results.json", vars(result))


def test_it_is_what_was_trained_longest_and_is_whole(tmp_path):
    save(tmp_path, 3, 6)
    assert newest_model(tmp_path) == tmp_path / "checkpoint-6"  # it has not ended
    publish(tmp_path, 6, is_published=False)  # being copied
    assert newest_model(tmp_path) == tmp_path / "checkpoint-6"
    publish(tmp_path, 6)
    assert newest_model(tmp_path) == tmp_path
    save(tmp_path, 9)  # it was continued
    assert newest_model(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / WEIGHTS).write_bytes(b"half")
    assert newest_model(tmp_path) == tmp_path / "checkpoint-6"
    assert newest_model(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"


def test_a_checkpoint_that_is_not_whole_names_the_model_to_take(tmp_path):
    save(tmp_path, 3, 6)
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    for name in ("checkpoint-6", "tmp-checkpoint-9-abcd"):
        with pytest.raises(ForgeError, match=f"{name} is not whole") as refused:
            newest_model(tmp_path / name)
        assert refused.value.problems[0].fix == f"take {tmp_path / 'checkpoint-3'}"
    (tmp_path / "checkpoint-3" / WEIGHTS).unlink()
    with pytest.raises(ForgeError, match="holds no model that is whole: skipped .*checkpoint-6"):
        newest_model(tmp_path)


def test_folders_of_others_are_left_to_transformers(tmp_path):
    theirs = tmp_path / "checkpoint-500"  # of its Trainer
    theirs.mkdir()
    for name in ("config.json", "trainer_state.json"):
        (theirs / name).write_text("{}")
    assert newest_model(theirs) == theirs
    with pytest.raises(ForgeError, match="holds no model: neither config.json nor a checkpoint"):
        newest_model(tmp_path / "no such folder")
