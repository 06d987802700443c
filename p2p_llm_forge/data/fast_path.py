"""The fast path of encoding, gigatoken, and the proof that it answers as the tokenizer does.

`check_fast_path` is asked once for a tokenizer, `require_same` on a `sample` of every piece.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.fast_path_limits import FastPathDiffers, require_all_read
from p2p_llm_forge.data.hard_texts import HARD_TEXTS, glued, overlapping, random_texts
from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.data.kept_proofs import KeptProof
from p2p_llm_forge.data.parts import column_of, values_and_offsets
from p2p_llm_forge.data.token_runs import interleaved, run_of
from p2p_llm_forge.data.tokenizer import (
    Encode,
    control_tokens,
    is_slow,
    panics_as_errors,
    rules_of,
    settings_of,
)

LITTLE_TEXT = 1 << 14  # bytes, such as a sample, for which awkward's own 3 ms are much
SAMPLE_WINDOW = 1 << 17  # bytes in which unusual characters are looked for, a few times a piece


def check_fast_path(tokenizer: Any, reference: Encode) -> tuple[Callable[[], Encode], Encode]:
    """What makes fast encoders, and one; such a one gave the tokenizer's answer to all hard texts.

    reference: encodes by the tokenizer itself. Raises FastPathDiffers, with the reason. A proof
    that was made before counts.
    """
    if is_slow(tokenizer):
        kind = type(tokenizer).__name__
        raise FastPathDiffers(f"gigatoken does not support it ({kind} is written in Python)")
    proof = KeptProof(tokenizer)
    reason = proof.reason()
    if reason:
        raise FastPathDiffers(reason)
    try:
        rules = rules_of_text(tokenizer)
        require_all_read(rules)
        new = _maker(rules, reference, tokenizer.backend_tokenizer.normalizer)
        first = new()
        if reason is None:
            texts = column_of([text.encode() for text in texts_of_proof(tokenizer)])
            require_same(first, reference, texts)
            proof.keep("")
        return new, first
    except FastPathDiffers as difference:
        proof.keep(str(difference))
        raise
    except Exception as error:  # gigatoken has several for a tokenizer that it does not know
        raise FastPathDiffers(f"gigatoken does not support it ({first_line(error)})") from error


def texts_of_proof(tokenizer: Any) -> Iterator[str]:
    """Texts on which encoders of this tokenizer are likely to differ, if they do."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    spellings = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()})
    spellings += [text for text in control_tokens(tokenizer) if text not in spellings]
    yield from HARD_TEXTS
    yield from glued(spellings)
    yield from overlapping(spellings)
    yield from random_texts(normalizer.normalize_str if normalizer else str)


def _maker(rules: str, reference: Encode, normalizer: Any) -> Callable[[], Encode]:
    """What makes fast encoders by these rules. normalizer: the tokenizer's own."""
    settings = settings_of(rules)
    if not _is_nfc(settings["normalizer"]):
        return lambda: fast_encoder(rules)
    # gigatoken 0.10 composes by another version of Unicode than tokenizers 0.23.
    rules = _with(rules, "normalizer", lambda _: None)
    normalize = normalizer.normalize_str
    spellings = {token["content"] for token in settings["added_tokens"]}
    spellings |= {normalize(text) for text in spellings}
    added = re.compile("|".join(map(re.escape, sorted(spellings)))) if spellings else None

    def composed(text: str) -> str | None:
        normal: str = normalize(text)
        # The tokenizer looks for added tokens between letters that are not composed yet.
        holds_one = added and (added.search(text) or added.search(normal))
        return None if holds_one else normal

    return lambda: composed_first(fast_encoder(rules), reference, composed)


def _is_nfc(normalizer: Any) -> bool:
    """Whether this normalizer does nothing but compose."""
    if normalizer and normalizer["type"] == "Sequence":
        return bool(normalizer["normalizers"]) and all(map(_is_nfc, normalizer["normalizers"]))
    return bool(normalizer) and normalizer["type"] == "NFC"


def composed_first(
    fast: Encode, reference: Encode, composed: Callable[[str], str | None]
) -> Encode:
    """`fast`, which does not normalize, for documents in NFC and what `composed` makes of others;
    `reference` for the few of which that makes nothing.

    What is in NFC by Python's Unicode (13 or later) is so by that of tokenizers 0.23 (older) too: a
    character keeps what it was given, and one that is not known yet is not changed.
    """

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        others = not_composed(documents)
        if not others.any():
            return fast(documents)
        texts = documents.to_pylist()
        for place in np.flatnonzero(others):
            normal = composed(texts[place].decode())
            if normal is not None:
                texts[place], others[place] = normal.encode(), False
        encoded = fast(column_of([t for t, left in zip(texts, others, strict=True) if not left]))
        return interleaved(others, encoded, reference(documents.filter(others)))

    return encode


def not_composed(documents: pa.LargeBinaryArray) -> np.ndarray:
    """Which of the documents are not in NFC (bool)."""
    others = np.zeros(len(documents), bool)
    text, ends = values_and_offsets(documents)
    # Below U+0300, whose UTF-8 begins with 0xCC, everything is composed. One document at a time:
    # where a mark leaves it open, Python composes all that it is asked about.
    unusual = np.flatnonzero(text >= 0xCC)
    for place in np.unique(np.searchsorted(ends, unusual, side="right") - 1):
        document = text[ends[place] : ends[place + 1]].tobytes().decode()
        others[place] = not unicodedata.is_normalized("NFC", document)
    return others


def require_same(fast: Encode, reference: Encode, texts: pa.LargeBinaryArray) -> None:
    """Raise FastPathDiffers, naming the text, unless both encoders give the same tokens."""
    runs = fast(texts), reference(texts)  # on some texts the tokenizer itself may fail: length -1
    answers = (np.split(tokens, np.cumsum(lengths.clip(0)))[:-1] for tokens, lengths in runs)
    same_length = runs[0][1] == runs[1][1]
    for text, same, ours, expected in zip(texts.to_pylist(), same_length, *answers, strict=True):
        if not (same and np.array_equal(ours, expected)):
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

    with panics_as_errors():
        backend = gigatoken.Tokenizer.from_json(rules)

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        if not len(documents):
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        with panics_as_errors():
            if documents.nbytes < LITTLE_TEXT:
                return run_of(backend.encode_batch_list(documents.to_pylist(), parallel=False))
            # As a column, no document becomes a Python object: 1.6 times as fast as a list.
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

    def ordinary(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [token for token in tokens if not token["special"]]

    return _with(rules_of(tokenizer), "added_tokens", ordinary)


def _with(rules: str, key: str, change: Callable[[Any], Any]) -> str:
    """The JSON of a tokenizer with one of its values changed."""
    # The first key of that name is the tokenizer's own. Only its value is parsed: the vocabulary
    # and its merges, which stay as they are, would take ten times as long as all the rest.
    before, _, rest = rules.partition(f'"{key}":')
    value, end = json.JSONDecoder().raw_decode(rest)
    return f'{before}"{key}":{json.dumps(change(value))}{rest[end:]}'
