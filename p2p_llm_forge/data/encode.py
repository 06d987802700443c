"""Encoders for threads: by the fast path where it is right, else by the tokenizer itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data import fast_path
from p2p_llm_forge.data.fast_path import FastPathDiffers
from p2p_llm_forge.data.hard_texts import HARD_TEXTS
from p2p_llm_forge.data.kept_proofs import KeptProof
from p2p_llm_forge.data.parts import column_of, values_and_offsets
from p2p_llm_forge.data.token_runs import Run, interleaved, joined, run_of, without
from p2p_llm_forge.data.tokenizer import Encode, control_tokens, is_slow, reference_encoder
from p2p_llm_forge.data.tokenizer_process import TokenizerProcess
from p2p_llm_forge.data.without_control import PlainTextEncoder
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.memory import own_memory, return_memory

Backend = Literal["auto", "fast", "reference"]

RENEWED_AFTER_BYTES = 6 << 20  # of text, at the earliest: then an encoder may be replaced
# Memory that encoding may take for each thread before that happens: more than what words of real
# text need, which a new encoder has to learn again; less where there are ever new words.
MEMORY_OF_A_THREAD = 192 << 20
MEMORY_FOR_NEW_WORDS = 80 << 20
BYTES_FOR_NEW_WORDS = 14  # of memory for each of text; source code begins with 12, soon below 2
# That a fast encoder is asked for, or the document that is longer: little while it may learn many
# words, for tables that double take most memory just then; later more, which is faster.
BYTES_AT_A_TIME, BYTES_LATER, LATER_AFTER_BYTES = 2 << 20, 8 << 20, 32 << 20
DOCUMENTS_AT_A_TIME = 1000  # that a tokenizer itself is asked for


class Encoders:
    """Hands out encoders of one tokenizer and knows which kind they are.

    backend: `fast` and `auto` encode by gigatoken where it answers as the tokenizer does, `auto`
    falling back to the tokenizer itself; `reference` always asks the tokenizer. After creation,
    `is_fast` holds which of the two it is, and `reason` why not the fast one.

    loaded_from: the arguments of `load_tokenizer`. With them, a tokenizer written in Python works
    in further processes, one for every thread but the first; they end when this is closed.

    skips_bad: a document that the tokenizer cannot encode is no error.

    In text, the spelling of a control token (`<|endoftext|>`) is text like any other: it never
    becomes that token.
    """

    def __init__(
        self,
        tokenizer: Any,
        backend: Backend = "auto",
        loaded_from: dict[str, Any] | None = None,
        skips_bad: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_bad = skips_bad
        self._plain = PlainTextEncoder(tokenizer, loaded_from)
        self._loaded_from = loaded_from
        self._reference = made_when_asked(lambda: reference_encoder(tokenizer))
        if is_slow(tokenizer):
            require_repeatable(self._reference)
        self._control = sorted(control_tokens(tokenizer).values())
        self._of_this_thread = threading.local()
        # For the first thread that encodes; what others get is made when they come.
        self._spare = [self._reference]
        self._processes: list[TokenizerProcess] = []
        self._is_closed = False
        self.reason = "asked for by --tokenizer-backend"
        if backend != "reference":
            try:
                self._new_fast, first = fast_path.check_fast_path(tokenizer, self._reference)
                self._spare, self.reason = [first], ""
            except FastPathDiffers as difference:
                self.reason = str(difference)
                if backend == "fast":
                    found = f"--tokenizer-backend fast does not fit this tokenizer: {difference}"
                    raise ForgeError(found, "use --tokenizer-backend auto") from difference
        self.is_fast = not self.reason
        self._threads = 0
        self._memory_at_start = own_memory()

    @property
    def is_closed(self) -> bool:
        """Whether the work was ended."""
        return self._is_closed

    def close(self) -> None:
        """End the work: what threads are encoding by the tokenizer fails soon, processes end."""
        self._is_closed = True
        for process in self._processes:
            process.close()

    def encode(self, documents: pa.LargeBinaryArray) -> Run:
        """Tokens of all documents (uint32, one after the other) and the length of each (int64).

        Any thread may call this. On the fast path a few texts of every call are encoded by the
        tokenizer too. Raises FastPathDiffers when the answers differ, ForgeError when the tokenizer
        cannot encode a document as text; where bad ones are skipped, its length is -1 instead.
        """
        if self.is_fast:
            run = self._by_fast_path(documents)
        else:
            run = self._in_portions(self._encoder_of_this_thread(), documents)
        return self._without_control(documents, run)

    def encode_few(self, documents: pa.LargeBinaryArray) -> Run:
        """What `encode` gives, by the tokenizer itself in this process: no encoder is made."""
        return self._without_control(documents, self._reference(documents))

    def _encoder_of_this_thread(self) -> Encode:
        own = self._of_this_thread
        if not hasattr(own, "bytes"):
            self._threads += 1
        if not hasattr(own, "encode"):
            own.encode, own.bytes = self._new_encoder(), 0
        return own.encode

    def _by_fast_path(self, documents: pa.LargeBinaryArray) -> Run:
        """Encode some text at a time, so that an encoder whose caches grow is replaced in time."""
        own, found = self._of_this_thread, []
        at_most = BYTES_LATER if getattr(own, "bytes", 0) > LATER_AFTER_BYTES else BYTES_AT_A_TIME
        for portion in _portions(documents, at_most):
            found.append(self._encoder_of_this_thread()(portion))
            if len(found) == 1:  # not before: so one thread encodes while another makes that
                self._require_same(self._encoder_of_this_thread(), documents)
            own.bytes += portion.nbytes
            if own.bytes > RENEWED_AFTER_BYTES and self._has_grown(own.bytes):
                del own.encode
                return_memory()
        return joined(found)

    def _require_same(self, encode: Encode, documents: pa.LargeBinaryArray) -> None:
        """Raise FastPathDiffers, here and in later runs, if a sample has other tokens."""
        try:
            fast_path.require_same(encode, self._reference, fast_path.sample(documents))
        except FastPathDiffers as difference:
            KeptProof(self._tokenizer).keep(str(difference))
            raise

    def _has_grown(self, text_bytes: int) -> bool:
        """Whether caches may have become too large, after so much text for each encoder.

        gigatoken 0.10 remembers every word that it has seen and has no setting for it: text of
        ever new words takes 10 bytes of memory for each of its own. A new encoder has none.
        """
        grown = (own_memory() - self._memory_at_start) / self._threads
        has_new_words = grown > BYTES_FOR_NEW_WORDS * text_bytes
        return grown > (MEMORY_FOR_NEW_WORDS if has_new_words else MEMORY_OF_A_THREAD)

    def _new_encoder(self) -> Encode:
        """An encoder for the thread that asks."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        if self.is_fast:
            # gigatoken's cache of words is per encoder: one per thread is 1.4 times as fast.
            return self._new_fast()
        if not (is_slow(self._tokenizer) and self._loaded_from):
            return self._reference
        process = TokenizerProcess(self._loaded_from)
        self._processes.append(process)
        if self._is_closed:  # meanwhile
            process.close()
        return process.encode

    def _in_portions(self, encode: Encode, documents: pa.LargeBinaryArray) -> Run:
        """Encode some documents at a time: whoever closes this does not wait for all."""
        found = []
        for start in range(0, max(1, len(documents)), DOCUMENTS_AT_A_TIME):
            if self._is_closed:
                raise ForgeError("the work was given up", "run the same command again")
            found.append(encode(documents[start : start + DOCUMENTS_AT_A_TIME]))
        return joined(found)

    def _without_control(self, documents: pa.LargeBinaryArray, run: Run) -> Run:
        """Encode by other means what has come out as a control token, or has not come out.

        Encoders read the spelling of a control token as text, but some vocabularies list it among
        their ordinary entries.
        """
        tokens, lengths = run
        again = lengths < 0
        # Few are compared one by one; for many, isin makes a table and answers in one pass.
        if len(self._control) > 4 or any((tokens == token).any() for token in self._control):
            places = np.flatnonzero(np.isin(tokens, self._control))
            again[np.searchsorted(np.cumsum(lengths.clip(0)), places, side="right")] = True
        if not again.any():
            return run
        texts = [document.decode() for document in documents.filter(again).to_pylist()]
        found = [self._encode_carefully(text) for text in texts]
        return interleaved(again, without(again, run), run_of(found))

    def _encode_carefully(self, text: str) -> list[int] | None:
        try:
            return self._plain.encode(text)
        except ForgeError:
            if self._skips_bad:
                return None
            raise


