"""GGUF files, compared with what llama.cpp and transformers each make of the same model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.tokenizer import train_tokenizer
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import new_model_config
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.model.sizes import sizes_asked_for
from p2p_llm_forge.training.settle import settle
from p2p_llm_forge.using.gguf_file import require_exportable_family, write_gguf
from p2p_llm_forge.using.loading import load
from tests import ROOT
from tests.using.models import CHAT, SIZES, TEXT, byte_tokenizer, save_model

STRANGER = ROOT / "tests" / "using" / "stranger_llama.py"
NEW = 12
HARD = [
    *TEXT,
    "don't we'll I'VE  two  spaces\ttab\r\n\n\nthree lines   ",
    "x=1;y[2]={'a':3.14}//_snake__case 1234567890",
    "é́ \u00a0 \u200d \u2028 ÅÄÖ İıŞş ß ﬁ ½ ² ① Ⅷ ١٢٣ हिन्दी ไทย 한국어 🇹🇷 👨‍👩‍👧",
]


def random_text(seed: int) -> str:
    """Letters, marks, digits and signs of all kinds, with spaces between some."""
    draw = random.Random(seed)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x6FF), (0x900, 0xFFF), (0x3040, 0x9FFF)]
    ranges += [(0x1F300, 0x1FAFF)]
    return "".join(
        draw.choice([" ", "", "", "'s", "\n"]) + chr(draw.randint(*draw.choice(ranges)))
        for _ in range(60)
    )


ROTARY = {"rope_type": "default", "rope_theta": 50_000.0}


def lfm2(*layer_types: str, **sizes: Any) -> dict[str, Any]:
    return {"num_hidden_layers": len(layer_types), "layer_types": [*layer_types], **sizes}


VARIANTS: list[dict[str, dict[str, Any]]] = [
    {
        "gpt2": {},
        "llama": {"tie_word_embeddings": True, "vocab_size": 384},  # rows without a word
        "qwen3": {"rope_parameters": ROTARY},
    },
    {
        "lfm2": {},
        "lfm2 grouped": lfm2(
            *("conv", "full_attention", "full_attention", "conv"),
            **{"tie_word_embeddings": True, "num_key_value_heads": 2, "conv_L_cache": 5},
            **{"block_auto_adjust_ff_dim": True, "block_multiple_of": 7, "norm_eps": 1e-2},
        ),
        "lfm2 attention first": lfm2("full_attention", "conv", rope_parameters=ROTARY),
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("variants", VARIANTS)
def test_llama_cpp_computes_what_transformers_does(tmp_path, variants):
    texts = [*HARD, *map(random_text, range(40))]
    folders = [
        save_model(tmp_path / name, name.split()[0], CHAT, **how) for name, how in variants.items()
    ]
    files = []
    for folder in folders:
        for as_f16, name in ((False, "f32"), (True, "f16")):
            files.append(tmp_path / f"{folder.name}-{name}.gguf")
            model = load(str(folder), torch.device("cpu"), torch.float32)
            write_gguf(model, files[-1], "a title", as_f16)
    assert files[1].stat().st_size < 0.7 * files[0].stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    prompts = [tokenizer(text)["input_ids"][:20] for text in TEXT]
    answers = by_llama_cpp(files, texts, prompts, tokenizer.convert_tokens_to_ids("a"))

    for number, answer in enumerate(answers):
        folder, is_exact = folders[number // 2], number % 2 == 0
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert answer["texts"] == [tokenizer(text)["input_ids"] for text in texts]
        for prompt, found, greedy in zip(
            prompts, answer["logprobs"], answer["greedy"], strict=True
        ):
            inputs = torch.tensor([prompt])
            with torch.no_grad():
                expected = lm(inputs).logits[0, -1].log_softmax(-1)
            seen = torch.tensor([found[str(token)] for token in range(len(expected))])
            gap = float((seen - expected).abs().max())
            # GPT-2's GELU is a table of float16 in llama.cpp.
            assert gap < (2e-3 if folder.name == "gpt2" else 1e-4) if is_exact else gap < 0.1
            if is_exact:
                drawn = lm.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=False,
                    max_new_tokens=NEW,
                    pad_token_id=0,
                )
                assert greedy == drawn[0, len(prompt) :].tolist()


def by_llama_cpp(files: list[Path], texts: list[str], prompts: list, plain: int) -> list[dict]:
    question = {"texts": texts, "prompts": prompts, "new": NEW, "plain": plain}
    done = subprocess.run(
        [sys.executable, STRANGER, json.dumps(question), *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "sizes", "found"),
    [
        ("mistral", {}, "the export knows llama, qwen3, lfm2, gpt2, this is a mistral"),
        ("nanochat", {}, "this is a nanochat"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions of type linear",
        ),
        (
            "lfm2",
            {
                **lfm2("conv", "full_attention"),
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
            },
            "rotary positions of type yarn",
        ),
    ],
)
def test_what_gguf_would_compute_otherwise_is_refused(family, sizes, found):
    with pytest.raises(ForgeError, match="convert_hf_to_gguf") as refused:
        require_exportable_family(AutoConfig.for_model(family, **sizes))
    assert found in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"conv_bias": True}, "conv_bias=True"),
        ({"conv_L_cache": 1}, "conv_L_cache=1"),
        ({"head_dim": 16}, "hidden_size=32, and heads of 64 together"),
        ({"hidden_size": 34}, "hidden_size=34, and heads of 32 together"),
    ],
)
def test_the_fix_of_what_llama_cpp_cannot_run_makes_a_model_that_it_can(sizes, found):
    sizes = {**SIZES["lfm2"], **sizes}
    with pytest.raises(ForgeError, match="llama.cpp runs none such") as refused:
        require_exportable_family(AutoConfig.for_model("lfm2", **sizes))
    (problem,) = refused.value.problems
    assert found in problem.found
    overrides = problem.fix.partition("--config-overrides ")[2]
    _, fixed = sizes_asked_for(TrainConfig(model_type="lfm2", config_overrides=overrides))
    require_exportable_family(AutoConfig.for_model("lfm2", **{**sizes, **fixed}))


@pytest.mark.parametrize("kind", ["conv", "full_attention"])
def test_the_fix_of_a_single_kind_of_layer_is_a_depth_that_has_both(kind, tmp_path):
    with pytest.raises(ForgeError, match=f"layers of {kind} only") as refused:
        require_exportable_family(AutoConfig.for_model("lfm2", **{**SIZES["lfm2"], **lfm2(kind)}))
    (problem,) = refused.value.problems
    depth = int(problem.fix.rpartition("--depth ")[2])
    fixed = new_model_config(settle(TrainConfig(depth=depth)), TextSpec(300, 0, 32, tmp_path))
    assert fixed.model_type == "lfm2"
    require_exportable_family(fixed)


def test_convolutions_stay_in_float32(tmp_path):
    model = load(str(save_model(tmp_path / "m", "lfm2")), torch.device("cpu"), torch.float32)
    write_gguf(model, tmp_path / "m.gguf", "m", as_f16=True)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kernels = {name for name in kinds if name.endswith("shortconv.conv.weight")}
    assert kernels == {f"blk.{layer}.shortconv.conv.weight" for layer in (0, 1)}
    assert {kinds[name] for name in kernels} == {"F32"}
    assert kinds["output.weight"] == kinds["blk.0.shortconv.in_proj.weight"] == "F16"


def test_another_tokenizer_or_weight_is_refused(tmp_path):
    from tests.data.tokenizers import word_tokenizer

    file = tmp_path / "x.gguf"
    folder = save_model(tmp_path / "words", "llama")
    word_tokenizer().save_pretrained(folder)
    model = load(str(folder), torch.device("cpu"), torch.float32)
    with pytest.raises(ForgeError, match="not a byte-level BPE .*: model"):
        write_gguf(model, file, "x", as_f16=False)
    byte_tokenizer().save_pretrained(folder)
    model = load(str(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.lm.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ForgeError, match="output.weight holds 1e.06, which float16 cannot"):
        write_gguf(model, file, "x", as_f16=True)


def test_tokenizers_that_are_trained_here_can_be_written(tmp_path):
    vocab_size = PrepareConfig().vocab_size
    folder = save_model(tmp_path / "own", "qwen3", vocab_size=vocab_size)
    train_tokenizer(TEXT * 3, vocab_size).save_pretrained(folder)
    model = load(str(folder), torch.device("cpu"), torch.float32)
    write_gguf(model, tmp_path / "own.gguf", "own", as_f16=True)
    assert (tmp_path / "own.gguf").stat().st_size > 10_000
