"""What train.py does without training writes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.texts import write_text
from train import train


def test_eval_only_gives_the_figures_of_the_run_and_writes_nothing(config, tmp_path):
    result = train(config)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    again = train(replace(config, eval_only=True))
    assert again.eval_loss == pytest.approx(result.eval_loss, rel=1e-6)
    loaded = {"model_name": config.output_dir, "model_type": None, "config_overrides": None}
    named = train(replace(config, eval_only=True, **loaded))
    assert named.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(ForgeError, match="nothing to evaluate"):
        train(replace(config, eval_only=True, output_dir=str(tmp_path / "empty")))


def test_a_dry_run_shows_the_plan_and_writes_nothing(config, tmp_path, capsys):
    train(replace(config, dry_run=True))
    assert (
        "6 of 8 blocks, 8 on each of 1 process(es), micro-batches of 8" in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()
    train(config)
    with pytest.raises(ForgeError, match="holds this run already"):
        train(replace(config, dry_run=True))


def test_without_held_out_documents_there_is_nothing_to_evaluate(config, tmp_path):
    text = write_text(tmp_path / "text.txt", documents=20)
    data = str(tmp_path / "data")
    sizes = {"vocab_size": 300, "sequence_length": 32}
    prepare(PrepareConfig([str(text)], data, validation_fraction=0.0, **sizes))
    with pytest.raises(ForgeError, match="has no validation split") as error:
        train(replace(config, dataset_path=data, eval_only=True))
    assert "--validation-fraction" in error.value.problems[0].fix
