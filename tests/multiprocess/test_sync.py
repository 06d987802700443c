"""How ranks agree on weights: every strategy, as real processes, against runs of another kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from p2p_llm_forge.config import OF_DILOCO
from tests.runs import (
    DEFAULTS,
    DILOCO,
    TINY_SIZES,
    by_hand,
    finish,
    flags,
    lines,
    read,
    start_ranks,
    tensors,
    wait_for_checkpoint,
    weights,
)

pytestmark = pytest.mark.slow
DROPOUT = TINY_SIZES + ",resid_pdrop=0.1,embd_pdrop=0,attn_pdrop=0"
PLAIN_SGD = {
    **{"optimizer": "sgd", "learning_rate": 0.1, "lr_scheduler": "constant", "weight_decay": 0},
    **{"max_grad_norm": 0, "mixed_precision": "no"},
}


STRATEGIES = {
    "int8": {"compress": "int8"},
    "int4": {"compress": "int4"},
    "powersgd": {"compress": "powersgd", "powersgd_rank": 4},
    "diloco_defaults": {**DEFAULTS, **DILOCO, "sync_every": 6},
    "diloco_int8": {**DILOCO, "sync_every": 6, "compress": "int8", "ddp_warmup_steps": 4},
    "streaming_int4": {
        **{**DILOCO, "sync_every": 6, "compress": "int4"},
        **{"fragments": 2, "overlap_steps": 2},
    },
}


# Beside adamw's in the others.
WITH_MUON = {"optimizer": "muon"}


@pytest.mark.parametrize(
    "name", ["int8", "powersgd", "diloco_int8", "streaming_int4", "diloco_defaults"]
)
def test_a_run_killed_and_resumed_ends_bit_for_bit_alike(zygote, prepared, tmp_path, name):
    """Saved in the middle of rounds, too, and while pseudo-gradients are on their way. (Other
    codecs, and after every update: tests/sync.)"""
    settings = {
        **{"config_overrides": DROPOUT, "max_steps": 34, "save_every": 4, "log_every": 3},
        **{"keep_checkpoints": 9, "peer_timeout": 8, **STRATEGIES[name]},
        **(WITH_MUON if name in ("int8", "streaming_int4") else {}),
    }
    calm = finish(zygote, prepared, tmp_path / "calm", **settings)
    stormy, log = tmp_path / "stormy", tmp_path / "log"
    for goal in (8, 20):
        ranks = start_ranks(zygote, flags(prepared, stormy, **settings), 2, log)
        wait_for_checkpoint(zygote, ranks[1], stormy, goal, log)
        os.kill(ranks[1], signal.SIGKILL)
        assert zygote.wait(ranks[0]) in (1, 2), read(log)
    finish(zygote, prepared, stormy, **settings)
    expected, got = tensors(calm, 34), tensors(stormy, 34)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert lines(stormy) == lines(calm)
    assert not list(stormy.glob("tmp-*"))
    own = load_file(calm / "checkpoint-32" / "rank-00001.safetensors")
    assert all(
        torch.equal(tensor, load_file(stormy / "checkpoint-32" / "rank-00001.safetensors")[key])
        for key, tensor in own.items()
    )


def test_rounds_of_one_plain_update_are_ddp(zygote, prepared, tmp_path):
    """Averaging weights after one step of SGD is averaging gradients, but for rounding."""
    settings = {**PLAIN_SGD, "max_steps": 8, "micro_batch_size": 2}
    ddp = weights(finish(zygote, prepared, tmp_path / "ddp", **settings))
    rounds = {"sync": "diloco", "sync_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}
    diloco = weights(finish(zygote, prepared, tmp_path / "diloco", **settings, **rounds))
    start = weights(finish(zygote, prepared, tmp_path / "start", **{**settings, "max_steps": 1}))
    for name, tensor in ddp.items():
        torch.testing.assert_close(diloco[name], tensor, rtol=0, atol=2e-6)
    assert any((ddp[name] - start[name]).abs().max() > 1e-3 for name in ddp)


def test_the_loss_is_that_of_ddp_on_the_same_tokens(zygote, prepared, tmp_path):
    settings = {"max_steps": 60, "learning_rate": 3e-3, "mixed_precision": "no"}
    bytes_of_ddp = {"int8": 0.26, "int4": 0.14, "powersgd": 0.3, "diloco_int8": 0.12}
    folders = [finish(zygote, prepared, tmp_path / "ddp", **settings)]
    for name in bytes_of_ddp:
        plain = {"outer_lr": 1.0, "outer_momentum": 0.0} if "diloco" in name else {}
        changed = {**settings, **STRATEGIES[name], **plain}
        folders.append(finish(zygote, prepared, tmp_path / name, **changed))
    ddp, *others = [json.loads((f / "all_results.json").read_text()) for f in folders]
    assert ddp["eval_loss"] < 4.5, "of 5.7 by guessing"
    for (name, most), other in zip(bytes_of_ddp.items(), others, strict=True):
        assert other["eval_loss"] == pytest.approx(ddp["eval_loss"], rel=0.03), name
        assert 0 < other["bytes_sent_per_update"] < most * ddp["bytes_sent_per_update"], name


def test_a_run_cannot_end_with_pseudo_gradients_that_are_on_their_way(zygote, prepared, tmp_path):
    """They are not in the checkpoint's model, and a further update is needed to apply them."""
    settings = {**DILOCO, "sync_every": 5, "save_every": 5, "overlap_steps": 2}
    settings |= {"lr_scheduler": "constant", "keep_checkpoints": 9}
    folder = finish(zygote, prepared, tmp_path / "run", **settings, max_steps=8)
    settings["resume"] = folder / "checkpoint-5"
    refused(zygote, tmp_path / "log", flags(prepared, folder, **settings, max_steps=5), 3)
    assert "at least one more update with --max-steps 6" in read(tmp_path / "log")
    finish(zygote, prepared, folder, 3, **settings, max_steps=6)
    result = json.loads((folder / "all_results.json").read_text())
    assert result["eval_loss"] < 5.7, "it has learned since its start"


