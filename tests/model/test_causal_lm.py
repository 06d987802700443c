"""Models fit their data or are refused; groups and schedules are those of the field."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import causal_lm as models
from tests.conftest import SEQUENCE_LENGTH, TINY_MODEL


@pytest.fixture(scope="module")
def data(prepared):
    return open_prepared(prepared)


def test_the_default_is_a_small_gpt2_that_fits_the_data(data):
    lm = models.build_model(TrainConfig(), data)
    assert lm.config.model_type == "gpt2"
    assert lm.config.vocab_size == data.manifest.vocab_size
    assert lm.config.n_positions == SEQUENCE_LENGTH
    assert lm.config.eos_token_id == data.manifest.eos_token_id
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt"])
def test_families_are_built_with_the_sizes_that_were_asked_for(data, family):
    overrides = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
    if family in ("llama", "qwen3"):
        overrides += ",intermediate_size=48,num_key_value_heads=1"
    if family == "opt":
        overrides += ",ffn_dim=48,word_embed_proj_dim=32"
    lm = models.build_model(TrainConfig(model_type=family, config_overrides=overrides), data)
    assert lm.config.model_type == family
    assert (lm.config.hidden_size, lm.config.num_hidden_layers) == (32, 2)
    assert lm.get_input_embeddings().num_embeddings == data.manifest.vocab_size
    tokens = torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.int64)
    assert lm(input_ids=tokens).logits.shape[-1] == data.manifest.vocab_size


def test_initial_weights_depend_on_the_seed_alone(data):
    def weights(seed):
        torch.rand(seed + 1)
        lm = models.build_model(TrainConfig(config_overrides=TINY_MODEL, seed=seed), data)
        return torch.cat([p.flatten() for p in lm.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "lama"}, "unknown model type 'lama': did you mean llama"),
        ({"config_overrides": "n_layers=2"}, "has no 'n_layers': did you mean n_layer"),
        ({"config_overrides": "n_layer=two"}, "n_layer is 'two', expected a number like 12"),
        ({"config_overrides": "n_layer"}, "'n_layer' is not KEY=VALUE"),
        ({"config_overrides": "n_embd=10,n_head=3"}, "--config-overrides"),
        ({"config_overrides": "vocab_size=10"}, "the data has 300 tokens"),
        ({"config_overrides": "n_positions=16"}, "prepare the data with --sequence-length 16"),
        (
            {"model_type": "llama", "config_overrides": "hidden_size=200000"},
            "make it smaller with --config-overrides",
        ),
    ],
)
def test_what_cannot_be_built_is_told_with_the_mend(data, settings, told):
    with pytest.raises(ForgeError) as error:
        models.build_model(TrainConfig(**settings), data)
    assert told in str(error.value)


def test_a_name_that_cannot_be_reached_is_told(data):
    with pytest.raises(ForgeError, match="no-such-org/no-such-model could not be loaded"):
        models.load_model("no-such-org/no-such-model", data)
    with pytest.raises(ForgeError, match="no such folder"):
        models.load_model("./nowhere", data)


def save(folder, tokenizer_dir=None, **sizes):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, **sizes)).save_pretrained(folder)
    if tokenizer_dir:
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)


def test_a_saved_model_is_loaded_in_float32(data, tmp_path):
    save(tmp_path, data.tokenizer_dir, vocab_size=300, n_positions=64, dtype="bfloat16")
    lm = models.load_model(str(tmp_path), data)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


def test_a_model_that_disagrees_with_the_data_is_refused(data, tmp_path):
    save(tmp_path / "small", vocab_size=200, n_positions=64)
    with pytest.raises(ForgeError, match="vocabulary of 300 tokens, model .* has 200"):
        models.load_model(str(tmp_path / "small"), data)
    save(tmp_path / "short", vocab_size=300, n_positions=16)
    with pytest.raises(ForgeError, match="takes at most 16"):
        models.load_model(str(tmp_path / "short"), data)


def test_a_model_with_another_tokenizer_is_refused(data, tmp_path):
    from p2p_llm_forge.data.tokenizer import train_tokenizer

    train_tokenizer(["other words entirely"] * 3, 280).save_pretrained(tmp_path)
    save(tmp_path, vocab_size=300, n_positions=64)
    with pytest.raises(ForgeError, match="another tokenizer .* prepare_data.py --tokenizer"):
        models.load_model(str(tmp_path), data)


def test_only_matrices_are_decayed(data):
    config = TrainConfig(config_overrides=TINY_MODEL, weight_decay=0.3)
    lm = models.build_model(config, data)
    decay_of = {
        id(p): group["weight_decay"]
        for group in models.build_optimizer(config, lm).param_groups
        for p in group["params"]
    }
    assert len(decay_of) == len(list(lm.parameters()))
    for name, parameter in lm.named_parameters():
        assert decay_of[id(parameter)] == (0.3 if parameter.dim() >= 2 else 0.0), name


@pytest.mark.parametrize(
    ("name", "theirs", "extra"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("constant", "constant_with_warmup", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 20}),
        ("polynomial", "polynomial", {}),
    ],
)
def test_the_rate_at_a_step_is_that_of_transformers_scheduler_stepped_there(name, theirs, extra):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    stepped = get_scheduler(theirs, optimizer, 10, 100, scheduler_specific_kwargs=extra)
    factor = models.learning_rate_factor(TrainConfig(lr_scheduler=name, warmup_steps=10), 100)
    # The polynomial schedule ends at an absolute rate, 1e-7, so it is not exactly proportional.
    for step in range(100):
        assert 2.0 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        stepped.step()


def test_unknown_schedules_are_told_with_the_nearest_name():
    with pytest.raises(ForgeError, match="unknown schedule 'cosin': did you mean cosine"):
        models.learning_rate_factor(TrainConfig(lr_scheduler="cosin"), 10)
    with pytest.raises(ForgeError, match="no function of the step alone"):
        models.learning_rate_factor(TrainConfig(lr_scheduler="reduce_lr_on_plateau"), 10)