def made_when_asked(make: Callable[[], Encode]) -> Encode:
    """The encoder that `make` gives, made when it is asked: while other threads are encoding."""
    made: list[Encode] = []
    lock = threading.Lock()

    def encode(documents: pa.LargeBinaryArray) -> Run:
        with lock:
            if not made:
                made.append(make())
        return made[0](documents)

    return encode


def require_repeatable(encode: Encode) -> None:
    """Raise ForgeError for a tokenizer that gives other tokens for a text each time."""
    texts = column_of([text.encode() for text in HARD_TEXTS])
    first, *others = (encode(texts) for _ in range(5))
    for tokens, lengths in others:
        if not (np.array_equal(lengths, first[1]) and np.array_equal(tokens, first[0])):
            raise ForgeError(
                "the tokenizer encodes at random: the same text has other tokens each time",
                "switch that off where it is made (dropout, sampling), or use another --tokenizer",
            )


def _portions(documents: pa.LargeBinaryArray, at_most: int) -> Iterator[pa.LargeBinaryArray]:
    """The documents, some at a time: at most so many bytes of text, or one document."""
    ends, start = values_and_offsets(documents)[1], 0
    while start < len(documents) or not start:
        end = int(np.searchsorted(ends, ends[start] + at_most, side="right")) - 1
        end = min(max(end, start + 1), len(documents))
        yield documents[start:end]
        start = max(end, 1)
