"""Encoding gives the tokenizer's own answer, text cannot forge control tokens, nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from p2p_llm_forge.data import encode, fast_path
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.hard_texts import HARD_TEXTS
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from p2p_llm_forge.errors import ForgeError
from tests import ROOT
from tests.data.tokenizers import per_document, some_documents, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(some_documents(), 600)


@pytest.fixture(params=["fast", "reference"])
def encoders(request, tokenizer):
    return Encoders(tokenizer, request.param)


def test_encoders_give_the_tokenizers_own_answer(encoders, tokenizer):
    texts = some_documents(200, seed=2) + list(HARD_TEXTS)
    tokens, lengths = encoders.encode(column_of([text.encode() for text in texts]))
    assert tokens.dtype == np.uint32 and lengths.dtype == np.int64
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sum(map(len, expected)) > 5_000
    assert per_document(tokens, lengths) == expected


def test_the_spelling_of_a_control_token_is_plain_text(encoders, tokenizer):
    text = f"{END_OF_TEXT} before{END_OF_TEXT}{END_OF_TEXT} after {END_OF_TEXT}"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"], (
        "the trap that this test is about"
    )
    tokens, lengths = encoders.encode(column_of([b"x", text.encode()]))
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(per_document(tokens, lengths)[1]) == text


def test_encoding_no_or_empty_documents_gives_no_tokens(encoders):
    tokens, lengths = encoders.encode(column_of([]))
    assert len(tokens) == len(lengths) == 0
    tokens, lengths = encoders.encode(column_of([b"", b"a", b""]))
    assert len(tokens) == 1 and lengths.tolist() == [0, 1, 0]


def test_a_tokenizer_that_truncates_and_pads_still_encodes_all(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["truncation"] = {
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    rules["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    text = "peer block " * 50
    expected = tokenizer(text)["input_ids"]
    assert len(expected) > 8
    for backend in ("fast", "reference"):
        loaded = load_tokenizer(str(tmp_path))
        tokens, _ = Encoders(loaded, backend).encode(column_of([text.encode()]))
        assert tokens.tolist() == expected


def test_what_gigatoken_does_not_know_is_encoded_by_the_tokenizer_and_reported():
    tokenizer = word_tokenizer()
    encoders = Encoders(tokenizer, "auto")
    assert not encoders.is_fast and "gigatoken" in encoders.reason
    tokens, _ = encoders.encode(column_of([b"The quick DOG unheard-of"]))
    assert tokens.tolist() == tokenizer("the quick dog unheard-of")["input_ids"]
    with pytest.raises(ForgeError, match="--tokenizer-backend auto"):
        Encoders(tokenizer, "fast")


def test_a_vocabulary_that_lists_a_control_token_gives_the_unknown_one_for_its_spelling():
    tokenizer = word_tokenizer()
    tokens, _ = Encoders(tokenizer).encode(column_of([b"the dog", b"the lazy </s> dog"]))
    words = ["the", "dog", "the", "lazy", "<unk>", "dog"]
    assert tokens.tolist() == tokenizer.convert_tokens_to_ids(words)


def test_an_encoder_whose_cache_has_grown_is_renewed_and_the_tokens_are_the_same(
    tokenizer, monkeypatch, no_kept_proofs
):
    right, made = fast_path.fast_encoder, []
    monkeypatch.setattr(
        fast_path, "fast_encoder", lambda rules: (made.append(rules), right(rules))[1]
    )
    documents = column_of([text.encode() for text in some_documents(50)])
    encoders = Encoders(tokenizer)
    first = [encoders.encode(documents)[0].tolist() for _ in range(4)]
    assert len(made) == 1
    monkeypatch.setattr(encode, "RENEWED_AFTER_BYTES", 1.5 * documents.nbytes)
    monkeypatch.setattr(encode, "MEMORY_OF_A_THREAD", -(1 << 40))
    monkeypatch.setattr(encode, "MEMORY_FOR_NEW_WORDS", -(1 << 40))
    encoders = Encoders(tokenizer)
    assert [encoders.encode(documents)[0].tolist() for _ in range(4)] == first
    assert len(made) == 1 + 2, "after every second call"


def test_an_encoder_is_renewed_in_the_middle_of_a_long_piece(tokenizer, monkeypatch):
    """As for text of ever new words: one call must not grow a cache without bound."""
    right, made = fast_path.fast_encoder, []
    monkeypatch.setattr(
        fast_path, "fast_encoder", lambda rules: (made.append(rules), right(rules))[1]
    )
    texts = ["", *some_documents(40), "long " * 200, ""]
    monkeypatch.setattr(encode, "BYTES_AT_A_TIME", 500)
    monkeypatch.setattr(encode, "RENEWED_AFTER_BYTES", 600)
    monkeypatch.setattr(encode, "MEMORY_OF_A_THREAD", -(1 << 40))
    monkeypatch.setattr(encode, "MEMORY_FOR_NEW_WORDS", -(1 << 40))
    tokens, lengths = Encoders(tokenizer).encode(column_of([text.encode() for text in texts]))
    expected = [tokenizer.encode(text, split_special_tokens=True) for text in texts]
    assert np.split(tokens, np.cumsum(lengths)[:-1])[5].tolist() == expected[5]
    assert tokens.tolist() == [token for document in expected for token in document]
    assert lengths.tolist() == list(map(len, expected))
    assert len(made) > 3
    assert [len(found) for found in Encoders(tokenizer).encode(column_of([]))] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["known", "new"])
def test_a_cache_is_replaced_early_only_where_all_words_are_new(words):
    command = [sys.executable, "-m", "tests.data.renewals", words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert (int(done.stdout) > 1) == (words == "new")


def test_more_is_encoded_at_a_time_once_the_words_are_known(tokenizer, monkeypatch, no_kept_proofs):
    right, asked = fast_path.fast_encoder, []

    def watched(rules):
        ask = right(rules)
        return lambda documents: (asked.append(documents.nbytes), ask(documents))[1]

    documents = column_of([text.encode() for text in some_documents(100)])
    whole = [tokens.tolist() for tokens in Encoders(tokenizer).encode(documents)]
    monkeypatch.setattr(fast_path, "fast_encoder", watched)
    monkeypatch.setattr(encode, "BYTES_AT_A_TIME", documents.nbytes // 8)
    monkeypatch.setattr(encode, "LATER_AFTER_BYTES", documents.nbytes // 2)
    encoders = Encoders(tokenizer)
    for least, most in ((0, documents.nbytes / 4), (documents.nbytes, documents.nbytes)):
        asked.clear()  # also by the proof, and by samples, which are small
        assert [tokens.tolist() for tokens in encoders.encode(documents)] == whole
        assert least <= max(asked) <= most


def test_what_is_closed_encodes_no_more(tokenizer):
    encoders = Encoders(tokenizer, "reference")
    encoders.close()
    with pytest.raises(ForgeError, match="given up"):
        encoders.encode(column_of([b"peer"]))
