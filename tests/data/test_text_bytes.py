"""Bytes before a token of a document are those of its text, whatever the tokenizer makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from p2p_llm_forge.data.text_bytes import CutDocuments
from p2p_llm_forge.data.tokenizer import reference_encoder, train_tokenizer
from tests.data.tokenizers import some_documents

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_level(normalizer=None, prefix_space=False) -> PreTrainedTokenizerFast:
    """Every byte is a token; white space at a token's ends is taken from its offsets."""
    words = {letter: number for number, letter in enumerate(["</s>", *BYTES])}
    backend = Tokenizer(models.BPE(words, merges=[]))
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


def unigram() -> PreTrainedTokenizerFast:
    """Whole words, to which compatibility forms and letters with marks are folded."""
    words = ["▁fin", "▁café", "▁modell", "▁", "x"]
    backend = Tokenizer(
        models.Unigram([("<unk>", -20.0), ("</s>", -20.0), *((word, -1.0) for word in words)], 0)
    )
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """Lower case, without accents and white space."""
    words = ["[UNK]", "</s>", "cafe", "##s", "ogrenci", "the", "!"]
    model = models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return fast(backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a letter that is no entry is its bytes; the text gets a space in front."""
    words = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    backend = Tokenizer(
        models.BPE({w: n for n, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return fast(backend)


def added_word() -> PreTrainedTokenizerFast:
    """Byte-level, with an added token that swallows the white space before it."""
    tokenizer = byte_level()
    tokenizer.add_tokens(AddedToken("모델", lstrip=True))
    return tokenizer


# A tokenizer; a document in parts; how many tokens each part is, by what the tokenizer is made of.
KINDS = {
    "unigram": (
        unigram,
        [("ﬁn", 1), (" cafe\u0301", 1), (" ﬁn", 1), (" Ⅷ", 2), (" modell", 1), ("x", 1)],
    ),
    "word piece": (
        word_piece,
        [
            ("CAFÉ", 1),
            ("S", 1),
            ("  O\u0308g\u0306renci", 1),
            ("\n\nxyzzy", 1),
            ("!", 1),
            (" the", 1),
            ("!", 1),
        ],
    ),
    "bytes": (byte_level, [(letter, 1) for letter in "a the   end"]),
    "bytes and a prefix": (
        lambda: byte_level(prefix_space=True),
        [("", 1), ("a", 1), (" ", 1), (" ", 1), ("é", 2), ("b", 1)],
    ),
    "bytes of NFC": (
        lambda: byte_level(normalizers.NFC()),
        [("e\u0301", 2), (" ", 1), ("a", 1), ("\u0958", 6), ("o\u0308", 2), ("  ", 2), ("z", 1)],
    ),
    "byte fallback": (
        byte_fallback,
        [("", 1), ("a", 1), (" ", 1), ("모", 3), ("b", 1), ("👩", 4), ("c", 1)],
    ),
    "an added token": (added_word, [("a", 1), ("   모델", 1), (" ", 1), ("b", 1), ("  모델", 1)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("says_offsets", [True, False])
def test_bytes_before_a_token_are_those_of_the_text(kind, says_offsets):
    make, parts = KINDS[kind]
    tokenizer = make()
    encode = reference_encoder(tokenizer)
    document = "".join(part for part, _ in parts).encode()
    tokens = np.array(tokenizer.backend_tokenizer.encode(document.decode()).ids)
    assert len(tokens) == sum(count for _, count in parts)
    # Of a tokenizer in Python only the tokens of a text are known.
    asked = CutDocuments(tokenizer if says_offsets else SimpleNamespace(), encode)
    cut, expected = 0, 0
    for part, count in parts:
        for inside in range(count):
            found = asked.bytes_before(cut + inside, tokens, len(document), lambda: document)
            most = expected + (len(part.encode()) if inside else 0)
            assert expected <= found <= most, (cut, inside)
        cut, expected = cut + count, expected + len(part.encode())
    assert asked.bytes_before(cut, tokens, len(document), lambda: document) == len(document)


@pytest.mark.parametrize("text", ["öğ模👩🏽‍🚀 plain text 模型 ğ" * 3, "  white\n\n\n space  "])
def test_every_byte_of_byte_level_tokens_counts_without_the_text(text):
    tokenizer, document = byte_level(), text.encode()
    tokens = np.array(tokenizer.backend_tokenizer.encode(text).ids)
    assert len(tokens) == len(document), "a byte is a token"
    asked = CutDocuments(tokenizer, reference_encoder(tokenizer))
    for cut in range(len(tokens) + 1):
        assert asked.bytes_before(cut, tokens, len(document), pytest.fail) == cut


def test_a_character_that_is_cut_is_not_counted():
    tokenizer, text = ByT5Tokenizer(), "aé模 👩 b"
    tokens = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    asked = CutDocuments(tokenizer, reference_encoder(tokenizer))
    for cut in range(len(tokens) + 1):
        whole = text.encode()[:cut].decode(errors="ignore")
        expected = len(whole.encode())
        assert asked.bytes_before(cut, tokens, len(text.encode()), text.encode) == expected


@pytest.mark.parametrize("first", range(6))
def test_bytes_are_exact_wherever_a_trained_tokenizer_is_cut(first):
    trained = train_tokenizer(some_documents(), 600)
    text = "öğ模👩🏽‍🚀 plain text 模型 ğ" * 3
    tokens = trained(text, add_special_tokens=False)["input_ids"]
    # ByteLevel's own alphabet: each of its characters is a byte.
    before = sum(len(token) for token in trained.convert_ids_to_tokens(tokens[:first]))
    asked = CutDocuments(trained, reference_encoder(trained))
    size = len(text.encode())
    assert len(tokens) < size
    assert asked.bytes_before(first, np.array(tokens), size, pytest.fail) == before
    assert asked.bytes_before(len(tokens), np.array(tokens), size, pytest.fail) == size
