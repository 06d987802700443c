"""What tells documents apart: for exact duplicates, a hash of the normalised text.

Normalised: Unicode's NFC, each run of white space one space, none at the ends. Nothing else is
folded: documents that differ in case or punctuation are different.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Literal

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.parts import values_and_offsets

Kind = Literal["none", "exact"]

# What str.isspace calls white space: of one byte in UTF-8, and of several.
ASCII_SPACES = bytes(number for number in range(128) if chr(number).isspace())
WIDE_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(8192, 8203)))
TO_SPACE = bytes.maketrans(ASCII_SPACES, b" " * len(ASCII_SPACES))
SPACE = ord(" ")


def document_keys(column: pa.LargeBinaryArray, kind: Kind) -> np.ndarray:
    """What duplicates have in common, 128 bits of each document (documents x 2, uint64)."""
    text, begins, ends = normalised(column)
    view = text.data
    places = zip(begins.tolist(), ends.tolist(), strict=True)
    digests = (hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in places)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def normalised(column: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents' text, normalised (uint8), and where each begins and ends in it.

    All at once: one by one it takes three times as long.
    """
    values, offsets = values_and_offsets(column)
    text = values.tobytes()
    if not text.isascii():
        text, offsets = _composed(text, offsets)
        for space in map(str.encode, WIDE_SPACES):
            text = text.replace(space, b" " * len(space))
    characters = np.frombuffer(text.translate(TO_SPACE), np.uint8)
    is_space = characters == SPACE
    is_surplus = is_space.copy()
    is_surplus[1:] &= is_space[:-1]
    begins = offsets[:-1][offsets[:-1] < len(characters)]
    is_surplus[begins] = is_space[begins]
    offsets = offsets - np.searchsorted(np.flatnonzero(is_surplus), offsets)
    characters = characters[~is_surplus]
    begins, ends = offsets[:-1], offsets[1:].copy()
    holds_text = np.flatnonzero(ends > begins)
    ends[holds_text] -= characters[ends[holds_text] - 1] == SPACE
    return characters, begins, ends


def _composed(text: bytes, offsets: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Text and offsets in NFC."""
    whole = text.decode(errors="surrogateescape")
    if unicodedata.is_normalized("NFC", whole):
        return text, offsets
    places = zip(offsets.tolist(), offsets[1:].tolist(), strict=False)
    decoded = (text[a:b].decode(errors="surrogateescape") for a, b in places)
    documents = [
        unicodedata.normalize("NFC", one).encode(errors="surrogateescape") for one in decoded
    ]
    return b"".join(documents), np.append(0, np.cumsum([len(one) for one in documents]))
