"""What was not given is settled once: by what the run has begun with, else by the defaults."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.config.train import WEIGHT_DECAY
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import shape
from p2p_llm_forge.training.mistakes import mistakes_in
from p2p_llm_forge.training.settle import OPTIMIZER, begun_in, settle
from p2p_llm_forge.training.tuning import FULL, with_warmup
from tests.runs import weights
from train import train

# What a checkpoint of a version without --depth says of a run without a family.
BEFORE_DEPTH = {"model_name": None, "model_type": None, "optimizer": "adamw", "learning_rate": 1e-3}


def settled(begun=None, **given):
    config = settle(TrainConfig(**given), begun)
    return config.model_type, config.depth, config.optimizer, config.learning_rate


def test_nothing_given_is_the_default_model_with_its_rate():
    rate = shape.learning_rate_of(OPTIMIZER, shape.DEPTH)
    assert settled() == (shape.FAMILY, shape.DEPTH, OPTIMIZER, rate)


def test_what_was_given_stays():
    given = {"model_type": "llama", "depth": 3, "optimizer": "sgd", "learning_rate": 0.5}
    assert settled(**given) == ("llama", 3, "sgd", 0.5)
    assert settled(BEFORE_DEPTH, **given) == ("llama", 3, "sgd", 0.5)
    config = TrainConfig(dataset_path="x", seed=3, weight_decay=0.3, **given)
    assert settle(config) == config


def test_the_weight_decay_is_that_of_the_run_and_else_as_usual():
    assert settle(TrainConfig()).weight_decay == WEIGHT_DECAY
    assert settle(TrainConfig(), {"weight_decay": 2.1}).weight_decay == 2.1
    assert settle(TrainConfig(weight_decay=0.0), {"weight_decay": 2.1}).weight_decay == 0


def test_a_family_without_a_depth_keeps_its_own_sizes():
    assert settled(model_type="llama")[:2] == ("llama", None)
    assert settled(depth=6)[:2] == (shape.FAMILY, 6)


def test_a_loaded_model_is_tuned_as_it_is():
    rate = FULL.rate_at(None)  # of a base that does not say how wide it is
    assert settled(model_name="folder") == (None, None, "adamw", rate)
    assert settle(TrainConfig(model_name="folder"), None, 256).learning_rate == FULL.rate > rate
    assert settled(model_name="folder", optimizer="sgd") == (None, None, "sgd", 1e-3)


def test_settling_again_changes_nothing():
    for given in ({}, {"model_type": "llama"}, {"model_name": "folder"}, {"depth": 7}):
        once = with_warmup(settle(TrainConfig(**given)), 100)
        assert settle(once) == once
        assert settle(TrainConfig(**given), as_dict(once)) == once


def test_what_the_run_has_begun_with_rules_over_new_defaults():
    begun = {"model_type": "llama", "depth": 2, "optimizer": "sgd", "learning_rate": 0.25}
    assert settled(begun) == ("llama", 2, "sgd", 0.25)
    assert settled(begun, learning_rate=0.5)[-1] == 0.5


def test_without_a_run_nothing_has_begun(tmp_path):
    assert begun_in(TrainConfig(output_dir=str(tmp_path))) is None
    assert begun_in(TrainConfig(output_dir=str(tmp_path / "no"), resume="auto")) is None
    assert begun_in(TrainConfig()) is None


def as_of_before_depth(folder):
    """Make a run look as versions without --depth left theirs, of a family that was not given."""
    run = json.loads((folder / "run.json").read_text())
    del run["identity"]["depth"]
    run["identity"]["model_type"] = None
    (folder / "run.json").write_text(json.dumps(run))
    for checkpoint in folder.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["config"]["depth"]
        state["config"]["model_type"] = None
        text = json.dumps(state)
        (checkpoint / "trainer_state.json").write_text(text)
        manifest = json.loads((checkpoint / "manifest.json").read_text())

        facts = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        manifest["files"]["trainer_state.json"] = facts
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_a_version_without_depth_resumes_as_it_began(config, tmp_path):
    """Its command line gave GPT-2's names alone; its rate and optimizer were the defaults."""
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    train(replace(config, max_steps=3))
    # The schedule depends on the end: so the first half is taken from the whole run.
    folder = tmp_path / "run"

    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "all_results.json").unlink()
    as_of_before_depth(folder)
    typed = replace(config, model_type=None, optimizer=None, learning_rate=None, resume="auto")
    assert mistakes_in(typed).found == []
    train(typed)
    one, other = weights(tmp_path / "whole"), weights(folder)
    assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)
    identity = json.loads((folder / "run.json").read_text())["identity"]
    assert (identity["model_type"], identity["depth"]) == ("gpt2", None)


def test_the_defaults_resume_from_what_the_checkpoint_says(config, tmp_path, monkeypatch):
    """As after an upgrade that brought others."""
    small = {"model_type": None, "config_overrides": "hidden_size=32,num_attention_heads=2"}
    config = replace(config, **small, optimizer=None, learning_rate=None)
    train(replace(config, output_dir=str(tmp_path / "whole")))

    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "all_results.json").unlink()
    monkeypatch.setattr("p2p_llm_forge.training.settle.DEPTH", 1)
    monkeypatch.setattr("p2p_llm_forge.training.settle.family_of", lambda *_: "llama")
    monkeypatch.setattr("p2p_llm_forge.training.settle.OPTIMIZER", "sgd")
    monkeypatch.setattr("p2p_llm_forge.training.settle.learning_rate_of", lambda *_: 9.0)
    with pytest.raises(ForgeError, match="holds this run already"):
        train(config)
    card = (tmp_path / "whole" / "README.md").read_text()
    rate = shape.learning_rate_of("muon", shape.DEPTH)
    assert "| family | lfm2 |" in card
    for line in ("model_type: lfm2", f"depth: {shape.DEPTH}", "optimizer: muon"):
        assert f"\n{line}\n" in card  # of its recipe
    assert f"\nlearning_rate: {rate}\n" in card
    identity = json.loads((tmp_path / "whole" / "run.json").read_text())["identity"]
    assert (identity["model_type"], identity["depth"]) == ("lfm2", shape.DEPTH)
    train(replace(config, resume="auto"))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)


def test_a_rate_that_no_run_can_have_is_refused(config, tmp_path):
    train(replace(config, max_steps=3))
    folder = tmp_path / "run" / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    state["config"]["learning_rate"] = "fast"
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ForgeError, match="--learning-rate is 'fast'"):
        train(replace(config, learning_rate=None, resume="auto"))
    train(replace(config, max_steps=4, overwrite=True))
