"""What gigatoken passes over in silence is known before it is asked."""

from __future__ import annotations

import json

import gigatoken
import pytest
from tokenizers import AddedToken, Regex, models, normalizers
from tokenizers import pre_tokenizers as pre

from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.fast_path import rules_of_text
from p2p_llm_forge.data.fast_path_limits import FastPathDiffers, require_all_read
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.tokenizer import settings_of
from tests.data.tokenizers import (
    byte_tokenizer,
    expected,
    per_document,
    some_documents,
    word_tokenizer,
)

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def split(behavior: str, invert: bool = False, prefix: bool = False) -> pre.Sequence:
    parts = [pre.Split(Regex(GPT2), behavior, invert), pre.ByteLevel(prefix, use_regex=False)]
    return pre.Sequence(parts)


def rules_of(tokenizer) -> str:
    return tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pre_tokenizer": pre.ByteLevel(False, use_regex=False)}, "pre-tokenizer"),
        ({"pre_tokenizer": split("isolated", prefix=True)}, "pre-tokenizer"),
        ({"pre_tokenizer": split("removed")}, "pre-tokenizer"),
        ({"added": (AddedToken("peer", single_word=True),)}, "single_word"),
        ({"added": (AddedToken("bar", rstrip=True), AddedToken("  "))}, "rstrip"),
        ({"added": (AddedToken("foo", lstrip=True, normalized=False), AddedToken("  "))}, "lstrip"),
    ],
)
def test_gigatoken_takes_these_and_gives_other_tokens(settings, named):
    tokenizer = byte_tokenizer(**settings)
    texts = [*some_documents(50), "peers", "12 34  x", "a bar  b 100", "a  foo b", "  foo"]
    with pytest.raises(FastPathDiffers, match=named):
        require_all_read(rules_of(tokenizer))
    rules = json.loads(rules_of(tokenizer))
    rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["special"]]
    theirs = gigatoken.Tokenizer.from_json(json.dumps(rules)).encode_batch(texts)
    assert theirs.to_list() != expected(tokenizer, texts)


@pytest.mark.parametrize(
    "setting", [{"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "_"}]
)
def test_settings_of_a_model_that_gigatoken_does_not_read_are_named(setting):
    rules = json.loads(rules_of(byte_tokenizer()))
    rules["model"] = setting | rules["model"] | setting
    with pytest.raises(FastPathDiffers, match=next(iter(setting))):
        require_all_read(json.dumps(rules, separators=(",", ":")))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": split("isolated")},
        {"pre_tokenizer": split("removed", invert=True)},
        {"added": (AddedToken("<x>", rstrip=True, special=True), AddedToken("  "))},
    ],
)
def test_what_gigatoken_reads_is_left_to_the_comparison(settings):
    require_all_read(rules_of_text(byte_tokenizer(**settings)))
    assert Encoders(byte_tokenizer(**settings)).is_fast, "and it reads them as the tokenizer does"


def test_settings_are_those_of_the_json_whatever_its_strings_hold():
    tokenizer = byte_tokenizer(normalizer=normalizers.Replace(',"vocab":', ',"vocab":{'))
    whole = json.loads(rules_of(tokenizer))
    del whole["model"]["vocab"], whole["model"]["merges"]
    assert settings_of(rules_of(tokenizer)) == whole
    assert settings_of(rules_of(word_tokenizer()))["model"] == {"type": "WordLevel"}
    unigram = word_tokenizer()
    unigram.backend_tokenizer.model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
    assert settings_of(rules_of(unigram))["model"] == {"type": "Unigram", "unk_id": 0}


def test_a_token_within_another_is_found_by_the_proof_beside_nfc_too():
    added = (AddedToken("foobar", normalized=True), AddedToken("bar", normalized=False))
    tokenizer = byte_tokenizer(normalizer=normalizers.NFC(), added=added)
    encoders = Encoders(tokenizer)
    assert per_document(*encoders.encode(column_of([b"a foobar"]))) == expected(
        tokenizer, ["a foobar"]
    )
    assert not encoders.is_fast
