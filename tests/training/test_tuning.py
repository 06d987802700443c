"""A loaded model is tuned by defaults of its own, which a resumed run keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from peft import LoraConfig

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.training import tuning
from p2p_llm_forge.training.settle import settle, width_for
from p2p_llm_forge.training.tuning import FULL, LORA, width_of, with_warmup
from tests.runs import weights
from tests.using.models import save_model
from train import train

TUNED = TrainConfig(model_name="folder")


def test_wider_bases_take_lower_rates_and_lora_higher_ones():
    rates = {width: FULL.rate_at(width) for width in (64, 128, 256, 1024, 4096)}
    assert list(rates.values()) == sorted(rates.values(), reverse=True)
    assert rates[256] == FULL.rate and FULL.rate_at(None) == rates[4096]
    # What is usual with 7 billion parameters: 1e-5 to 5e-5 in full, 1e-4 to 5e-4 by LoRA.
    assert 1e-5 <= FULL.rate_at(4096) <= 5e-5 and 1e-4 <= LORA.rate_at(4096) <= 5e-4
    assert all(LORA.rate_at(width) > 2 * FULL.rate_at(width) for width in rates)


def test_what_is_given_stays_and_what_ends_a_run_otherwise_too():
    given = replace(TUNED, learning_rate=1.0, epochs=7.0, warmup_steps=3, lr_scheduler="wsd")
    given = replace(given, weight_decay=0.3)
    config = with_warmup(settle(given, None, 256), 100)
    assert replace(config, optimizer=None) == given
    assert settle(replace(TUNED, max_steps=9)).epochs is None
    assert settle(replace(TUNED, minutes=9.0)).epochs is None
    assert settle(replace(TUNED, optimizer="sgd"), None, 256).learning_rate == 1e-3


def test_a_model_from_scratch_has_none_of_it():
    config = with_warmup(settle(TrainConfig()), 100)
    assert (config.epochs, config.warmup_steps, config.lr_scheduler) == (None, None, None)


def test_a_run_of_an_older_version_keeps_what_that_took():
    """Which wrote down None where nothing was given: one epoch, no warm-up, a cosine."""
    older = {**as_dict(TUNED), "optimizer": "adamw", "learning_rate": 1e-3}
    config = with_warmup(settle(TUNED, older, width_for(TUNED, older)), 100)
    assert (config.epochs, config.warmup_steps, config.lr_scheduler) == (None, 0, None)
    assert config.learning_rate == 1e-3


@pytest.mark.parametrize("limit", [{"max_steps": 8}, {"minutes": 3.0}])
def test_a_run_that_goes_on_without_its_limit_takes_the_passes_of_tuning(limit):
    lora = replace(TUNED, lora_rank=8)
    begun = as_dict(with_warmup(settle(replace(lora, **limit), None, 256), 8))
    config = settle(lora, begun, 256)
    assert (config.epochs, config.warmup_steps) == (LORA.epochs, 1)
    assert settle(replace(lora, **limit), begun, 256).epochs is None


def test_adapters_are_as_wide_as_their_base(tmp_path):
    base = str(save_model(tmp_path / "model", "qwen3"))
    (tmp_path / "adapters").mkdir()
    LoraConfig(base_model_name_or_path=base).save_pretrained(tmp_path / "adapters")
    assert width_of(str(tmp_path / "adapters")) == width_of(base) == 32


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_the_width_is_what_the_family_calls_so(family, tmp_path):
    assert width_of(str(save_model(tmp_path / "model", family))) == 32


@pytest.mark.parametrize(
    "text", [None, "{}", "[1]", "{", '{"hidden_size": "wide"}', '{"hidden_size": -1}']
)
def test_a_base_that_does_not_say_how_wide_it_is_takes_a_low_rate(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert width_of(str(tmp_path)) is None and width_of("no/such-model") is None
    assert settle(TUNED).learning_rate == FULL.rate_at(4096)
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 640}}')
    assert width_of(str(tmp_path)) == 640


def test_a_run_says_how_it_tunes_and_resumes_so_after_an_upgrade(
    config, tmp_path, monkeypatch, capsys
):
    train(replace(config, output_dir=str(tmp_path / "base"), max_steps=1))
    plain = dict(model_type=None, config_overrides=None, learning_rate=None, optimizer=None)
    asked = replace(config, **plain, model_name=str(tmp_path / "base"), max_steps=None)
    asked = replace(asked, save_every=2, batch_size=16, keep_checkpoints=99)
    capsys.readouterr()
    result = train(replace(asked, output_dir=str(tmp_path / "whole")))
    width = json.loads((tmp_path / "base" / "config.json").read_text())["n_embd"]
    state = tmp_path / "whole" / f"checkpoint-{result.steps}" / "trainer_state.json"
    taken = json.loads(state.read_text())["config"]
    warmup = -(-result.steps // 20)
    assert taken["learning_rate"] == FULL.rate_at(width) > FULL.rate
    assert (taken["epochs"], taken["lr_scheduler"]) == (FULL.epochs, "linear")
    assert taken["warmup_steps"] == warmup > 0
    said = capsys.readouterr().out
    assert (
        f"tuning    in full, {FULL.epochs:g} passes over the blocks; warm-up of {warmup} up" in said
    )
    assert f"peak learning rate {taken['learning_rate']:g}" in said

    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in range(4, result.steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}", ignore_errors=True)
    (tmp_path / "run" / "all_results.json").unlink()
    monkeypatch.setattr(tuning, "FULL", tuning.Defaults(9.0, 1.0, 9.0))
    monkeypatch.setattr(tuning, "WARMUP", 0.9)
    monkeypatch.setattr(tuning, "SCHEDULE", "constant")
    train(replace(asked, resume="auto"))
    assert "changed   " not in capsys.readouterr().out
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert set(one) == set(other) and all((one[name] == other[name]).all() for name in one)
