"""Several processes on conversations: every update is the mean over what all of them train."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data import order
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.training.learner import text_spec_of
from tests.conversations import step_by_hand, trained_of
from tests.runs import (
    DROPOUT,
    TINY,
    finish,
    flags,
    lines,
    loaded,
    newest_step,
    read,
    results,
    start_ranks,
    tensors,
    wait_for_checkpoint,
    weights,
)

pytestmark = pytest.mark.slow
PLAIN_SGD = {
    **{"optimizer": "sgd", "learning_rate": 0.5, "lr_scheduler": "constant", "weight_decay": 0},
    **{"max_grad_norm": 0, "mixed_precision": "no", "log_every": 1},
}
SEED = TrainConfig("", "").seed


@pytest.fixture(scope="module")
def first(prepared_conversations):
    """The model that every run begins with, in float64."""
    data = open_prepared(prepared_conversations)
    return build_model(TrainConfig("", "", **TINY), text_spec_of(data)).double()


def own_blocks(there, step, rank, processes):
    """What a rank trains in an update of 8 blocks."""
    share = 8 // processes
    numbers = order.blocks_at(8 * step, 8, len(there), SEED)
    return [there[number] for number in numbers[rank * share : (rank + 1) * share]]


def require_close(got, lm):
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor.double(), lm.get_parameter(name), rtol=1e-5, atol=3e-6, msg=name
        )


def test_ranks_that_train_different_numbers_of_tokens_take_the_updates_of_one_process(
    zygote, prepared_conversations, conversations, first, tmp_path
):
    """Also where one has more blocks than another: 2, then 3 processes."""
    lm, there, end = copy.deepcopy(first), conversations["train"], 0
    for step in range(2):
        counts = [
            sum(map(sum, map(trained_of, own_blocks(there, step, rank, 2)))) for rank in (0, 1)
        ]
        assert abs(counts[0] - counts[1]) > 9, "else the ranks' means would do"
    for step in range(4):
        step_by_hand(lm, own_blocks(there, step, 0, 1), end, 0.5, alone=True)
    folder = tmp_path / "run"
    settings = {**PLAIN_SGD, "document_mask": True, "micro_batch_size": 2}
    finish(zygote, prepared_conversations, folder, 2, **settings, max_steps=2)
    finish(zygote, prepared_conversations, folder, 3, **settings, max_steps=4)
    require_close(weights(folder), lm)
    one = finish(zygote, prepared_conversations, tmp_path / "one", 1, **settings, max_steps=4)
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (folder, one)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    for figure in ("eval_loss", "bits_per_byte", "token_accuracy"):
        assert results(folder)[figure] == pytest.approx(results(one)[figure], rel=1e-4)


def test_rounds_weigh_ranks_by_the_tokens_that_they_have_trained(
    zygote, prepared_conversations, conversations, first, tmp_path
):
    """Two rounds of two updates of plain SGD, simulated in float64."""
    there, agreed, evenly = conversations["train"], first, None
    for start in (0, 2):
        ends, counts = [], []
        for rank in range(2):
            lm = copy.deepcopy(agreed)
            counts.append(
                sum(
                    step_by_hand(lm, own_blocks(there, step, rank, 2), end=0, rate=0.5)
                    for step in (start, start + 1)
                )
            )
            ends.append(lm)
        assert abs(counts[0] - counts[1]) > 9
        agreed, evenly = mean_of(ends, counts), mean_of(ends, [1, 1])
    rounds = {"sync": "diloco", "sync_every": 2, "outer_lr": 1.0, "outer_momentum": 0.0}
    rounds["outer_warmup_rounds"] = 0
    folder = tmp_path / "run"
    finish(zygote, prepared_conversations, folder, 2, **PLAIN_SGD, **rounds, max_steps=4)
    require_close(weights(folder), agreed)
    apart = [
        (p - q).abs().max() for p, q in zip(agreed.parameters(), evenly.parameters(), strict=True)
    ]
    assert max(apart) > 1e-4, "else blocks could have been counted"


def mean_of(models, counts):
    """The weighted mean of models."""
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for own, *others in zip(*(one.parameters() for one in (mean, *models)), strict=True):
            own.copy_(sum(n * p for n, p in zip(counts, others, strict=True)) / sum(counts))
    return mean


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 2}, {"sync": "diloco", "sync_every": 6, "compress": "int8"}],
    ids=["ddp", "diloco"],
)
def test_a_killed_run_ends_like_one_that_was_not_killed(
    zygote, prepared_conversations, tmp_path, settings
):
    settings = {
        **{"config_overrides": DROPOUT, "max_steps": 34, "save_every": 4, "log_every": 3},
        **{"keep_checkpoints": 9, "peer_timeout": 8, "document_mask": True, **settings},
    }
    calm = finish(zygote, prepared_conversations, tmp_path / "calm", **settings)
    stormy, log = tmp_path / "stormy", tmp_path / "log"
    words = flags(prepared_conversations, stormy, **settings)
    for goal, victim in ((8, 1), (20, 0)):
        ranks = start_ranks(zygote, words, 2, log)
        wait_for_checkpoint(zygote, ranks[victim], stormy, goal, log)
        os.kill(ranks[victim], signal.SIGKILL)
        assert zygote.wait(ranks[victim]) == -signal.SIGKILL
        assert zygote.wait(ranks[1 - victim]) in (1, 2), read(log)
    assert newest_step(stormy) < 34, "the last kill came after the end"
    finish(zygote, prepared_conversations, stormy, **settings)
    expected, got = tensors(calm, 34), tensors(stormy, 34)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert lines(stormy) == lines(calm)


def test_adapters_learn_from_conversations_alike_on_one_and_on_two_processes(
    zygote, prepared_conversations, conversations, tmp_path
):
    """Against plain SGD in float64 on what adapts a frozen model, whose head has no gradient."""
    there, data = conversations["train"], open_prepared(prepared_conversations)
    base = build_model(TrainConfig("", "", **TINY), text_spec_of(data))
    base.save_pretrained(tmp_path / "base")
    adapted = {
        **{"model_name": str(tmp_path / "base"), "lora_rank": 4, "base_dtype": "float32"},
        **{"model_type": None, "config_overrides": None, "document_mask": True},
    }
    asked = TrainConfig("", "", **adapted, optimizer="sgd")
    lm = build_model(asked, text_spec_of(data)).double()
    begun = {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}
    assert not lm.get_output_embeddings().weight.requires_grad
    for step in range(3):
        step_by_hand(lm, own_blocks(there, step, 0, 1), end=0, rate=0.5, alone=True)
    assert all(
        parameter.requires_grad == (name in begun) for name, parameter in lm.named_parameters()
    )
    for processes in (1, 2):
        settings = {
            **PLAIN_SGD,
            **adapted,
            "micro_batch_size": 2,
            "max_steps": 3,
            "warmup_steps": 0,
        }
        folder = tmp_path / str(processes)
        finish(zygote, prepared_conversations, folder, processes, **settings)
        saved = loaded(folder / "adapter_model.safetensors")
        assert len(saved) == len(begun)
        for name, tensor in saved.items():
            own = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
            expected = lm.get_parameter(own)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=2e-6)
    moved = [(lm.get_parameter(name) - p).abs().max() for name, p in begun.items()]
    assert max(moved) > 1e-3
