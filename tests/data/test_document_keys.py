"""Documents have one key exactly if their normalised texts are one."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from p2p_llm_forge.data.document_keys import document_keys, normalised

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


def test_a_key_does_not_change_with_what_stands_beside_it():
    alone = np.concatenate([document_keys(column_of([text]), "exact") for text in TEXTS])
    sliced = document_keys(column_of(["first ", *TEXTS])[1:], "exact")
    assert (document_keys(column_of(TEXTS), "exact") == alone).all() and (sliced == alone).all()
    assert document_keys(column_of([]), "exact").shape == (0, 2)
