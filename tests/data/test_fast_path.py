"""The fast path: a fast encoder that differs from the tokenizer is found out."""

from __future__ import annotations

import json
import re
import unicodedata

import gigatoken
import numpy as np
import pytest
from tokenizers import AddedToken, normalizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import ByT5Tokenizer

from p2p_llm_forge.data import fast_path
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.fast_path import FastPathDiffers, check_fast_path, require_same, sample
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.tokenizer import END_OF_TEXT, reference_encoder, train_tokenizer
from tests.data.tokenizers import (
    byte_tokenizer,
    expected,
    per_document,
    some_documents,
    word_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(some_documents(), 600)


def test_a_fast_encoder_that_differs_is_found_out_before_and_during_the_work(
    tokenizer, monkeypatch, no_kept_proofs
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

    no_kept_proofs()
    monkeypatch.setattr(fast_path, "fast_encoder", wrong_on("🦀👽".encode()))
    encoders = Encoders(tokenizer)
    assert encoders.is_fast
    with pytest.raises(FastPathDiffers, match="peers"):
        # one document among thousands: sought out because it is not plain ASCII
        encoders.encode(column_of([b"peers and blocks"] * 5_000 + ["peers 🦀👽".encode()]))


def test_a_fast_path_that_passes_answers_as_the_tokenizer(tokenizer):
    new, fast = check_fast_path(tokenizer, reference_encoder(tokenizer))
    documents = column_of([text.encode() for text in some_documents(100, seed=4)])
    expected = reference_encoder(tokenizer)(documents)
    for encode in (fast, new()):
        for ours, right in zip(encode(documents), expected, strict=True):
            assert ours.dtype == right.dtype and np.array_equal(ours, right)


NFC = normalizers.NFC()
GLUED = [
    "peersöğrenciler",
    "öğrencilerпир",
    "模öğrenciler型",
    "öğrenciler.",
    " öğrenciler öğrenciler",
]
RARE = ["\ufb1e\U00011070", "\U00011a34\U00010f4d", "e\u0301", "é", "\u1100\u1161", "ﬁ \u212b"]


@pytest.mark.parametrize(
    ("settings", "texts", "reason"),
    [
        (
            {"added": (AddedToken("öğrenciler", single_word=True),)},
            GLUED,
            "single_word.*öğrenciler",
        ),
        ({"added": (AddedToken("d|>x", normalized=False),)}, ["<|end|>x", "d|>x"], "differ on"),
        ({"pre_tokenizer": ByteLevel(False, use_regex=False)}, ["peer  block 12"], "pre-tokenizer"),
        ({"normalizer": normalizers.NFD()}, RARE, "does not support it .Unsupported normalizer"),
    ],
)
def test_what_gigatoken_gets_wrong_is_encoded_by_the_tokenizer_and_the_reason_said(
    settings, texts, reason
):
    tokenizer = byte_tokenizer(**settings)
    encoders = Encoders(tokenizer)
    assert not encoders.is_fast
    assert re.search(reason, encoders.reason) and "\n" not in encoders.reason
    got = per_document(*encoders.encode(column_of([text.encode() for text in texts])))
    assert got == expected(tokenizer, texts)


def test_composing_is_left_to_the_tokenizer_and_all_else_stays_fast():
    added = (AddedToken("<think>", normalized=False), AddedToken("öğrenciler"))
    tokenizer = byte_tokenizer(normalizer=NFC, added=added)
    texts = RARE + GLUED + ["<think>\u0338", "o\u0308ğrenciler", "<think>", *some_documents(50)]
    column = column_of([text.encode() for text in texts])
    right = expected(tokenizer, texts)
    # The trap: gigatoken by itself, without this project.
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["special"]]
    alone = gigatoken.Tokenizer.from_json(json.dumps(rules)).encode_batch(texts)
    assert alone.to_list() != right
    encoders = Encoders(tokenizer)
    assert encoders.is_fast
    for documents in (column, column[3:20], column[:0]):
        got = per_document(*encoders.encode(documents))
        assert got == expected(tokenizer, [text.decode() for text in documents.to_pylist()])


def test_only_documents_that_are_not_composed_are_told_from_the_others():
    texts = ["plain", "é", "e\u0301", "", "“quoted”", "\u0301", "a", "模型 \u212b"]
    right = [unicodedata.normalize("NFC", text) != text for text in texts]
    assert sum(right) == 2
    column = column_of([text.encode() for text in texts])
    assert fast_path.not_composed(column).tolist() == right
    assert fast_path.not_composed(column[1:]).tolist() == right[1:]
    assert not fast_path.not_composed(column[:1]).any()


@pytest.mark.parametrize("make", [word_tokenizer, ByT5Tokenizer])
def test_a_tokenizer_that_gigatoken_does_not_support_is_named_with_the_reason(make):
    tokenizer = make()
    with pytest.raises(FastPathDiffers, match="gigatoken does not support it .+"):
        check_fast_path(tokenizer, reference_encoder(tokenizer))


def test_the_spellings_of_control_tokens_are_compared_too(tokenizer, monkeypatch, no_kept_proofs):
    rules = fast_path.rules_of_text
    right = fast_path.fast_encoder
    monkeypatch.setattr(
        fast_path, "fast_encoder", lambda _: right(tokenizer.backend_tokenizer.to_str())
    )
    assert rules(tokenizer) != tokenizer.backend_tokenizer.to_str()
    with pytest.raises(FastPathDiffers, match=f"differ on .*{END_OF_TEXT[2:-2]}"):
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
