"""A tokenizer is trained on the documents that are not held out, of a large text on some."""

from __future__ import annotations

import random

from transformers import AutoTokenizer

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import parts, tokenizer_training
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.data.prepare import prepare
from tests.data.preparations import config
from tests.texts import decoded_documents, some_text


def test_the_tokenizer_is_trained_without_the_held_out_documents(tmp_path, small_pieces):
    path = tmp_path / "text.txt"
    chosen = random.Random(0)
    names = ["".join(chosen.choices("bcdfgklmnprst", k=6)) for _ in range(400)]
    path.write_text("\n\n".join(f"common words and {name} " * 5 for name in names))
    prepare(config(path, tmp_path / "a", vocab_size=9_000, sequence_length=8))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "tokenizer")
    known = {name for name in names if f"Ġ{name}" in tokenizer.get_vocab()}
    trained_on = {
        d.split()[3] for d in decoded_documents(tmp_path / "a", "train") if d.count(" ") > 3
    }
    held_out = set(names) - trained_on
    assert len(held_out) > 30 and len(known) > 200
    assert not known & held_out


def test_a_tokenizer_for_a_large_text_is_trained_on_some_of_it_always_the_same(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "PIECE_BYTES", 2_000)
    monkeypatch.setattr(tokenizer_training, "TRAINING_BYTES", 20_000)
    (tmp_path / "a.txt").write_text(some_text(1_000))
    asked = PrepareConfig([str(tmp_path / "a.txt")], str(tmp_path), vocab_size=400)
    found = Preparation.of(asked)
    first = list(tokenizer_training.training_text(found))
    assert first == list(tokenizer_training.training_text(found))
    assert 8_000 < len("".join(first).encode()) < 40_000 < (tmp_path / "a.txt").stat().st_size


def test_a_tokenizer_is_trained_on_no_more_different_words_than_memory_allows(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "MOST_BYTES_OF_WORDS", 20_000)
    monkeypatch.setattr(tokenizer_training, "CHARACTERS_AT_A_TIME", 1_000)
    monkeypatch.setattr(tokenizer_training, "MOST_STRINGS", 100)
    chosen = random.Random(0)
    words = ["".join(chosen.choices("abcdefghijklmnopq", k=8)) for _ in range(10_000)]
    strange = [" ".join(words[n : n + 100]) for n in range(0, len(words), 100)]
    given = "".join(tokenizer_training.within_memory([*strange, " ".join(strange)]))
    # Every word is new, and is nearly all of the text.
    assert 20_000 < len(given) < 24_000
    usual = [some_text(50, seed=3) for _ in range(40)]
    assert "".join(tokenizer_training.within_memory(usual)) == "".join(usual)
    assert len("".join(usual)) > 100_000
