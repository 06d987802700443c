"""Tokenizers: training is repeatable, fingerprints tell them apart, text is counted in bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, GPTSw3Tokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    reference_encoder,
    train_tokenizer,
)
from p2p_llm_forge.errors import ForgeError
from prepare_data import main
from tests import ROOT
from tests.data.preparations import with_tokenizer
from tests.data.tokenizers import (
    byte_tokenizer,
    per_document,
    sentencepiece_tokenizer,
    some_documents,
    word_by_word,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(some_documents(), 600)


def test_training_is_deterministic_and_knows_its_end_of_text(tmp_path):
    first, second = (train_tokenizer(some_documents(), 500) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 500 == tokenization.vocabulary_size(first)
    assert first.eos_token == END_OF_TEXT
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == first.eos_token_id
    assert tokenization.tokenizer_fingerprint(loaded) == tokenization.tokenizer_fingerprint(first)


def test_training_takes_a_stream_and_stops_where_the_text_has_no_more_pairs():
    small = train_tokenizer(iter(["ab ab", "ab"]), 5_000)
    assert 257 <= len(small) < 300


def test_fingerprints_differ_where_the_tokens_or_the_end_of_text_do(tokenizer):
    other_text = train_tokenizer(some_documents(seed=9), 600)
    other_end = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="peer"
    )
    prints = {tokenization.tokenizer_fingerprint(t) for t in (tokenizer, other_text, other_end)}
    assert len(prints) == 3


def saved(tokenizer, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def print_of(folder: str, **how) -> str:
    return tokenization.tokenizer_fingerprint(load_tokenizer(folder, **how))


def test_a_slow_tokenizers_fingerprint_covers_how_it_behaves(tmp_path):
    plain = sentencepiece_tokenizer(tmp_path)
    folders = {}
    for name, value in (("do_lower_case", True), ("remove_space", True), ("keep_accents", True)):
        tokenizer = GPTSw3Tokenizer(
            str(tmp_path / "sp.model"), eos_token="<|end|>", **{name: value}
        )
        folders[name] = saved(tokenizer, tmp_path / name)
    # The trap: behaviour differs, the vocabulary does not.
    lower = load_tokenizer(folders["do_lower_case"])
    assert lower.get_vocab() == load_tokenizer(folders["keep_accents"]).get_vocab()
    prints = {print_of(folder) for folder in (saved(plain, tmp_path / "a"), *folders.values())}
    assert len(prints) == 4
    words = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    words["added_tokens_decoder"]["3"]["lstrip"] = True
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(words))
    assert print_of(str(tmp_path / "a")) not in prints


def test_a_slow_tokenizers_fingerprint_is_the_same_wherever_and_however_it_was_reached(
    tmp_path, monkeypatch
):
    folder = saved(sentencepiece_tokenizer(tmp_path), tmp_path / "one")
    shutil.copytree(folder, tmp_path / "elsewhere" / "two")
    prints = {print_of(folder), print_of(str(tmp_path / "elsewhere" / "two"))}
    monkeypatch.chdir(tmp_path)
    prints.add(print_of("one"))
    prints.add(print_of(saved(load_tokenizer(folder), tmp_path / "saved_again")))
    # As the cache of the Hub holds it, and in a process whose sets have an order of their own.
    cached, commit = tmp_path / "hub" / "models--some--one", "0123" * 10
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / ".no_exist" / commit).mkdir(parents=True)
    (cached / ".no_exist" / commit / "config.json").touch()
    environ = os.environ | {"PYTHONHASHSEED": "2", "HF_HUB_CACHE": str(tmp_path / "hub")}
    words = [sys.executable, "-m", "tests.data.print_fingerprint", "some/one"]
    answer = subprocess.run(words, env=environ, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    prints.add(answer.stdout.decode().split()[-1])
    assert len(prints) == 1


def test_a_tokenizers_own_code_is_part_of_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    prints = []
    for name, change in ("same", ""), ("copy", ""), ("other", "# another comment\n"):
        word_by_word(tmp_path / name, change)
        prints.append(print_of(str(tmp_path / name), trust_remote_code=True))
    assert prints[0] == prints[1] != prints[2]


def test_dropout_is_switched_off_and_said(tmp_path, capsys):
    folder = saved(byte_tokenizer(), tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "random")
    rules = json.loads((tmp_path / "random" / "tokenizer.json").read_text())
    rules["model"]["dropout"] = 0.4
    (tmp_path / "random" / "tokenizer.json").write_text(json.dumps(rules))
    texts = some_documents(20)
    trap = Tokenizer.from_file(str(tmp_path / "random" / "tokenizer.json"))
    assert trap.encode_batch(texts)[0].ids != trap.encode_batch(texts)[0].ids
    said = []
    tokenizer = load_tokenizer(str(tmp_path / "random"), report=said.append)
    assert len(said) == 1 and "dropout 0.4" in said[0] and "switched off" in said[0]
    plain = load_tokenizer(folder, report=said.append)
    assert len(said) == 1
    assert tokenizer(texts)["input_ids"] == plain(texts)["input_ids"]
    assert print_of(folder) == tokenization.tokenizer_fingerprint(tokenizer)
    assert Encoders(tokenizer).is_fast
    # The prepared dataset's own tokenizer gives the dataset's tokens, each time.
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    asked = with_tokenizer(tmp_path / "text.txt", tmp_path / "out", tmp_path / "random")
    prepare(asked)
    assert capsys.readouterr().out.count("dropout 0.4") == 1
    kept = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text())
    assert kept["model"]["dropout"] is None


def test_sampling_of_a_slow_tokenizer_is_switched_off_and_said(tmp_path):
    plain = sentencepiece_tokenizer(tmp_path)
    sampling = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    model = str(tmp_path / "sp.model")
    trap = GPTSw3Tokenizer(model, eos_token="<|end|>", sp_model_kwargs=sampling)
    text = "hello world hello world"
    assert len({tuple(trap(text)["input_ids"]) for _ in range(20)}) > 1
    said = []
    tokenizer = load_tokenizer(saved(trap, tmp_path / "random"), report=said.append)
    assert len(said) == 1 and "enable_sampling" in said[0]
    for _ in range(20):
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    again = load_tokenizer(saved(tokenizer, tmp_path / "kept"), report=said.append)
    assert len(said) == 1
    assert again(text)["input_ids"] == plain(text)["input_ids"]


def test_a_tokenizer_that_is_random_by_its_own_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    word_by_word(tmp_path / "calm")
    Encoders(load_tokenizer(str(tmp_path / "calm"), trust_remote_code=True))
    tokenizer = load_tokenizer(str(tmp_path / "calm"), trust_remote_code=True)
    tokenizer._tokenize = lambda text: text.split()[random.randrange(2) :]
    with pytest.raises(ForgeError, match="at random"):
        Encoders(tokenizer)


def test_a_tokenizers_own_code_is_run_only_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    word_by_word(tmp_path / "own")
    fix = "(?s)own Python code.*read that code and, only if you trust it, add --trust-remote-code"
    with pytest.raises(ForgeError, match=fix):
        load_tokenizer(str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text("some words " * 50)
    trusted = {"trust_remote_code": True}
    prepare(with_tokenizer(tmp_path / "a.txt", tmp_path / "out", tmp_path / "own", **trusted))
    with pytest.raises(ForgeError, match=fix):
        main(["--describe", str(tmp_path / "out")])
    assert main(["--describe", str(tmp_path / "out"), "--trust-remote-code"]) == 0


@pytest.mark.parametrize("name", ["nobody/no-such-tokenizer", "./no/such/folder"])
def test_a_tokenizer_out_of_reach_is_a_clear_error(name):
    with pytest.raises(ForgeError) as error:
        load_tokenizer(name)
    assert name in str(error.value) and "save_pretrained" in str(error.value)


def test_a_tokenizer_without_end_of_text_is_a_clear_error(tmp_path):
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["some text"], trainers.BpeTrainer(show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ForgeError, match="eos_token"):
        load_tokenizer(str(tmp_path))


def test_an_end_of_text_that_is_asked_for_is_added(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), eos_token="<end>")
    assert loaded.eos_token == "<end>" and loaded.eos_token_id == len(tokenizer)
    assert tokenization.vocabulary_size(loaded) == len(tokenizer) + 1


def test_a_vocabulary_reaches_to_its_largest_id(tokenizer):
    assert tokenization.vocabulary_size(tokenizer) == 600
    assert tokenization.vocabulary_size(ByT5Tokenizer()) == 3 + 256 + 125


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(size, dtype):
    assert tokenization.token_dtype(size) == dtype
    assert np.iinfo(dtype).max >= size - 1


def test_a_vocabulary_of_more_than_four_bytes_is_refused():
    assert tokenization.token_dtype(2**32) == "uint32"
    with pytest.raises(ForgeError, match="at most 4,294,967,296 fit"):
        tokenization.token_dtype(2**32 + 1)


@pytest.mark.parametrize("make", [word_tokenizer, ByT5Tokenizer])
def test_control_tokens_are_those_that_no_text_may_produce(make):
    tokenizer = make()
    control = tokenization.control_tokens(tokenizer)
    assert control[tokenizer.eos_token] == tokenizer.eos_token_id
    assert tokenizer.unk_token not in control


def test_the_reference_is_the_tokenizers_own_answer_in_rust_and_in_python(tokenizer):
    texts = some_documents(20, seed=5)
    for asked in (tokenizer, ByT5Tokenizer()):
        tokens, lengths = reference_encoder(asked)(column_of([text.encode() for text in texts]))
        expected = [asked(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert per_document(tokens, lengths) == expected
    assert tokenization.is_slow(ByT5Tokenizer()) and not tokenization.is_slow(tokenizer)