def test_a_round_is_resumed_in_its_middle_only_as_it_was(zygote, prepared, tmp_path):
    """Each way out that the refusals name leads out. (All refusals: tests/sync/test_resume.py.)"""
    settings = {**DILOCO, "sync_every": 8, "save_every": 4, "keep_checkpoints": 9}
    settings |= {"lr_scheduler": "constant"}
    folder = finish(zygote, prepared, tmp_path / "run", **settings, max_steps=18)
    log = tmp_path / "log"
    middle = {"resume": folder / "checkpoint-12", "max_steps": 17}
    refused(zygote, log, flags(prepared, folder, **settings | middle), 3)
    assert "a round of 2 process(es)" in read(log)
    assert "or resume from a checkpoint of the end of a round" in read(log)
    ddp = {key: value for key, value in settings.items() if key not in OF_DILOCO}
    refused(zygote, log, flags(prepared, folder, **ddp | middle | {"sync": "ddp"}), 2)
    end = {"resume": folder / "checkpoint-16", "max_steps": 20, "sync_every": 4}
    finish(zygote, prepared, folder, 3, **settings | end)


def refused(zygote, log, words, processes):
    """Start a run that all of its ranks refuse with a message."""
    log.unlink(missing_ok=True)
    ranks = start_ranks(zygote, words, processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [2] * processes, read(log)
    assert "Traceback" not in read(log)


def test_a_peer_with_another_model_is_refused_by_name(zygote, prepared, tmp_path):
    """(Other differences: tests/sync/test_strategy.py.)"""
    from transformers import GPT2Config, GPT2LMHeadModel

    log, launch, ranks = tmp_path / "log", by_hand(2), []
    for rank in range(2):
        sizes = {"n_layer": 2 + rank, "n_head": 2, "n_embd": 32, "n_positions": 32}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = tmp_path / f"of_rank_{rank}"
        GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes, **ends)).save_pretrained(model)
        shutil.copytree(prepared / "tokenizer", model, dirs_exist_ok=True)
        settings = {
            "model_type": None,
            "config_overrides": None,
            "max_steps": 2,
            "model_name": model,
        }
        words = flags(prepared, tmp_path / "run", **settings, **launch, rank=rank)
        ranks.append(zygote.start(words, log))
    assert [zygote.wait(pid) for pid in ranks] == [2, 2], read(log)
    expected = r"rank 1 \(.*\): has another model than rank 0: transformer.h.2"
    assert re.search(expected, read(log)), read(log)
    assert not (tmp_path / "run" / "run.json").exists()
