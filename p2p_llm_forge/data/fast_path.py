"""The fast path of encoding, gigatoken, and the check that it answers as the tokenizer does.

`check_fast_path` is asked once for a tokenizer, `require_same` on a `sample` of every piece.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.parts import column_of, values_and_offsets
from p2p_llm_forge.data.tokenizer import Encode, control_tokens, rules_of

SAMPLE_WINDOW = 1 << 17  # bytes in which unusual characters are looked for, a few times a piece

# Text on which tokenizers have been seen to disagree. Every fast encoder must get these right.
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


class FastPathDiffers(Exception):
    """The fast encoder gives other tokens than the tokenizer itself, or does not support it."""


def check_fast_path(tokenizer: Any, reference: Encode) -> tuple[str, Encode]:
    """The rules for fast encoders, and one that gave the tokenizer's own answer to hard texts.

    reference: encodes by the tokenizer itself. Raises FastPathDiffers, with the reason.
    """
    spellings = [f"a {text}{text} b" for text in control_tokens(tokenizer)]
    try:
        rules = rules_of_text(tokenizer)
        fast = fast_encoder(rules)
        require_same(fast, reference, column_of([t.encode() for t in (*HARD_TEXTS, *spellings)]))
        return rules, fast
    except FastPathDiffers:
        raise
    except Exception as error:  # gigatoken has several for a tokenizer that it does not know
        raise FastPathDiffers(
            f"gigatoken does not support it ({str(error) or type(error).__name__})"
        ) from error


def require_same(fast: Encode, reference: Encode, texts: pa.LargeBinaryArray) -> None:
    """Raise FastPathDiffers, naming the text, unless both encoders give the same tokens."""
    answers = (
        np.split(tokens, np.cumsum(lengths))[:-1]
        for tokens, lengths in (fast(texts), reference(texts))
    )
    for text, ours, expected in zip(texts.to_pylist(), *answers, strict=True):
        if not np.array_equal(ours, expected):
            begins = text[:60].decode(errors="ignore")
            raise FastPathDiffers(f"gigatoken and the tokenizer differ on {begins!r}")


def sample(
    documents: pa.LargeBinaryArray, count: int = 4, longest: int = 500
) -> pa.LargeBinaryArray:
    """A few texts that stand for `documents`: beginnings of some and, as mistakes hide there, some
    places where the text is not plain ASCII; each at most `longest` bytes."""
    text, ends = values_and_offsets(documents)
    places = [ends[len(documents) * n // count] for n in range(count) if len(documents)]
    for window in (len(text) * n // count for n in range(count)):
        unusual = np.flatnonzero(text[window : window + SAMPLE_WINDOW] >= 0x80)
        places += [window + unusual[len(unusual) // 2]] if len(unusual) else []
    chosen = []
    for place in (place for place in places if place < len(text)):
        document = np.searchsorted(ends, place, side="right")
        start = max(ends[document - 1], place - 100)
        piece = text[start : min(ends[document], start + longest)].tobytes()
        chosen.append(piece.decode(errors="ignore").encode())
    return column_of(chosen)


def fast_encoder(rules: str) -> Encode:
    """Encode by gigatoken, which raises its own errors. rules: from `rules_of_text`."""
    import awkward
    import gigatoken

    backend = gigatoken.Tokenizer.from_json(rules)

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        if not len(documents):
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # As an Arrow column, no document becomes a Python object: 1.6 times as fast as a list.
        layout = backend.encode_batch(awkward.from_arrow(documents), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return tokens, np.diff(offsets).astype(np.int64, copy=False)

    return encode


def rules_of_text(tokenizer: Any) -> str:
    """The tokenizer as JSON (`tokenizer.json`), without its special tokens.

    gigatoken 0.10, like tokenizers, turns the spelling of a special token into that token, but has
    no setting against it: it must not know them.
    """
    rules = rules_of(tokenizer)
    # The first key of that name is the tokenizer's own. Only its value is parsed: the vocabulary
    # and its merges, which stay as they are, would take ten times as long as all the rest.
    key = '"added_tokens":'
    before, _, rest = rules.partition(key)
    tokens, end = json.JSONDecoder().raw_decode(rest)
    ordinary = [token for token in tokens if not token["special"]]
    return f"{before}{key}{json.dumps(ordinary)}{rest[end:]}"
