"""Adapters are peft's own: what is put in, saved and merged here is the same there."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.lora import BASE, CONFIG, WEIGHTS
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model, load_model
from p2p_llm_forge.model.lora import (
    adapter_parameters,
    add_adapters,
    base_fingerprint,
    load_adapters,
    lora_in_words,
    merge,
    saved_parameters,
    write_adapters,
)
from p2p_llm_forge.using.loading import load
from tests import ROOT
from tests.model.adapted import a_gpt2, a_llama, logits_of, shaken

STRANGER = ROOT / "tests/model/stranger_peft.py"


def asked(base, **settings):
    return TrainConfig(model_name=base, **{"lora_rank": 4, **settings})


@pytest.fixture
def llama(tmp_path, tokenizer_dir):
    return a_llama(tmp_path / "llama", tokenizer_dir)


def is_same(one, other):
    """But for the last bits, which depend on the number of threads."""
    return torch.allclose(one, other, rtol=0, atol=1e-6)


def saved(folder, lm):
    folder.mkdir()
    write_adapters(folder, lm, saved_parameters(lm))
    return folder


@pytest.mark.parametrize("family", [a_llama, a_gpt2])
def test_peft_and_transformers_read_what_is_saved_and_compute_the_same(
    tmp_path, tokenizer_dir, text, run, family
):
    base = family(tmp_path / "base", tokenizer_dir)
    lm = shaken(build_model(asked(base, lora_targets=["all-linear"], lora_alpha=3), text))
    folder = saved(tmp_path / "adapters", lm)
    status, output = run(sys.executable, STRANGER, base, folder, tmp_path / "logits")
    assert status == 0, output
    theirs, ours = load_file(tmp_path / "logits"), logits_of(lm)
    assert (theirs["base"] - ours).abs().max() > 1e-3  # the adapters do something
    assert is_same(theirs["adapted"], ours) and is_same(theirs["by_transformers"], ours)
    merge(lm)
    assert is_same(theirs["merged"], logits_of(lm))
    assert not [name for name in lm.state_dict() if "lora" in name or "base_layer" in name]
    again = load_model(str(folder), text)  # adds them to the base itself
    assert is_same(logits_of(again), theirs["merged"])


def test_only_adapters_learn_and_the_seed_decides_them(llama, text):
    first, same, other = (build_model(asked(llama, seed=seed), text) for seed in (1, 1, 2))
    learns = {name for name, p in first.named_parameters() if p.requires_grad}
    assert learns == {*adapter_parameters(first)} and len(learns) == 2 * 2 * 7  # all but the head
    assert not [name for name in learns if "lm_head" in name]
    one, two, three = (list(adapter_parameters(lm).values()) for lm in (first, same, other))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert torch.equal(logits_of(first), logits_of(load_model(llama, text)))  # they add nothing
    words = lora_in_words(first)
    where = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    trained = sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert f"rank 4, alpha 8, in {where}: {trained:,} of" in words


def test_targets_that_name_nothing_are_refused_with_the_names_there_are(llama, text):
    with pytest.raises(ForgeError, match="this llama has no layer called c_attn") as error:
        build_model(asked(llama, lora_targets=["q_proj", "c_attn"]), text)
    fix = error.value.problems[0].fix
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert f"name others: {' '.join(names)};" in fix
    assert build_model(asked(llama, lora_targets=names), text)  # followed to the letter


def test_a_base_in_bfloat16_has_the_same_fingerprint_and_adapters_in_float32(llama, text):
    lm = build_model(asked(llama, base_dtype="bfloat16"), text)
    own = adapter_parameters(lm)
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {p.dtype for n, p in lm.named_parameters() if n not in own} == {torch.bfloat16}
    assert base_fingerprint(lm) == base_fingerprint(load_model(llama, text))


def test_adapters_are_loaded_only_beside_the_base_and_with_the_rank_they_had(
    llama, tmp_path, tokenizer_dir, text
):
    lm = shaken(build_model(asked(llama), text))
    folder = saved(tmp_path / "adapters", lm)
    again = build_model(asked(llama), text)
    load_adapters(again, folder)
    assert torch.equal(logits_of(again), logits_of(lm))

    with pytest.raises(ForgeError, match="--lora-rank 4, asked was 2"):
        load_adapters(build_model(asked(llama, lora_rank=2, lora_alpha=8), text), folder)
    with pytest.raises(ForgeError, match="--lora-alpha 8, asked was 9"):
        load_adapters(build_model(asked(llama, lora_alpha=9), text), folder)
    with pytest.raises(ForgeError, match="in other layers"):
        load_adapters(build_model(asked(llama, lora_targets=["q_proj"]), text), folder)
    other = a_llama(tmp_path / "other", tokenizer_dir, seed=5)
    with pytest.raises(ForgeError, match="belong to other weights") as error:
        load_adapters(build_model(asked(other), text), folder)
    assert llama in error.value.problems[0].found


def test_damaged_adapters_and_a_base_that_is_gone_are_named(llama, tmp_path, text):
    folder = saved(tmp_path / "adapters", shaken(build_model(asked(llama), text)))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-40])
    with pytest.raises(ForgeError, match=f"{WEIGHTS} cannot be read"):
        load_model(str(folder), text)
    (folder / WEIGHTS).write_bytes(whole)
    (folder / BASE).write_text("[]")
    with pytest.raises(ForgeError, match=f"{BASE} cannot be read") as error:
        load_model(str(folder), text)
    assert error.value.problems[0].fix == "copy the whole folder again"  # and so it is below
    (folder / BASE).unlink()  # as other programs leave it
    assert load_model(str(folder), text)
    settings = json.loads((folder / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == llama
    (folder / CONFIG).write_text(json.dumps({**settings, "base_model_name_or_path": "/no/where"}))
    with pytest.raises(ForgeError, match="of /no/where, and there is no such folder") as error:
        load_model(str(folder), text)
    gone = str(tmp_path / "gone")
    (folder / CONFIG).write_text(json.dumps({**settings, "base_model_name_or_path": gone}))
    with pytest.raises(ForgeError, match=f"of {gone}, and there is no such folder") as error:
        load_model(str(folder), text)
    assert error.value.problems[0].fix == f"put the base, or a link to it (ln -s), at {gone}"
    os.symlink(llama, gone)
    assert load_model(str(folder), text)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ForgeError, match=f"{CONFIG} cannot be read"):
        load_model(str(folder), text)


def test_adapters_of_other_programs_of_any_kind_are_added_or_refused(llama, tmp_path, text, run):
    status, output = run(sys.executable, STRANGER.with_name("stranger_kinds.py"), llama, tmp_path)
    assert status == 0, output
    theirs = load_file(tmp_path / "logits.safetensors")
    for kind in ("dora", "head", "loha", "ia3"):
        own = logits_of(load_model(str(tmp_path / kind), text))
        assert torch.allclose(own, theirs[kind], rtol=0, atol=1e-4), kind
        used = load(str(tmp_path / kind), torch.device("cpu"))  # with the tokenizer of its base
        assert torch.allclose(logits_of(used.lm), theirs[kind], rtol=0, atol=1e-4), kind
        assert used.tokenizer.get_vocab() == load(llama, used.lm.device).tokenizer.get_vocab()
    with pytest.raises(ForgeError, match="PROMPT_TUNING, which adds nothing to a model's") as error:
        load_model(str(tmp_path / "prompt"), text)
    assert error.value.problems[0].fix.startswith("give adapters that do, such as LoRA's")
    weights = load_file(tmp_path / "dora" / WEIGHTS)
    save_file(dict(list(weights.items())[1:]), tmp_path / "dora" / WEIGHTS)
    with pytest.raises(ForgeError, match="peft cannot add the adapters in") as error:
        load_model(str(tmp_path / "dora"), text)
    assert error.value.problems[0].fix.startswith("copy the whole folder again")
    save_file(weights, tmp_path / "dora" / WEIGHTS)
    assert load_model(str(tmp_path / "dora"), text)


def test_adapters_are_no_base_for_others(llama, tmp_path, text):
    folder = saved(tmp_path / "adapters", build_model(asked(llama), text))
    with pytest.raises(ForgeError, match="holds adapters, and new ones need the weights") as error:
        build_model(asked(str(folder)), text)
    fix = "give the model that they belong to, or the same run's with --merge-lora"
    assert error.value.problems[0].fix == fix
    assert build_model(asked(llama), text)
    load_model(str(folder), text).save_pretrained(tmp_path / "merged")
    assert build_model(asked(str(tmp_path / "merged")), text)


def test_a_model_without_layers_to_adapt_is_refused_with_what_there_is(llama, text):
    lm = load_model(llama, text)
    for layer in lm.model.layers:  # as of a family whose products are of no known layers
        for part in (layer.self_attn, layer.mlp):
            for name, _ in list(part.named_children()):
                setattr(part, name, torch.nn.Identity())
    with pytest.raises(ForgeError, match="--lora-targets all-linear: peft cannot adapt") as error:
        add_adapters(lm, asked(llama))
    names = error.value.problems[0].fix.removeprefix("name others: ").split()
    assert names == ["lm_head"]
    add_adapters(lm, asked(llama, lora_targets=names))
    assert len(adapter_parameters(lm)) == 2


def test_a_tied_head_gets_no_adapters(tmp_path, tokenizer_dir, text):
    base = a_gpt2(tmp_path / "gpt2", tokenizer_dir)
    with pytest.raises(ForgeError, match="has no layer called lm_head"):
        build_model(asked(base, lora_targets=["lm_head"]), text)
