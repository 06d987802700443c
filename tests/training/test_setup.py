"""A run claims its folder only when everything else is known to work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.job import open_job
from p2p_llm_forge.training.run_folder import run_folder
from p2p_llm_forge.training.setup import introduce, set_up, settle_strategy
from tests.training.saved import writer


def test_what_is_asked_for_is_the_strategy(open_small_job):
    job = open_small_job(compress="int8")
    assert settle_strategy(job, None) == job


def test_auto_resumes_with_the_strategy_of_the_checkpoint(open_small_job, tmp_path):
    begun = open_small_job(sync="diloco", sync_every=3, outer_lr=0.8)

    def write(folder):
        writer(3, config=as_dict(begun.config))(folder)

    saved = checkpoint.commit(tmp_path, 3, write, TrainConfig())
    settled = settle_strategy(open_small_job(sync="auto", max_steps=9), saved).config
    assert (settled.sync, settled.sync_every, settled.outer_lr) == ("diloco", 3, 0.8)
    assert settled.max_steps == 9


def test_a_run_from_scratch_is_ready_and_claims_its_folder_last(config):
    with join(config) as cluster, run_folder(open_job(config, cluster)) as folder:
        with set_up(open_job(config, cluster), folder) as run:
            assert (run.first_step, run.first_position, run.train_loss) == (0, 0, None)
            assert all(p.grad is None for p in run.learner.lm.parameters()), "priming left some"
            assert (folder.path / "run.json").exists()
        bad = open_job(replace(config, config_overrides="n_layer=2,n_head=3,n_embd=32"), cluster)
        (folder.path / "run.json").unlink()
        with pytest.raises(ForgeError, match="--config-overrides"), set_up(bad, folder):
            pass
        assert not (folder.path / "run.json").exists()


def test_the_model_from_scratch_depends_on_the_seed_alone(config):
    weights = []
    for seed in (1, 1, 2):
        asked = replace(config, seed=seed, output_dir=f"{config.output_dir}-{len(weights)}")
        with join(asked) as cluster:
            job = open_job(asked, cluster)
            with run_folder(job) as folder, set_up(job, folder) as run:
                weights.append(next(run.learner.lm.parameters()).detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_part_that_is_built_of_a_family_is_named(config, capsys):
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48"
    for family, said in (("got_ocr2", "model of a got_ocr2 is a qwen2\n"), ("qwen2", "")):
        folder = f"{config.output_dir}-{family}"
        asked = replace(config, model_type=family, config_overrides=sizes, output_dir=folder)
        with join(asked) as cluster:
            job = open_job(asked, cluster)
            with run_folder(job) as folder, set_up(job, folder):
                shown = capsys.readouterr().out
        assert "model     qwen2, " in shown
        assert shown.partition("note      the causal language ")[2].startswith(said)
        assert ("note " in shown) is bool(said)


def test_that_no_secret_covers_nccl_is_said_at_the_start(config, monkeypatch):
    said = []
    with join(config) as cluster:
        job = open_job(config, cluster)
        with run_folder(job) as folder, set_up(job, folder) as run:
            monkeypatch.setattr(run.tracking, "say", said.append)
            for session, is_on_gloo in ((None, False), ("one", True), ("one", False)):
                cluster._session, cluster.is_on_gloo = session, is_on_gloo
                introduce(run, {})
            cluster._session, cluster.is_on_gloo = None, True
    (line,) = [line for line in said if "NCCL" in line]
    assert "weights and gradients in plain" in line and "WireGuard" in line
