"""Encoding gives the tokenizer's own answer, text cannot forge control tokens, nothing is lost."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.tokenizer import END_OF_TEXT, HARD_TEXTS, Encoders, FastPathDiffers
from p2p_llm_forge.errors import ForgeError

WORDS = [
    "peer",
    "block",
    "Gewicht",
    "öğrenme",
    "模型",
    "👩🏽‍🚀",
    "don't",
    "3.14",
    "==",
    "  ",
    "\r\n",
    "\t",
]


def some_documents(count: int = 300, seed: int = 1) -> list[str]:
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choices(WORDS, k=chosen.randint(1, 60))) + chr(chosen.randint(0x21, 0xD7FF))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train_tokenizer(some_documents(), 600)


@pytest.fixture(params=["fast", "reference"])
def encoders(request, tokenizer):
    return Encoders(tokenizer, request.param)


def column(documents: list[bytes]) -> pa.LargeBinaryArray:
    return pa.array(documents, pa.large_binary())


def per_document(tokens, lengths) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths))[:-1]]


def test_encoders_give_the_tokenizers_own_answer(encoders, tokenizer):
    texts = some_documents(200, seed=2) + list(HARD_TEXTS)
    tokens, lengths = encoders.encode(column([text.encode() for text in texts]))
    assert tokens.dtype == np.uint32 and lengths.dtype == np.int64
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sum(map(len, expected)) > 5_000
    assert per_document(tokens, lengths) == expected


def test_the_spelling_of_a_control_token_is_plain_text(encoders, tokenizer):
    text = f"{END_OF_TEXT} before{END_OF_TEXT}{END_OF_TEXT} after {END_OF_TEXT}"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"], (
        "the trap that this test is about"
    )
    tokens, lengths = encoders.encode(column([b"x", text.encode()]))
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(per_document(tokens, lengths)[1]) == text


def test_encoding_no_or_empty_documents_gives_no_tokens(encoders):
    tokens, lengths = encoders.encode(column([]))
    assert len(tokens) == len(lengths) == 0
    tokens, lengths = encoders.encode(column([b"", b"a", b""]))
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
        loaded = tokenization.load_tokenizer(str(tmp_path))
        tokens, _ = Encoders(loaded, backend).encode(column([text.encode()]))
        assert tokens.tolist() == expected


def test_training_is_deterministic_and_knows_its_end_of_text(tmp_path):
    first, second = (tokenization.train_tokenizer(some_documents(), 500) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 500 == tokenization.vocabulary_size(first)
    assert first.eos_token == END_OF_TEXT
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.eos_token_id == first.eos_token_id
    assert tokenization.tokenizer_fingerprint(loaded) == tokenization.tokenizer_fingerprint(first)


def test_training_takes_a_stream_and_stops_where_the_text_has_no_more_pairs():
    small = tokenization.train_tokenizer(iter(["ab ab", "ab"]), 5_000)
    assert 257 <= len(small) < 300


def test_fingerprints_differ_where_the_tokens_or_the_end_of_text_do(tokenizer):
    other_text = tokenization.train_tokenizer(some_documents(seed=9), 600)
    other_end = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="peer"
    )
    prints = {tokenization.tokenizer_fingerprint(t) for t in (tokenizer, other_text, other_end)}
    assert len(prints) == 3


@pytest.mark.parametrize("first", range(6))
def test_bytes_of_text_are_exact_wherever_the_tokens_begin(tokenizer, first):
    text = "öğ模👩🏽‍🚀 plain text 模型 ğ" * 3
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    # ByteLevel's own alphabet: each of its characters is a byte.
    before = sum(len(token) for token in tokenizer.convert_ids_to_tokens(tokens[:first]))
    expected = len(text.encode()) - before
    assert tokenization.bytes_of_text(tokenizer, tokens) == len(text.encode())
    assert (
        tokenization.bytes_of_text(tokenizer, [*tokens[first:], tokenizer.eos_token_id]) == expected
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Unknown to gigatoken, with a normalizer, and with its end of text among the words."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox", "jumps over </s> the lazy dog"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_what_gigatoken_does_not_know_is_encoded_by_the_tokenizer_and_said():
    tokenizer = word_tokenizer()
    encoders = Encoders(tokenizer, "auto")
    assert not encoders.is_fast and "gigatoken" in encoders.reason
    tokens, _ = encoders.encode(column([b"The quick DOG unheard-of"]))
    assert tokens.tolist() == tokenizer("the quick dog unheard-of")["input_ids"]
    with pytest.raises(ForgeError, match="--tokenizer-backend auto"):
        Encoders(tokenizer, "fast")


def test_a_vocabulary_that_cannot_tell_text_from_control_is_refused():
    with pytest.raises(ForgeError, match="</s>.*control token.*'the lazy </s>"):
        Encoders(word_tokenizer()).encode(column([b"the dog", b"the lazy </s> dog"]))


def test_a_fast_encoder_that_differs_is_found_out_before_and_during_the_work(
    tokenizer, monkeypatch
):
    right = tokenization.fast_encoder

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

    monkeypatch.setattr(tokenization, "fast_encoder", wrong_on("ŉ".encode()))
    encoders = Encoders(tokenizer)
    assert not encoders.is_fast and "differ" in encoders.reason
    assert encoders.encode(column([b"peer"]))[0].tolist() == tokenizer("peer")["input_ids"]

    monkeypatch.setattr(tokenization, "fast_encoder", wrong_on(b"\xf0\x9f\xa6\x80"))
    encoders = Encoders(tokenizer)
    assert encoders.is_fast
    with pytest.raises(FastPathDiffers, match="peers"):
        # one document among thousands: sought out because it is not plain ASCII
        encoders.encode(column([b"peers and blocks"] * 5_000 + ["peers 🦀".encode()]))


def test_an_encoder_whose_cache_has_grown_is_made_anew_and_the_tokens_are_the_same(
    tokenizer, monkeypatch
):
    right, made = tokenization.fast_encoder, []
    monkeypatch.setattr(
        tokenization, "fast_encoder", lambda rules: (made.append(rules), right(rules))[1]
    )
    documents = column([text.encode() for text in some_documents(50)])
    encoders = Encoders(tokenizer)
    first = [encoders.encode(documents)[0].tolist() for _ in range(4)]
    assert len(made) == 1
    monkeypatch.setattr(tokenization, "RENEWED_AFTER_BYTES", 1.5 * documents.nbytes)
    monkeypatch.setattr(tokenization, "MEMORY_OF_A_THREAD", -(1 << 40))
    encoders = Encoders(tokenizer)
    assert [encoders.encode(documents)[0].tolist() for _ in range(4)] == first
    assert len(made) == 1 + 2, "after every second call"


@pytest.mark.parametrize("name", ["nobody/no-such-tokenizer", "./no/such/folder"])
def test_a_tokenizer_out_of_reach_is_a_clear_error(name):
    with pytest.raises(ForgeError) as told:
        tokenization.load_tokenizer(name)
    assert name in str(told.value) and "save_pretrained" in str(told.value)


def test_a_tokenizer_without_end_of_text_is_a_clear_error(tmp_path):
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["some text"], trainers.BpeTrainer(show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ForgeError, match="eos_token"):
        tokenization.load_tokenizer(str(tmp_path))
