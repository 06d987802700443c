"""A tokenizer is trained on the documents that are not held out, of a large text on some."""

from __future__ import annotations

import random

from transformers import AutoTokenizer

from p2p_llm_forge.data.prepare import prepare
from tests.data.preparations import config
from tests.texts import decoded_documents


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
