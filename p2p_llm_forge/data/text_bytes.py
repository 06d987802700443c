"""Bytes of the text that a document's first tokens stand for, where a block ends inside it.

What whole documents hold is counted from their text. Of one that is cut, the text says it too, not
its decoded tokens: a normalizer may have made them longer or shorter, and an unknown token tells
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.tokenizer import Encode, is_slow, rules_of

LONGEST_TOKEN = 100  # characters, where a tokenizer does not say which of them a token stands for


def token_sizes(tokenizer: Any) -> np.ndarray | None:
    """The bytes of text of every token; None where tokens do not stand for bytes as they are.

    They do in a byte-level vocabulary without a normalizer: a character of a token is a byte.
    """
    if is_slow(tokenizer) or tokenizer.backend_tokenizer.normalizer is not None:
        return None
    if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
        return None
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    for number, token in tokenizer.added_tokens_decoder.items():
        sizes[number] = len(token.content.encode())
    return sizes


class CutDocuments:
    """Counts the bytes of text before a token of a document. encode: as the document was."""

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._tokenizer = tokenizer
        self._encode = encode
        self._sizes = token_sizes(tokenizer)

    def bytes_before(
        self, cut: int, tokens: np.ndarray, size: int, read: Callable[[], bytes]
    ) -> int:
        """Bytes of text before the token `cut` of a document.

        tokens: all of it, without EOS; size: the bytes of all its text; read: gives that text,
        called only where it is needed. White space there that stands for no token is not counted,
        nor is a character that is cut; but every byte is that is a token by itself.
        """
        if cut in (0, len(tokens)):
            return size if cut else 0
        if self._sizes is not None and int(self._sizes[tokens].sum()) == size:
            return int(self._sizes[tokens[:cut]].sum())
        text = read().decode()
        end = None if is_slow(self._tokenizer) else _by_offsets(self._tokenizer, text, tokens, cut)
        if end is None:
            end = _by_prefixes(self._encode, text, tokens, cut)
        return len(text[:end].encode())


def _by_offsets(tokenizer: Any, text: str, tokens: np.ndarray, cut: int) -> int | None:
    """Characters before the token `cut`; None where the tokenizer encodes the text otherwise."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(rules_of(tokenizer))
    backend.encode_special_tokens = True
    backend.post_processor = None  # some move offsets: white space at the ends is trimmed
    encoding = backend.encode(text, add_special_tokens=False)
    if encoding.ids != tokens.tolist():
        return None
    (_, end), (start, _) = encoding.offsets[cut - 1 : cut + 1]
    if start <= end:  # both stand for parts of one character
        return start
    # Between the two is what a normalizer joined to the first, and white space that nobody keeps.
    return end + len(text[end:start].rstrip())


def _by_prefixes(encode: Encode, text: str, tokens: np.ndarray, cut: int) -> int:
    """Characters of the longest beginning of the text that gives just the tokens before `cut`."""

    def encoded(end: int) -> np.ndarray:
        return encode(pa.array([text[:end].encode()], pa.large_binary()))[0]

    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encoded(middle)) <= cut else (low, middle)
    # A longer beginning may have fewer tokens, and the last of them may not be what it becomes.
    around = range(min(len(text), low + LONGEST_TOKEN), max(0, low - LONGEST_TOKEN), -1)
    wanted = tokens[:cut]
    end = low
    if not np.array_equal(encoded(low), wanted):
        end = next((end for end in around if np.array_equal(encoded(end), wanted)), low)
    while end and text[end - 1].isspace() and np.array_equal(encoded(end - 1), wanted):
        end -= 1
    return end
