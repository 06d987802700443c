"""A sample of a split is drawn by chance, and its bytes are those of just its text."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from tokenizers import normalizers

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.data.held_out import held_out, sample
from p2p_llm_forge.data.prepare import prepare
from tests.data import talks
from tests.data.tokenizers import byte_tokenizer
from tests.texts import some_text


@pytest.fixture(scope="module")
def prepare_text(tmp_path_factory):
    """Prepares a text of many scripts, half of it held out, in blocks of 32 tokens."""
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "text.txt").write_text(some_text(200), encoding="utf-8")

    def prepared(name, tokenizer=None):
        if tokenizer:
            tokenizer.save_pretrained(folder / f"{name}-tokenizer")
        asked = {"sequence_length": 32, "validation_fraction": 0.5, "vocab_size": 400}
        if tokenizer:
            asked = {**asked, "tokenizer": str(folder / f"{name}-tokenizer"), "vocab_size": None}
        asked = {key: value for key, value in asked.items() if value is not None}
        prepare(PrepareConfig([str(folder / "text.txt")], str(folder / name), **asked))
        return open_prepared(folder / name)

    return prepared


def test_the_bytes_of_a_sample_are_those_of_its_text(prepare_text):
    data = prepare_text("bytes")
    found = held_out(data, 20)
    assert found.is_sample and len(found.numbers) == 20 < len(found.blocks)
    assert found.scale == 1
    # The oracle decodes the bytes of each token by the table that GPT-2's authors published.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in letters]
    byte_of = {chr(byte): byte for byte in letters}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer, written = data.load_tokenizer(), some_text(200).encode()
    for number in found.numbers:
        _, targets = found.blocks.inputs_and_targets([number])
        texts = [b""]
        for one in targets[0].tolist():
            if one == tokenizer.eos_token_id:
                texts.append(b"")
            else:
                letters = tokenizer.convert_ids_to_tokens(one)
                texts[-1] += bytes(byte_of[letter] for letter in letters)
        assert all(text in written for text in texts)
        assert found.sizes_of(targets).tolist() == [sum(map(len, texts))]


def test_all_blocks_together_have_the_bytes_that_were_counted(prepare_text):
    """Also where a normalizer makes text shorter, so that no token says what it stood for."""
    data = prepare_text("lower", byte_tokenizer(normalizers.Replace("模型", "x")))
    found, everything = held_out(data, 20), held_out(data, 0)
    assert found.scale != 1
    _, targets = found.blocks.inputs_and_targets(range(len(found.blocks)))
    all_bytes = data.manifest.splits["validation"].bytes
    assert found.sizes_of(targets).sum() * found.scale == pytest.approx(all_bytes)
    assert not everything.is_sample and everything.split_bytes == all_bytes


def test_the_bytes_of_a_sample_of_conversations_are_those_of_what_is_learnt(tmp_path):
    """Where tokens stand for bytes, just what was counted: no mark of a turn, no padding."""
    tokenizer = talks.saved(talks.talking_tokenizer(), tmp_path / "tokenizer")
    text = talks.write(tmp_path / "talks.jsonl", talks.rows(60, most=8))
    asked = {"sequence_length": 256, "validation_fraction": 0.5, "tokenizer": str(tokenizer)}
    prepare(PrepareConfig([str(text)], str(tmp_path / "data"), **asked))
    data = open_prepared(tmp_path / "data")
    found = held_out(data, 3)
    assert found.is_sample and found.scale == 1
    learnt = data.manifest.splits["validation"]
    assert learnt.bytes > 0 and learnt.trained < learnt.tokens / 2
    for number in range(len(found.blocks)):
        _, targets = found.blocks.inputs_and_targets([number])
        own = [token for token in targets[0].tolist() if token >= 0]
        text = data.load_tokenizer().decode(own, skip_special_tokens=True)
        if "\ufffd" not in text:
            assert found.sizes_of(targets).tolist() == [len(text.encode())]


def test_more_blocks_than_there_are_is_all_of_them(prepare_text):
    data = prepare_text("all")
    total = len(data.blocks("validation"))
    for count in (None, 0, total, total + 1):
        assert held_out(data, count).numbers == range(total)
    assert held_out(data, total - 1).is_sample


def test_a_larger_sample_holds_the_smaller_and_none_twice():
    for total in (7, 100, 1000):
        before: set[int] = set()
        for count in range(1, total, max(1, total // 10)):
            numbers = sample(count, total)
            assert numbers == sorted(set(numbers)) == sample(count, total)
            assert len(numbers) == count and numbers[0] >= 0 and numbers[-1] < total
            assert before <= set(numbers)
            before = set(numbers)


def test_all_pairs_of_blocks_are_drawn_equally_often():
    """What the standard error of a sample stands on: neighbours come together as others do."""
    drawn = Counter(pair for seed in range(6000) for pair in combinations(sample(4, 12, seed), 2))
    assert len(drawn) == 66
    expected = 6000 * 6 / 66
    chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
    assert chi_square < 110, "65 degrees of freedom: above 110 once in 2,500 times"
    near = np.mean([drawn[one, one + 1] for one in range(11)])
    assert near == pytest.approx(expected, rel=0.05)
