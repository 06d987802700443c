"""The texts of the proof: tokens glued to letters and to each other, and all planes of Unicode."""

from __future__ import annotations

import hashlib
import unicodedata

from p2p_llm_forge.data.hard_texts import MOST_OVERLAPS, glued, overlapping, random_texts


def script_of(letter: str) -> str:
    return unicodedata.name(letter).split()[0] if letter.isalpha() else ""


def test_each_token_touches_letters_of_several_scripts_and_itself():
    for spelling in ["<think>", "öğrenciler"]:
        text, beside_marks = glued([spelling])
        assert unicodedata.is_normalized("NFC", text) and f"\u0301{spelling}" in beside_marks
        around = text.split(spelling)
        before = {script_of(part[-1]) for part in around[:-1] if part}
        after = {script_of(part[0]) for part in around[1:] if part}
        assert {"LATIN", "CYRILLIC", "ARABIC", "CJK", "THAI", "HANGUL"} <= before & after
        assert spelling * 2 in text and f"{spelling} {spelling}" in text


def test_tokens_that_can_overlap_are_put_over_each_other():
    texts = list(overlapping(["<unk>", "k>x", "eeer", "eee"]))
    assert any("<unk>x" in text for text in texts) and any("eeeer" in text for text in texts)
    assert not list(overlapping(["<a>", "b", ""]))
    assert len(list(overlapping(["  " * n for n in range(1, 200)]))) == MOST_OVERLAPS


def test_random_texts_are_of_all_planes_and_the_same_everywhere():
    texts = list(random_texts(str))
    letters = {letter for text in texts for letter in text}
    assert {ord(letter) >> 16 for letter in letters} >= {0, 1, 2, 14, 15, 16}
    marks = [letter for letter in letters if unicodedata.combining(letter)]
    assert len(letters) > 5_000 and len(marks) > 200
    # Of these very texts, by any Python on any machine.
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "39b327d674c8941e"


def test_random_texts_come_as_the_normalizer_makes_them_too():
    texts = list(random_texts(lambda text: unicodedata.normalize("NFD", text)))
    plain = list(random_texts(str))
    assert set(plain) < set(texts)
    assert {unicodedata.normalize("NFD", text) for text in plain} < set(texts)
