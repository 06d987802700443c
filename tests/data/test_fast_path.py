"""The fast path: a fast encoder that differs from the tokenizer is found out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from p2p_llm_forge.data import fast_path
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.fast_path import FastPathDiffers, check_fast_path, require_same, sample
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.tokenizer import END_OF_TEXT, reference_encoder, train_tokenizer
from tests.data.tokenizers import some_documents, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(some_documents(), 600)


def test_a_fast_encoder_that_differs_is_found_out_before_and_during_the_work(
    tokenizer, monkeypatch
):
    right = fast_path.fast_encoder

    def wrong_on(marker: bytes):
        def make(rules: str):
            encode = right(rules)

            def wrong(documents):
                tokens, lengths = encode(documents)
                if any(marker in document for document in documents.to_pylist()):
                    tokens = tokens[::-1].copy()
                return tokens, lengths

            return wrong

        return make

    monkeypatch.setattr(fast_path, "fast_encoder", wrong_on("ŉ".encode()))
    encoders = Encoders(tokenizer)
    assert not encoders.is_fast and "differ" in encoders.reason
    assert encoders.encode(column_of([b"peer"]))[0].tolist() == tokenizer("peer")["input_ids"]

    monkeypatch.setattr(fast_path, "fast_encoder", wrong_on(b"\xf0\x9f\xa6\x80"))
    encoders = Encoders(tokenizer)
    assert encoders.is_fast
    with pytest.raises(FastPathDiffers, match="peers"):
        # one document among thousands: sought out because it is not plain ASCII
        encoders.encode(column_of([b"peers and blocks"] * 5_000 + ["peers 🦀".encode()]))


def test_a_fast_path_that_passes_answers_as_the_tokenizer(tokenizer):
    rules, fast = check_fast_path(tokenizer, reference_encoder(tokenizer))
    documents = column_of([text.encode() for text in some_documents(100, seed=4)])
    expected = reference_encoder(tokenizer)(documents)
    for encode in (fast, fast_path.fast_encoder(rules)):
        for ours, right in zip(encode(documents), expected, strict=True):
            assert ours.dtype == right.dtype and np.array_equal(ours, right)


@pytest.mark.parametrize("make", [word_tokenizer, ByT5Tokenizer])
def test_a_tokenizer_that_gigatoken_does_not_support_is_named_with_the_reason(make):
    tokenizer = make()
    with pytest.raises(FastPathDiffers, match="gigatoken does not support it .+"):
        check_fast_path(tokenizer, reference_encoder(tokenizer))


def test_the_spellings_of_control_tokens_are_compared_too(tokenizer, monkeypatch):
    rules = fast_path.rules_of_text
    right = fast_path.fast_encoder
    monkeypatch.setattr(
        fast_path, "fast_encoder", lambda _: right(tokenizer.backend_tokenizer.to_str())
    )
    assert rules(tokenizer) != tokenizer.backend_tokenizer.to_str()
    with pytest.raises(FastPathDiffers, match=f"differ on .a .*{END_OF_TEXT[2:-2]}"):
        check_fast_path(tokenizer, reference_encoder(tokenizer))


def test_rules_of_text_are_the_tokenizer_without_its_special_tokens(tokenizer):
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [token["content"] for token in whole.pop("added_tokens")] == [END_OF_TEXT]
    rules = json.loads(fast_path.rules_of_text(tokenizer))
    assert rules.pop("added_tokens") == [] and rules == whole


def test_other_tokens_and_other_lengths_both_differ():
    def encode(tokens, lengths):
        return lambda _: (np.array(tokens, np.uint32), np.array(lengths, np.int64))

    texts = column_of([b"first", b"second"])
    require_same(encode([1, 2, 3], [1, 2]), encode([1, 2, 3], [1, 2]), texts)
    for tokens, lengths, text in ([1, 9, 3], [1, 2], "second"), ([1, 2, 3], [2, 1], "first"):
        with pytest.raises(FastPathDiffers, match=text):
            require_same(encode(tokens, lengths), encode([1, 2, 3], [1, 2]), texts)


def test_a_sample_is_short_and_seeks_what_is_not_ascii():
    plain = [b"plain %d" % n for n in range(10_000)]
    odd = "x" * 700 + "🦀" + "y" * 700
    chosen = sample(column_of([*plain, odd.encode(), *plain])).to_pylist()
    assert 1 < len(chosen) <= 8 and all(len(text) <= 500 for text in chosen)
    assert any("🦀" in text.decode() for text in chosen)
    assert plain[0] in chosen
    assert sample(column_of([])).to_pylist() == []
    assert sample(column_of([b"", b""])).to_pylist() == []
