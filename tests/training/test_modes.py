"""What train.py does without training writes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.runs import lines, results
from tests.texts import contents, write_text
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


def test_the_line_of_a_tuned_run_evaluates_that_run_and_not_its_base(config, tmp_path, capsys):
    base = train(config)
    loaded = {"model_type": None, "config_overrides": None, "model_name": config.output_dir}
    tuned = replace(config, **loaded, output_dir=str(tmp_path / "tuned"))
    result = train(tuned)
    assert abs(result.eval_loss - base.eval_loss) > 1e-3
    again = train(replace(tuned, eval_only=True))
    assert again.eval_loss == pytest.approx(result.eval_loss, rel=1e-6)
    assert again.steps == result.steps
    other = replace(tuned, eval_only=True, model_name=str(tmp_path / "tuned" / "checkpoint-6"))
    assert train(other).eval_loss == pytest.approx(result.eval_loss, rel=1e-6)
    (tmp_path / "moved").symlink_to(config.output_dir)
    other = replace(tuned, eval_only=True, model_name=str(tmp_path / "moved"))
    with pytest.raises(ForgeError, match="are two models") as error:
        train(other)
    assert error.value.problems[0].fix == "leave one of the two out"
    assert train(replace(other, output_dir="")).eval_loss == pytest.approx(base.eval_loss)
    assert train(replace(other, model_name=None)).eval_loss == pytest.approx(result.eval_loss)


def test_a_dry_run_shows_the_plan_and_writes_nothing(config, tmp_path, capsys):
    train(replace(config, dry_run=True))
    assert (
        "6 of 8 blocks, 8 on each of 1 process(es), micro-batches of 8" in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_looks_at_a_folder_that_holds_a_run(config, tmp_path, capsys):
    folder = config.output_dir
    train(config)
    before = contents(tmp_path / "run")

    def seen(**settings):
        capsys.readouterr()
        train(replace(config, dry_run=True, **settings))
        assert contents(tmp_path / "run") == before
        return capsys.readouterr().out

    assert f"{folder} holds this run, saved after step 6 of 6; it has ended" in seen()
    assert "after step 6 of 9; --resume auto continues it" in seen(max_steps=9)
    assert "after step 6 of 9; --resume auto" in seen(max_steps=9, resume="auto")
    beyond = seen(max_steps=3)
    assert "asked to end at 3\n          raise --max-steps" in beyond and "ended" not in beyond
    other = seen(seed=7)
    assert "seed: the run has 0, asked was 7" in other and "choose another --output-dir" in other
    assert f"{folder} holds a run, which --overwrite throws away" in seen(overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ForgeError, match="holds letter.txt, but no run"):
        train(replace(config, dry_run=True, output_dir=str(tmp_path / "mine")))


def test_a_dry_run_uses_the_text_that_a_run_has_prepared(config, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", documents=60)
    asked = replace(config, dataset_path=str(text), sequence_length=32, vocab_size=300)
    train(asked)
    before = contents(tmp_path / "run")
    train(replace(asked, dry_run=True))
    assert "holds this run, saved after step 6 of 6" in capsys.readouterr().out
    write_text(text, documents=61)
    with pytest.raises(ForgeError):
        train(replace(asked, dry_run=True))
    assert contents(tmp_path / "run") == before


def test_a_run_evaluates_on_one_sample_to_its_end_and_after_a_resume(config, tmp_path, capsys):
    steps = {"eval_every": 2, "save_every": 2, "log_every": 2}
    train(replace(config, max_steps=4, eval_blocks=20, **steps))
    train(replace(config, max_steps=6, resume="auto", **steps))
    shown = capsys.readouterr().out
    found = [line for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert {line["eval_blocks"] for line in found} == {20}
    assert all(line["eval_loss_stderr"] > 0 < line["bits_per_byte_stderr"] for line in found)
    total, first = found[0]["eval_split_blocks"], found[0]
    assert f"eval_loss {first['eval_loss']:.4f} ± {first['eval_loss_stderr']:.4f}" in shown
    assert total > 20
    assert f"{total} blocks, of which a sample of 20 is evaluated" in shown
    assert f"sampled   20 of {total} held-out blocks (± standard error)" in shown
    final = results(tmp_path / "run")
    assert {final[key] == found[-1][key] for key in found[-1] if key != "step"} == {True}
    assert str(total) in (tmp_path / "run" / "README.md").read_text()
    everything = train(replace(config, eval_only=True))
    assert everything.eval_blocks == total and everything.eval_loss_stderr is None
    assert abs(everything.eval_loss - final["eval_loss"]) < 5 * final["eval_loss_stderr"]
    assert train(replace(config, eval_only=True, eval_blocks=20)).eval_loss == pytest.approx(
        final["eval_loss"], rel=1e-6
    )


def test_after_a_few_updates_a_large_split_is_sampled_by_itself(config, tmp_path):
    text = write_text(tmp_path / "text.txt", documents=500)
    data = str(tmp_path / "data")
    sizes = {"vocab_size": 300, "sequence_length": 32}
    prepare(PrepareConfig([str(text)], data, validation_fraction=0.5, **sizes))
    result = train(replace(config, dataset_path=data))
    assert result.eval_blocks == 128 < result.eval_split_blocks
    whole = train(
        replace(config, dataset_path=data, output_dir=str(tmp_path / "whole"), eval_blocks=0)
    )
    assert whole.eval_blocks == whole.eval_split_blocks == result.eval_split_blocks
    assert abs(whole.eval_loss - result.eval_loss) < 5 * result.eval_loss_stderr


def test_without_held_out_documents_there_is_nothing_to_evaluate(config, tmp_path):
    text = write_text(tmp_path / "text.txt", documents=20)
    data = str(tmp_path / "data")
    sizes = {"vocab_size": 300, "sequence_length": 32}
    prepare(PrepareConfig([str(text)], data, validation_fraction=0.0, **sizes))
    with pytest.raises(ForgeError, match="has no validation split") as error:
        train(replace(config, dataset_path=data, eval_only=True))
    assert "--validation-fraction" in error.value.problems[0].fix
