"""One process, from prepared data to a model: what a run leaves, resumes, refuses and reports."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from tests.runs import CLOCKED, TINY_SIZES
from tests.texts import write_text
from train import TrainConfig, TrainResult, train

# gemma2 caps its logits at 30: too much for new weights to show, not for trained ones.
NANOCHAT = "hidden_size=48,num_hidden_layers=2,num_attention_heads=4,intermediate_size=64"
CAPPED = NANOCHAT + ",head_dim=12"


def weights(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    assert tensors
    return tensors


def metrics(config):
    with open(os.path.join(config.output_dir, "metrics.jsonl")) as lines:
        return [json.loads(line) for line in lines]


def test_a_run_leaves_a_model_its_figures_and_its_checkpoints(config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(replace(config, report_to="tensorboard"))
    assert isinstance(result, TrainResult) and result.steps == 6 and result.processes == 1
    folder = tmp_path / "run"
    written = json.loads((folder / "all_results.json").read_text())
    assert written["eval_loss"] == result.eval_loss < 7
    for figure in ("perplexity", "bits_per_byte", "train_loss", "steps", "tokens_per_second"):
        assert written[figure] > 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    assert [line["step"] for line in metrics(config) if "loss" in line] == [2, 4, 6]
    assert list((folder / "runs").rglob("events.out.tfevents*"))
    lm = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == lm.config.vocab_size
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    assert "bits_per_byte" in (folder / "README.md").read_text()


def test_loss_falls(config):
    train(replace(config, max_steps=40, learning_rate=1e-2, save_every=0))
    losses = [line["loss"] for line in metrics(config) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"config_overrides": TINY_SIZES + ",resid_pdrop=0.2,attn_pdrop=0.2", "micro_batch_size": 2},
        {"mixed_precision": "bf16", "optimizer": "sgd", "lr_scheduler": "wsd", "warmup_steps": 2},
        {"model_type": "gemma2", "config_overrides": CAPPED, "learning_rate": 0.1},
        {"model_type": "nanochat", "config_overrides": NANOCHAT, "learning_rate": 0.1},
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(config, tmp_path, settings):
    whole = replace(config, **settings, output_dir=str(tmp_path / "whole"))
    train(whole)
    parts = replace(config, **settings, output_dir=str(tmp_path / "parts"))
    train(parts)
    # As a kill after step 3 leaves it: everything later is gone, metrics reach further.
    folder = tmp_path / "parts"
    for name in ("all_results.json", "model.safetensors", "checkpoint-6/manifest.json"):
        (folder / name).unlink()
    train(replace(parts, resume="auto"))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(folder)[name]), name
    timeless = [
        [{k: v for k, v in line.items() if k not in CLOCKED} for line in metrics(run)]
        for run in (whole, parts)
    ]
    assert timeless[0] == timeless[1]


def test_the_evaluation_is_that_of_the_saved_model(config, tmp_path):
    """What is trained is what is saved, of a family whose new weights do not show its cap."""
    from transformers import AutoModelForCausalLM

    from p2p_llm_forge.data.dataset import open_prepared

    capped = replace(config, model_type="gemma2", config_overrides=CAPPED, learning_rate=0.1)
    result = train(capped)
    blocks = open_prepared(config.dataset_path).blocks("validation")
    inputs, targets = map(torch.from_numpy, blocks.inputs_and_targets(range(len(blocks))))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run").double()
    with torch.no_grad():
        logits = lm(input_ids=inputs).logits
        uncapped = lm.lm_head(lm.model(input_ids=inputs).last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert not torch.allclose(uncapped, logits, rtol=1e-3), "else this shows nothing"
    assert result.eval_loss == pytest.approx(loss.item(), rel=1e-6)


def test_accumulation_takes_the_same_updates(config, tmp_path):
    train(config)
    train(replace(config, output_dir=str(tmp_path / "micro"), micro_batch_size=2))
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(weights(tmp_path / "micro")[name], tensor, rtol=1e-5, atol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(config):
    """One SGD step moves the weights by minus the rate times a gradient computed here by hand."""
    from p2p_llm_forge.data import order as data_order
    from p2p_llm_forge.data.dataset import open_prepared
    from p2p_llm_forge.model.build import build_model
    from p2p_llm_forge.training.learner import text_spec_of

    config = replace(
        config,
        optimizer="sgd",
        learning_rate=0.5,
        lr_scheduler="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        max_steps=1,
        micro_batch_size=2,
    )
    data = open_prepared(config.dataset_path)
    lm = build_model(config, text_spec_of(data))
    numbers = data_order.blocks_at(0, 8, len(data.blocks("train")), config.seed)
    inputs, targets = (
        torch.from_numpy(a) for a in data.blocks("train").inputs_and_targets(numbers)
    )
    logits = lm(input_ids=inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = {name: p - 0.5 * p.grad for name, p in lm.named_parameters()}
    train(config)
    got = weights(config_folder(config))
    assert set(got) <= set(expected)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def config_folder(config):
    from pathlib import Path

    return Path(config.output_dir)


def test_a_finished_run_can_be_made_longer(config):
    train(replace(config, lr_scheduler="constant"))
    longer = train(replace(config, lr_scheduler="constant", max_steps=8, resume="auto"))
    assert longer.steps == 8
    with pytest.raises(ForgeError, match="is after step 8, this run was asked to end at 6"):
        train(replace(config, lr_scheduler="constant", resume="auto"))


def test_an_output_directory_of_another_run_is_refused_and_left_alone(config, prepared, tmp_path):
    train(config)
    before = weights(tmp_path / "run")
    for settings in (
        {"config_overrides": "n_layer=1,n_head=2,n_embd=32"},
        {"seed": 5},
        {"batch_size": 4},
    ):
        for resume in (None, "auto"):
            with pytest.raises(ForgeError, match="holds another run"):
                train(replace(config, **settings, resume=resume))
    with pytest.raises(ForgeError, match="continue it with --resume auto"):
        train(config)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name])
    train(replace(config, seed=5, overwrite=True))
    assert not torch.equal(
        next(iter(weights(tmp_path / "run").values())), next(iter(before.values()))
    )


def test_a_loss_that_explodes_ends_the_run_and_keeps_the_last_checkpoint(config, tmp_path):
    from p2p_llm_forge.training import checkpoint

    train(replace(config, optimizer="sgd", learning_rate=1e-3, lr_scheduler="constant"))
    with pytest.raises(ForgeError, match=r"NaN or infinite at step \d+ \(first on rank 0\)"):
        train(
            replace(
                config,
                optimizer="sgd",
                learning_rate=1e30,
                lr_scheduler="constant",
                max_grad_norm=0.0,
                max_steps=12,
                resume="auto",
            )
        )
    newest, skipped = checkpoint.newest_good(tmp_path / "run")
    assert newest == tmp_path / "run" / "checkpoint-6" and not skipped
    assert all(tensor.isfinite().all() for tensor in weights(newest).values())


def test_fine_tuning_starts_from_the_weights_of_the_model(config, tmp_path):
    first = train(replace(config, max_steps=30, learning_rate=1e-2, save_every=0))
    tuned = train(
        replace(
            config,
            model_name=config.output_dir,
            model_type=None,
            config_overrides=None,
            output_dir=str(tmp_path / "tuned"),
            max_steps=1,
            learning_rate=1e-6,
        )
    )
    assert tuned.eval_loss == pytest.approx(first.eval_loss, abs=1e-3)


def test_a_text_file_is_prepared_first_and_found_again(config, text_file, tmp_path):
    config = replace(
        config, dataset_path=str(text_file), vocab_size=300, sequence_length=32, max_steps=2
    )
    train(config)
    manifest = tmp_path / "run" / "prepared" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    train(replace(config, max_steps=3, resume="auto"))
    assert manifest.stat().st_mtime_ns == written


def test_data_without_held_out_documents_trains_without_an_evaluation(config, tmp_path):
    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare

    text = write_text(tmp_path / "text.txt", documents=20)
    folder = tmp_path / "data"
    prepare(
        PrepareConfig(
            [str(text)], str(folder), vocab_size=300, sequence_length=32, validation_fraction=0.0
        )
    )
    result = train(replace(config, dataset_path=str(folder), max_steps=1))
    assert result.eval_loss is None and result.train_loss is not None
    with pytest.raises(ForgeError, match="no validation split"):
        train(replace(config, dataset_path=str(folder), eval_only=True))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"optimizer": "adafactor"}])
def test_other_families_and_settings_train(config, family, settings):
    sizes = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48"
    result = train(
        replace(config, model_type=family, config_overrides=sizes, max_steps=2, **settings)
    )
    assert result.train_loss < 7


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"dataset_path": "nowhere"}, "nowhere"),
        ({"sequence_length": 64}, "--sequence-length 64 was asked, .* has blocks of 32 tokens"),
        ({"lr_scheduler": "cosin", "optimizer": "adm"}, "2 problems:.*adm.*cosin"),
        ({"report_to": "tensorbord"}, "--report-to tensorbord: no such tracker"),
        ({"model_name": "gpt2", "model_type": "gpt2"}, "give one or the other"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"backend": "nccl"}, "--backend nccl needs an NVIDIA GPU"),
        ({"resume": "nowhere"}, "--resume nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(config, tmp_path, settings, found):
    if torch.accelerator.is_available() and {"backend", "mixed_precision"} & set(settings):
        pytest.skip("a machine without an accelerator shows this")
    with pytest.raises(ForgeError, match=f"(?s){found}"):
        train(replace(config, **settings))
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_command_line_reports_a_mistake_in_one_message_with_status_2(run, tmp_path):
    status, output = run(
        sys.executable, "train.py", "--dataset-path", tmp_path, "--output-dir", tmp_path / "o"
    )
    assert status == 2
    assert "Traceback" not in output
    assert output.count("error: ") == 1 and "manifest" in output
    assert not (tmp_path / "o").exists()


def test_a_document_mask_changes_the_training_and_the_evaluation(config, tmp_path):
    plain = train(replace(config, max_steps=3, output_dir=str(tmp_path / "plain")))
    masked_config = replace(
        config, max_steps=3, document_mask=True, output_dir=str(tmp_path / "masked")
    )
    masked = train(masked_config)
    assert masked.train_loss != plain.train_loss and masked.eval_loss != plain.eval_loss
    again = train(replace(masked_config, eval_only=True))
    assert again.eval_loss == pytest.approx(masked.eval_loss, rel=1e-5)
    assert train(replace(masked_config, eval_only=True, document_mask=False)).eval_loss != (
        pytest.approx(masked.eval_loss, rel=1e-5)
    )


def test_a_run_goes_on_with_another_batch_size_and_reads_every_block_once(config, tmp_path):
    """--resume-changed: the stream of blocks continues where it was, in other portions."""
    from p2p_llm_forge.training.checkpoint import read_state

    train(replace(config, lr_scheduler="constant"))
    with pytest.raises(ForgeError, match="batch_size: the run has 8, asked was 4"):
        train(replace(config, batch_size=4, max_steps=8, resume="auto"))
    longer = replace(config, batch_size=4, max_steps=8, lr_scheduler="constant", resume="auto")
    train(replace(longer, resume_changed=True))
    assert read_state(tmp_path / "run" / "checkpoint-8")["blocks_read"] == 6 * 8 + 2 * 4


def test_the_best_checkpoint_outlives_pruning(config, tmp_path):
    from p2p_llm_forge.training import checkpoint

    train(
        replace(
            config,
            **{"max_steps": 12, "save_every": 2, "eval_every": 2, "learning_rate": 5e-2},
            **{"keep_best": True, "keep_checkpoints": 1, "lr_scheduler": "constant"},
        )
    )
    losses = {line["step"]: line["eval_loss"] for line in metrics(config) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert checkpoint.steps_saved(tmp_path / "run") == sorted({12, best}, reverse=True)


def test_a_start_that_fails_claims_and_removes_nothing(config, tmp_path):
    bad = replace(config, config_overrides="n_layer=2,n_head=3,n_embd=32")
    with pytest.raises(ForgeError, match="--config-overrides"):
        train(bad)
    train(config)  # the fixed command is not refused
    before = weights(tmp_path / "run")
    with pytest.raises(ForgeError, match="--config-overrides"):
        train(replace(bad, overwrite=True))
    assert set(weights(tmp_path / "run")) == set(before)
    with pytest.raises(ForgeError, match="--overwrite would throw away --model-name"):
        loaded = {"model_name": config.output_dir, "model_type": None, "config_overrides": None}
        train(replace(config, **loaded, overwrite=True))


def test_going_on_from_a_named_checkpoint_takes_its_branch(config, tmp_path):
    from p2p_llm_forge.training import checkpoint

    train(replace(config, lr_scheduler="constant"))
    again = replace(config, lr_scheduler="constant", learning_rate=0.02, max_steps=6)
    before = weights(tmp_path / "run" / "checkpoint-6")
    train(replace(again, resume=str(tmp_path / "run" / "checkpoint-3")))
    assert checkpoint.steps_saved(tmp_path / "run") == [6, 3]
    after = weights(tmp_path / "run" / "checkpoint-6")
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_the_batch_stays_what_it_was_when_a_run_goes_on(config, tmp_path):
    from p2p_llm_forge.training.checkpoint import read_state

    config = replace(config, batch_size=None, lr_scheduler="constant")
    train(replace(config, micro_batch_size=4, gradient_accumulation_steps=5))
    train(replace(config, max_steps=7, resume="auto"))
    assert read_state(tmp_path / "run" / "checkpoint-7")["blocks_read"] == 7 * 20


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"epochs": float("inf")}, "--epochs is inf"),
        ({"seed": 2**70}, "--seed is"),
        ({"balance": "yes"}, "--balance is 'yes'\n  fix: choose from: auto, none"),
        ({"learning_rate": "1e-3"}, "--learning-rate is '1e-3'"),
        ({"world_size": 0}, "--world-size is 0"),
        (
            {"keep_best": True, "eval_every": 2, "save_every": 3},
            "is not a multiple of --eval-every 2",
        ),
        ({"dataset_path": "no/such.txt"}, "no/such.txt: no such file"),
    ],
)
def test_values_that_mean_nothing_are_refused(config, settings, found):
    with pytest.raises(ForgeError) as error:
        train(replace(config, **settings))
    assert found in str(error.value)


def test_a_notebook_may_give_paths_and_a_dict(prepared, tmp_path):
    result = train(
        TrainConfig(
            dataset_path=prepared,
            output_dir=tmp_path / "run",
            config_overrides={"num_hidden_layers": 1, "hidden_size": 32},
            max_steps=1,
            report_to="none",
            cpu_threads=1,
        )
    )
    assert result.steps == 1
