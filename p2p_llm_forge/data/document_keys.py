"""What tells documents apart: a hash of the normalised text, or a sketch of its runs of words.

Normalised: Unicode's NFC, each run of white space one space, none at the ends. Nothing else is
folded: documents that differ in case or punctuation are different.

A sketch is a MinHash (Broder, 1997) of all runs of five words: of two documents, its values agree
in the share of all their runs that both have, their Jaccard similarity. Of each of the 128 values
16 bits are kept (b-bit minwise hashing: Li and König, 2010). Words are what white space separates;
in scripts that are written without, each character; and nothing longer than LONGEST_WORD.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from typing import Literal

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.parts import values_and_offsets

Kind = Literal["none", "exact", "near"]

WORDS_IN_A_RUN = 5
LONGEST_WORD = 64  # bytes; more is several words, so that hashing takes bounded memory
PORTION_BYTES = 1 << 20  # of documents whose keys are made at once, for bounded memory
VALUES = 128  # in a sketch
SEED = 0
MULTIPLIERS = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93]
MULTIPLIERS += [0xA0761D6478BD642F]  # odd numbers, one for each word of a run

# What str.isspace calls white space: of one byte in UTF-8, and of several.
ASCII_SPACES = bytes(number for number in range(128) if chr(number).isspace())
WIDE_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(8192, 8203)))
TO_SPACE = bytes.maketrans(ASCII_SPACES, b" " * len(ASCII_SPACES))
SPACE = ord(" ")


def document_keys(column: pa.LargeBinaryArray, kind: Kind) -> np.ndarray:
    """What tells each document apart (documents x columns, uint64): 2 of a hash, 32 of a sketch."""
    ends = values_and_offsets(column)[1]
    places = np.arange(0, ends[-1] + PORTION_BYTES, PORTION_BYTES)
    cuts = np.unique(np.minimum(np.searchsorted(ends, places), len(column)))
    portions = [column[a:b] for a, b in zip(cuts, cuts[1:], strict=False)] or [column]
    return np.concatenate([_keys_of_portion(portion, kind) for portion in portions])


def _keys_of_portion(column: pa.LargeBinaryArray, kind: Kind) -> np.ndarray:
    text, begins, ends = normalised(column)
    if kind == "near":
        return sketches(*words(text, begins, ends))
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
    characters = np.frombuffer(bytearray(text.translate(TO_SPACE)), np.uint8)
    if not text.isascii():
        _narrow(characters)
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


def _narrow(characters: np.ndarray) -> None:
    """Write ASCII spaces over the white space of several bytes, in place."""
    leads = {space.encode()[0] for space in WIDE_SPACES}
    places = np.flatnonzero(np.logical_or.reduce([characters == lead for lead in leads]))
    for width in (2, 3):
        spaces = [
            int.from_bytes(s.encode(), "big") for s in WIDE_SPACES if len(s.encode()) == width
        ]
        inside = places[places <= len(characters) - width]
        codes = np.zeros(len(inside), np.int64)
        for byte in range(width):
            codes = codes * 256 + characters[inside + byte]
        found = inside[np.isin(codes, spaces)]
        for byte in range(width):
            characters[found + byte] = SPACE


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


def words(
    text: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash of each word of normalised documents (uint64), and each one's first and end."""
    is_space = text == SPACE
    is_first = ~is_space
    is_first[1:] &= is_space[:-1]
    is_first[begins[ends > begins]] = True
    is_alone = _is_written_without_spaces(text)
    is_first |= is_alone
    is_first[3:] |= is_alone[:-3] & ~is_space[3:]  # what follows such a character, of three bytes
    starts = np.flatnonzero(is_first)
    stops = np.append(starts, len(text))[1:]
    stops -= is_space[stops - 1]
    pieces = -(-(stops - starts) // LONGEST_WORD)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + LONGEST_WORD * within
    lengths = np.minimum(np.repeat(stops, pieces) - starts, LONGEST_WORD)
    hashes = lengths.astype(np.uint64)
    # Eight bytes at a time, from any place on; what follows the word is cut off.
    padded = np.append(text, np.zeros(8, np.uint8))
    eights = np.ndarray(len(text) + 1, "<u8", padded, strides=(1,))
    longer = np.arange(len(starts))
    for place in range(0, LONGEST_WORD, 8):
        longer = longer[lengths[longer] > place]
        surplus = np.maximum(8 - (lengths[longer] - place), 0).astype(np.uint64)
        letters = eights[starts[longer] + place] << (np.uint64(8) * surplus)
        hashes[longer] = _mixed(hashes[longer] ^ letters) * np.uint64(MULTIPLIERS[0])
    return hashes, np.searchsorted(starts, begins), np.searchsorted(starts, ends)


def sketches(hashes: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The sketch of each document, of the hashes of its words (documents x 32, uint64)."""
    from rensa import RMinHash

    place = np.arange(len(hashes))
    left = np.repeat(ends, ends - firsts) - place  # words to the end of the document, itself too
    runs = np.zeros(len(hashes), np.uint64)
    for word, multiplier in enumerate(MULTIPLIERS):
        following = np.append(hashes[word:], np.zeros(min(word, len(hashes)), np.uint64))
        runs += np.where(left > word, following, np.uint64(0)) * np.uint64(multiplier)
    # The last words of a document begin no run; fewer than five words are one.
    is_run = left >= WORDS_IN_A_RUN
    is_run[firsts[ends > firsts]] = True
    counts = np.append(0, np.cumsum(is_run))
    offsets = np.append(counts[firsts], counts[-1]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        _mixed(runs[is_run]), offsets, VALUES, SEED
    )
    values = itertools.chain.from_iterable(matrix.to_rows())
    sketch = np.fromiter(values, np.uint32, len(firsts) * VALUES).astype("<u2")
    return sketch.view("<u8").reshape(len(firsts), VALUES // 4)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, wrapping around: every bit of the result depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _is_written_without_spaces(text: np.ndarray) -> np.ndarray:
    """Where a character of three bytes begins that is a word (bool): U+3000 to U+DFFF (Chinese,
    Japanese, Korean), Thai, Lao, Burmese, Khmer."""
    second = np.append(text[1:], 0) if len(text) else text
    is_thai_or_lao = (text == 0xE0) & (second >= 0xB8) & (second <= 0xBB)
    is_burmese = (text == 0xE1) & (second >= 0x80) & (second <= 0x82)
    is_khmer = (text == 0xE1) & (second >= 0x9E) & (second <= 0x9F)
    is_chinese = (text >= 0xE3) & (text <= 0xED)
    return is_chinese | is_thai_or_lao | is_burmese | is_khmer
