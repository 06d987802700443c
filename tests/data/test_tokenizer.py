"""Tokenizers: training is repeatable, fingerprints tell them apart, text is counted in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    reference_encoder,
    train_tokenizer,
)
from p2p_llm_forge.errors import ForgeError
from tests.data.tokenizers import per_document, some_documents, word_tokenizer


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
