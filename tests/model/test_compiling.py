"""Compiled layers compute what the model computes, in every way that a run calls them."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.compiling import (
    compile_layers,
    compiled_by,
    keep_between_runs,
    repeated_layers,
    require_compiler,
    take_back,
    try_compiling,
    uncompiled,
)
from p2p_llm_forge.model.fit import in_evaluation
from p2p_llm_forge.model.loss import NextTokenLoss
from tests.model.families import CAPPED_OR_SCALED, FAMILIES, LLAMA, model_of

EOS = 1


@pytest.fixture(autouse=True)
def own_folder(monkeypatch):
    """What is set for this process is of one test; where compiled code lies is of all."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("gpt2", "GPT2Block"),
        ("llama", "LlamaDecoderLayer"),
        ("gpt_neox", "GPTNeoXLayer"),
        ("gemma2", "Gemma2DecoderLayer"),
    ],
)
def test_the_repeated_layer_is_found_whatever_the_family_calls_it(family, layer):
    layers = repeated_layers(model_of(family, **FAMILIES[family][0]))
    assert [type(one).__name__ for one in layers] == [layer, layer]


def test_experts_are_no_layers_and_a_model_without_layers_has_none():
    sizes = {**LLAMA, "num_hidden_layers": 3, "num_local_experts": 2, "num_experts_per_tok": 1}
    layers = repeated_layers(model_of("mixtral", **sizes))
    assert [type(one).__name__ for one in layers] == ["MixtralDecoderLayer"] * 3
    assert repeated_layers(type("LM", (), {"base_model": torch.nn.Linear(2, 2)})) == []


def outcome(model, tokens):
    """Nats and gradients by name."""
    nats, _ = model(tokens, tokens)
    nats.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    return nats.detach(), found


def test_compiled_layers_compute_the_same_with_mask_checkpointing_and_every_size():
    tokens = torch.randint(EOS + 1, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 7] = tokens[1:, 15] = EOS
    plain = model_of("llama", **LLAMA)
    own = copy.deepcopy(plain)
    recompute_activations(own)
    expected_of, model = NextTokenLoss(plain, EOS), NextTokenLoss(own, EOS)
    compile_layers(model.lm)
    for blocks in (3, 2, 3, 1):  # the last micro-batch of an update is smaller
        nats, gradients = outcome(model, tokens[:blocks])
        expected, expected_gradients = outcome(expected_of, tokens[:blocks])
        assert torch.allclose(nats, expected, rtol=1e-5)
        assert gradients.keys() == expected_gradients.keys() and gradients
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5), name
    with in_evaluation(model), uncompiled():
        evaluated = model(tokens, tokens, by_block=True)
    with in_evaluation(expected_of):
        plain_ones = expected_of(tokens, tokens, by_block=True)
    assert all(torch.equal(*pair) for pair in zip(evaluated, plain_ones, strict=True))
    assert list(model.state_dict()) == list(expected_of.state_dict())
    take_back(model.lm)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_trial_times_both_and_leaves_the_layers_compiled():
    model = NextTokenLoss(model_of("gpt2", **FAMILIES["gpt2"][0]))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    stances = []

    def call():
        stances.append(torch._dynamo.eval_frame._stance.stance)
        model(tokens, tokens)[0].backward()

    trial = try_compiling(model.lm, call, time.perf_counter)
    assert min(trial.eager_s, trial.compiled_s) > 0 and trial.compile_s > trial.compiled_s
    assert stances == ["default"] * 2 + ["force_eager", "default"] * 3
    assert all(layer._compiled_call_impl for layer in repeated_layers(model.lm))


def test_what_cannot_be_compiled_is_an_error_and_nothing_stays_compiled():
    lm = model_of("gpt2", **FAMILIES["gpt2"][0])

    def fail():
        raise RuntimeError("CppCompileError: ld returned 1\nand much more")

    with pytest.raises(ForgeError, match="fails with this gpt2: .*CppCompileError") as error:
        compiled_by(lm, fail)
    assert error.value.problems[0].fix == "leave --compile out"
    assert all(module._compiled_call_impl is None for module in lm.modules())


def test_a_machine_without_python_headers_is_told_what_to_install(monkeypatch, tmp_path):
    require_compiler(torch.device("cpu"))  # here there are some
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ForgeError, match="needs Python.h, and it is not in") as error:
        require_compiler(torch.device("cpu"))
    assert "python3-dev" in error.value.problems[0].fix
    (tmp_path / "Python.h").touch()  # as installed by that
    require_compiler(torch.device("cpu"))


def test_compiled_code_is_kept_in_the_users_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_between_runs()
    assert folder == tmp_path / "p2p-llm-forge" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert keep_between_runs() == tmp_path / "mine"


def test_torch_looks_for_what_it_has_compiled_before():
    import torch._functorch.config
    import torch._inductor.config

    assert torch._inductor.config.fx_graph_cache
    assert torch._functorch.config.enable_autograd_cache


@pytest.mark.parametrize("family", CAPPED_OR_SCALED)
def test_layers_of_odd_families_are_found(family):
    assert len(repeated_layers(model_of(family, **CAPPED_OR_SCALED[family][0]))) >= 2
