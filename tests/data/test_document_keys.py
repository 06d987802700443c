"""Documents have one key exactly if their normalised texts are one."""

from __future__ import annotations

import itertools
import random
import unicodedata

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from p2p_llm_forge.data import document_keys as keys_of
from p2p_llm_forge.data.document_keys import VALUES, document_keys, normalised, words

TEXTS = [
    "a b",
    " a\t\r\n b ",
    "a\u00a0\u3000b",
    "A b",
    "a b.",
    "ab",
    "   ",
    "\u2003",
    "e\u0301 ağ",
    "é ağ",
]
SOME = st.text(
    st.sampled_from("ab \t\n\x0b\x1c\x85\u00a0\u2003\u3000é\u0301\u0327ﬁ模😀ｱﾞ각ᄀ"), max_size=9
)


def column_of(texts: list[str]) -> pa.LargeBinaryArray:
    return pa.array([text.encode() for text in texts], pa.large_binary())


def as_promised(text: str) -> str:
    """One document, in Python's own words."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@given(st.lists(SOME | st.text(max_size=5), max_size=20))
def test_white_space_and_composition_are_normalised_and_nothing_else(texts):
    characters, begins, ends = normalised(column_of(texts))
    found = [bytes(characters[a:b]).decode() for a, b in zip(begins, ends, strict=True)]
    assert found == [as_promised(text) for text in texts]


def test_all_white_space_of_unicode_is_white_space():
    spaces = [chr(number) for number in range(0x11_0000) if chr(number).isspace()]
    assert len(spaces) > 20
    keys = document_keys(
        column_of(["a b", *(f"{space}a{space * 2}b" for space in spaces)]), "exact"
    )
    assert len(np.unique(keys, axis=0)) == 1


def test_documents_have_one_key_if_they_are_one_text():
    keys = document_keys(column_of(TEXTS), "exact")
    assert keys.shape == (len(TEXTS), 2) and keys.dtype == np.uint64
    same = 0
    for one, other in itertools.combinations(range(len(TEXTS)), 2):
        are_one = as_promised(TEXTS[one]) == as_promised(TEXTS[other])
        assert (keys[one] == keys[other]).all() == are_one
        same += are_one
    assert same == 5


def test_keys_are_made_of_some_documents_at_a_time(monkeypatch):
    for portion, texts in itertools.product((1, 7, 10_000), ([], TEXTS, TEXTS[2:] * 3)):
        monkeypatch.setattr(keys_of, "PORTION_BYTES", portion)
        for kind in ("exact", "near"):
            found = document_keys(column_of(texts), kind)
            alone = [document_keys(column_of([text]), kind)[0].tolist() for text in texts]
            assert found.tolist() == alone


def test_a_key_does_not_change_with_what_stands_beside_it():
    alone = np.concatenate([document_keys(column_of([text]), "exact") for text in TEXTS])
    sliced = document_keys(column_of(["first ", *TEXTS])[1:], "exact")
    assert (document_keys(column_of(TEXTS), "exact") == alone).all() and (sliced == alone).all()
    assert document_keys(column_of([]), "exact").shape == (0, 2)


# --- sketches -------------------------------------------------------------------------------------


def stands_alone(character: str) -> bool:
    """Whether a character is a word: of a script that is written without spaces."""
    scripts = [(0x3000, 0xDFFF), (0xE00, 0xEFF), (0x1000, 0x10BF), (0x1780, 0x17FF)]
    return any(first <= ord(character) <= last for first, last in scripts)


def words_of(text: str) -> list[bytes]:
    """The words of a document, letter by letter."""
    found = []
    for run in as_promised(text).split():
        parts = [""]
        for character in run:
            if stands_alone(character):
                parts += [character, ""]
            else:
                parts[-1] += character
        for part in filter(None, (part.encode() for part in parts)):
            found += [part[at : at + 64] for at in range(0, len(part), 64)]
    return found


def runs_of(text: str) -> set[tuple[bytes, ...]]:
    """The runs of five words in a text."""
    found = words_of(text)
    return {tuple(found[at : at + 5]) for at in range(max(1, len(found) - 4))}


WORDS = st.sampled_from(
    ["模型", "ร้านค้า", "word", "x" * 64, "x" * 65, "x" * 130, "a模b", "모델", "é", "😀"]
)


@given(st.lists(st.lists(WORDS | st.text(max_size=3), max_size=9).map(" ".join), max_size=9))
def test_words_are_what_white_space_separates_or_a_character(texts):
    hashes, firsts, ends = words(*normalised(column_of(texts)))
    expected = [words_of(text) for text in texts]
    assert (ends - firsts).tolist() == [len(of_text) for of_text in expected]
    flat = [word for of_text in expected for word in of_text]
    assert len(flat) == len(hashes)
    assert (
        len(set(flat))
        == len(set(hashes.tolist()))
        == len(set(zip(flat, hashes.tolist(), strict=True)))
    )


def test_sketches_agree_in_the_share_of_runs_that_both_texts_have():
    chosen = random.Random(5)
    pairs = []
    for replaced in range(0, 40):
        one = [f"w{chosen.randrange(10**6)}" for _ in range(200)]
        other = list(one)
        for place in chosen.sample(range(200), replaced):
            other[place] = f"v{chosen.randrange(10**6)}"
        pairs.append((" ".join(one), " ".join(other)))
    texts = [text for pair in pairs for text in pair]
    values = document_keys(column_of(texts), "near").view("<u2")
    assert values.shape == (80, VALUES) == (80, 128)
    errors, similarities = [], []
    for number, (one, other) in enumerate(pairs):
        of_one, of_other = runs_of(one), runs_of(other)
        similarities.append(len(of_one & of_other) / len(of_one | of_other))
        errors.append((values[2 * number] == values[2 * number + 1]).mean() - similarities[-1])
    assert errors[0] == 0 and min(similarities) < 0.3
    # The standard deviation of a share of 128 is at most 0.044.
    assert max(map(abs, errors)) < 4 * 0.044 and abs(np.mean(errors)) < 0.015


def test_a_sketch_is_that_of_every_version_and_machine():
    texts = [
        "Peers meet over ordinary networks, share a folder, come and go.",
        "ağ 模型模型模型",
        " ",
    ]
    found = document_keys(column_of(texts), "near")
    first_values = [0x3263048F4023DB0C, 0xC7A3487006470A04, 0xFFFFFFFFFFFFFFFF]
    assert found[:, 0].tolist() == first_values, "another version would leave out others"
    alone = np.concatenate([document_keys(column_of([text]), "near") for text in texts])
    assert (alone == found).all()
    assert document_keys(column_of([]), "near").shape == (0, 32)
