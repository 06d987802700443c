"""Texts on which encoders have been seen to disagree: a fast one must get all of them right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

HARD_TEXTS = (
    # combining marks and compatibility forms
    "e\u0301 n\u0303 Z\u0351\u036b\u0343 \u1e9b\u0323 \u212b \ufb01",
    # joined emoji, skin tones, flags, variation selectors
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f44d\U0001f3fd \U0001f1f9\U0001f1f7\U0001f1e9\U0001f1ea \u263a\ufe0f",
    # every kind of line end; long runs of white space
    "one\r\ntwo\rthree\n\n\nfour\u2028five\x0bsix\x85seven",
    " " * 200 + "x" + "\t" * 50 + "\n" * 50 + " \n \n\t ",
    # replacement, edges of the planes, controls
    "\ufffd\ud7ff\ue000\ufffe\U0010ffff\x00\x01\x7f\x80",
    # right to left, with marks
    "\u0645\u0631\u062d\u064e\u0628\u0627 \u202b\u05e9\u05c1\u05dc\u05d5\u05dd\u202c 12\u200f!",
    # very long words and numbers
    "Donaudampfschifffahrtsgesellschaft" * 60 + " " + "9" * 300,
    # contractions
    "I'll you're it'S WE'VE don\u2019t 'tis ''quoted''",
    # scripts without spaces; unusual spaces
    "汉字かな交じり文、한국어 ภาษาไทย हिन्दी \u3000wide\u00a0fixed\u200bzero",
    # code, symbols, numerals
    "x=1;y+=2 //=-> {[(<|>)]} ___init___ 3.14e-10 $£€ ½²ⅷ\u0663",
    # letters whose other case has another length
    "İıŞşĞğÇçÖöÜü ǅ ß ŉ",
)
# What spellings of tokens are glued to: letters, a number, and what joins or parts words.
NEIGHBOURS = (*("a", "Ö", "ж", "λ", "ש", "ش", "क", "ก", "模", "か", "한", "9", "_", ".", " \n"),)
# From each an equal share of the random letters: where scripts, marks and the planes lie.
BLOCKS = (
    *((0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x52F), (0x530, 0x6FF)),
    *((0x700, 0x8FF), (0x900, 0xDFF), (0xE00, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x1AFF)),
    *((0x1B00, 0x1FFF), (0x2000, 0x2BFF), (0x2C00, 0x2FFF), (0x3000, 0x9FFF), (0xA000, 0xD7FF)),
    *((0xE000, 0xF8FF), (0xF900, 0xFFFF), (0x10000, 0x107FF), (0x10800, 0x10FFF)),
    *((0x11000, 0x11FFF), (0x12000, 0x1AFFF), (0x1B000, 0x1FFFF), (0x20000, 0x2FFFF)),
    *((0x30000, 0xDFFFF), (0xE0000, 0xEFFFF), (0xF0000, 0x10FFFF)),
)
MOST_OVERLAPS = 2_000


def glued(spellings: Iterable[str]) -> Iterator[str]:
    """Each token's spelling next to letters of several scripts and to itself, then to a mark.

    The mark has a text of its own: with it, a text is not in NFC, and may be encoded otherwise.
    """
    for text in spellings:
        yield f"{text}{text} {text}" + "".join(f" {n}{text}{n}{text}{text}{n}" for n in NEIGHBOURS)
        yield f"{text}\u0301 \u0301{text}\u0301{text}{text}\u0301"


def overlapping(spellings: Sequence[str]) -> Iterator[str]:
    """Spellings of two tokens, of which the second begins within the first: `<unk>x` of `<unk>` and
    `k>x`. At most MOST_OVERLAPS."""

    def all_of_them() -> Iterator[str]:
        begins_with: dict[str, list[str]] = {}
        for text in spellings:
            for size in range(1, len(text)):
                begins_with.setdefault(text[:size], []).append(text)
        for text in spellings:
            for start in range(1, len(text)):
                for other in begins_with.get(text[start:], ()):
                    yield f"a {text[:start]}{other} b{text[:start]}{other}"

    return itertools.islice(all_of_them(), MOST_OVERLAPS)


def random_texts(normalize: Callable[[str], str], count: int = 500) -> Iterator[str]:
    """Unicode of all planes, the same on every machine, as it is and as `normalize` makes it."""
    # Of all methods of Random, this one alone promises the same numbers in every Python.
    draw = random.Random(0).random

    def letter() -> str:
        first, last = BLOCKS[int(draw() * len(BLOCKS))] if draw() < 0.7 else BLOCKS[0]
        return chr(first + int(draw() * (last - first + 1)))

    for _ in range(count):
        text = "".join(letter() for _ in range(1 + int(draw() * 60)))
        yield text
        normal = normalize(text)
        if normal != text:
            yield normal
