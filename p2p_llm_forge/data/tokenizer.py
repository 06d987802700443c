"""Tokenizers: load or train one, encode fast, and prove it equals the tokenizer's own answer."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from p2p_llm_forge.data.columns import values_and_offsets
from p2p_llm_forge.data.tokenizer_process import TokenizerProcess
from p2p_llm_forge.errors import ForgeError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

END_OF_TEXT = "<|endoftext|>"

# A LargeBinaryArray of documents (UTF-8) in; all their tokens, one after the other (uint32), and
# the number of tokens of each (int64) out.
Encode = Callable[["pa.LargeBinaryArray"], "tuple[np.ndarray, np.ndarray]"]
Backend = Literal["auto", "fast", "reference"]

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

RENEWED_AFTER_BYTES = 12 << 20  # of text, at the earliest: then an encoder may be made anew
MEMORY_OF_A_THREAD = 256 << 20  # that encoding may take for each before that happens
DOCUMENTS_AT_A_TIME = 1000  # that a tokenizer itself is asked for
SAMPLE_WINDOW = 1 << 17  # bytes in which unusual characters are looked for, a few times a piece


class FastPathDiffers(Exception):
    """The fast encoder gave other tokens than the tokenizer itself."""


# --- loading and training -------------------------------------------------------------------------


def load_tokenizer(name: str, trust_remote_code: bool = False, eos_token: str | None = None) -> Any:
    """The tokenizer in folder `name`, or of that name on the Hub, as transformers loads it.

    eos_token: what ends documents, where the tokenizer does not say it or another is wanted; added
    to the vocabulary if it is not in it. Raises ForgeError when the tokenizer cannot be loaded or
    nothing is known to end a document with.
    """
    from transformers import AutoTokenizer

    collects = gc.isenabled()
    gc.disable()  # or it goes over all that is imported for the sake of a vocabulary's many strings
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises what its parts raise: OSError, ValueError, ...
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ForgeError(
            f"--tokenizer {name} could not be loaded: {reason}\n"
            "Give a folder that holds a tokenizer (as save_pretrained writes it) or a name of the "
            "Hub that this machine can reach or has downloaded before; or leave --tokenizer out to "
            "train one on the text."
        ) from error
    finally:
        if collects:
            gc.enable()
    # transformers 5.23 would save how it was reached: offline, the same tokenizer has other bytes.
    for setting in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(setting, None)
    if eos_token is not None:
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token_id is None:
        raise ForgeError(
            f"--tokenizer {name} names no end-of-text token (eos_token), and every document must "
            "end with one: give --eos-token '<|endoftext|>' (it is added if the vocabulary has "
            "none), or choose a tokenizer for causal language models."
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab_size` entries, `<|endoftext|>` included.

    The documents are streamed; only the counts of their words stay in memory. The same documents
    give the same tokenizer. A small text may have fewer pairs to merge than were asked for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Rows that an embedding needs: one more than the largest id, added tokens included."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def token_dtype(size: int) -> str:
    """The smallest type for a vocabulary of `size`. Raises ForgeError when four bytes are few."""
    if size > 2**32:
        raise ForgeError(
            f"the vocabulary has {size:,} entries, at most {2**32:,} fit into the four bytes of a "
            "token: use another --tokenizer"
        )
    return "uint16" if size <= 2**16 else "uint32"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides what the tokenizer answers, and of its end-of-text token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        _without_truncation(backend).to_str()
        if backend is not None
        else json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    )
    return hashlib.sha256(f"{rules}\0{tokenizer.eos_token}".encode()).hexdigest()


def bytes_of_text(tokenizer: Any, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that `tokens` stand for; control tokens stand for none.

    Exact for byte-level tokenizers, even where the tokens begin inside a character; for others it
    is the length of the decoded text, which a normalizer can make differ by some bytes.
    """
    import numpy as np

    tokens = np.asarray(tokens, np.int64)
    tokens = tokens[~np.isin(tokens, list(_control_tokens(tokenizer).values()))]
    if _is_byte_level(tokenizer):
        # One character of a byte-level token stands for one byte.
        kinds, counts = np.unique(tokens, return_counts=True)
        spellings = tokenizer.convert_ids_to_tokens(kinds.tolist())
        return int(sum(len(text) * n for text, n in zip(spellings, counts, strict=True)))
    return len(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False).encode())


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and type(backend.decoder).__name__ == "ByteLevel"


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that no text may produce, by their spelling; the unknown token is not one."""
    added = tokenizer.added_tokens_decoder
    control = {token.content: number for number, token in added.items() if token.special}
    control[tokenizer.eos_token] = tokenizer.eos_token_id
    if tokenizer.unk_token != tokenizer.eos_token:
        control.pop(tokenizer.unk_token, None)
    return control


def _without_truncation(backend: Any) -> Any:
    """The `tokenizers.Tokenizer` or a copy that neither truncates nor pads, so nothing is lost."""
    from tokenizers import Tokenizer

    if backend.truncation is None and backend.padding is None:
        return backend
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


# --- encoding -------------------------------------------------------------------------------------


class Encoders:
    """Hands out encoders of one tokenizer and remembers which way they take.

    backend: `fast` and `auto` encode by gigatoken where it answers as the tokenizer does, `auto`
    falling back to the tokenizer itself; `reference` always asks the tokenizer. After creation,
    `is_fast` says which way was taken and `reason` why not the fast one.

    loaded_from: the arguments of `load_tokenizer`. With them, a tokenizer written in Python works
    in further processes, one for every thread but the first; they end when this is closed.

    In text, the spelling of a control token (`<|endoftext|>`) is text like any other: it never
    becomes that token.
    """

    def __init__(
        self, tokenizer: Any, backend: Backend = "auto", loaded_from: dict[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._loaded_from = loaded_from
        self._reference = reference_encoder(tokenizer)
        self._guard = control_token_guard(tokenizer)
        self._of_this_thread = threading.local()
        # For the first thread that encodes; what others get is made when they come.
        self._spare = [self._reference]
        self._processes: list[TokenizerProcess] = []
        self._is_closed = False
        self.reason = "" if backend != "reference" else "asked for by --tokenizer-backend"
        if backend != "reference":
            self.reason = self._why_not_fast()
        self.is_fast = not self.reason
        if backend == "fast" and self.reason:
            raise ForgeError(
                f"--tokenizer-backend fast cannot be used with this tokenizer: {self.reason}. "
                "Use --tokenizer-backend auto."
            )
        self._threads = 0
        self._memory_at_start = _memory_of_process()

    def close(self) -> None:
        """End the work: what threads are encoding by the tokenizer fails soon, processes end."""
        self._is_closed = True
        for process in self._processes:
            process.close()

    def _why_not_fast(self) -> str:
        import pyarrow as pa

        spellings = [f"a {text}{text} b" for text in _control_tokens(self._tokenizer)]
        texts = [text.encode() for text in (*HARD_TEXTS, *spellings)]
        column = pa.array(texts, pa.large_binary())
        try:
            self._rules = rules_of_text(self._tokenizer)
            fast = fast_encoder(self._rules)
            require_same(fast, self._reference, column)
            self._spare = [fast]
        except FastPathDiffers as difference:
            return str(difference)
        except (
            Exception
        ) as error:  # gigatoken says in its own ways that it does not know a tokenizer
            return f"gigatoken does not support it ({str(error) or type(error).__name__})"
        return ""

    def encode(self, documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all documents (uint32, one after the other) and the length of each (int64).

        Any thread may call this. On the fast way a few texts of every call are encoded by the
        tokenizer too. Raises FastPathDiffers when the answers differ, ForgeError when a document
        cannot be told from a control token.
        """
        own = self._of_this_thread
        if not hasattr(own, "bytes"):
            self._threads += 1
        if not hasattr(own, "encode"):
            own.encode, own.bytes = self._new_encoder(), 0
        if self.is_fast:
            tokens, lengths = own.encode(documents)
            require_same(own.encode, self._reference, sample(documents))
            own.bytes += documents.nbytes
            if own.bytes > RENEWED_AFTER_BYTES and self._has_grown():
                del own.encode
        else:
            tokens, lengths = self._by_and_by(own.encode, documents)
        self._guard(tokens, lengths, documents)
        return tokens, lengths

    def _has_grown(self) -> bool:
        """Whether caches may have become too large.

        gigatoken 0.10 remembers every word that it has seen and has no setting for it: text of
        ever new words takes 10 bytes of memory for each of its own. A new encoder begins anew.
        """
        return _memory_of_process() - self._memory_at_start > self._threads * MEMORY_OF_A_THREAD

    def _new_encoder(self) -> Encode:
        """An encoder for the thread that asks."""
        try:
            return self._spare.pop()
        except IndexError:
            return self._another()

    def _another(self) -> Encode:
        """One more encoder."""
        if self.is_fast:
            # gigatoken's cache of words is per encoder: one per thread is 1.4 times as fast.
            return fast_encoder(self._rules)
        if is_slow(self._tokenizer) and self._loaded_from:
            process = TokenizerProcess(self._loaded_from)
            self._processes.append(process)
            if self._is_closed:  # meanwhile
                process.close()
            return process.encode
        return self._reference

    def _by_and_by(
        self, encode: Encode, documents: pa.LargeBinaryArray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode some documents at a time: whoever closes this does not wait for all."""
        import numpy as np

        found = []
        for start in range(0, max(1, len(documents)), DOCUMENTS_AT_A_TIME):
            if self._is_closed:
                raise ForgeError("the work was given up")
            found.append(encode(documents[start : start + DOCUMENTS_AT_A_TIME]))
        tokens, lengths = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)


def _memory_of_process() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def is_slow(tokenizer: Any) -> bool:
    """Whether it is written in Python, so that threads would take turns."""
    return getattr(tokenizer, "backend_tokenizer", None) is None


def reference_encoder(tokenizer: Any) -> Encode:
    """Encode by the tokenizer itself."""
    import numpy as np

    if not is_slow(tokenizer):
        from tokenizers import Tokenizer

        backend = _without_truncation(tokenizer.backend_tokenizer)
        backend = Tokenizer.from_str(backend.to_str())  # what is set next is for this one alone
        backend.encode_special_tokens = True  # the spelling of a special token is plain text

        def encode_texts(texts: list[str]) -> list[list[int]]:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    else:

        def encode_texts(texts: list[str]) -> list[list[int]]:
            ask = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            try:
                return [tokenizer(text, **ask)["input_ids"] for text in texts]
            except Exception as error:  # anything: it may be code that came with the tokenizer
                raise ForgeError(
                    f"the tokenizer failed ({type(error).__name__}: {error}) on one of the "
                    f"documents after the one that begins {texts[0][:40]!r}: mend the tokenizer, "
                    "or use another --tokenizer"
                ) from error

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        ids = encode_texts([document.decode() for document in documents.to_pylist()])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = (token for document in ids for token in document)
        return np.fromiter(flat, np.uint32, int(lengths.sum())), lengths

    return encode


def rules_of_text(tokenizer: Any) -> str:
    """The tokenizer as JSON (`tokenizer.json`), without its special tokens.

    gigatoken 0.10, like tokenizers, turns the spelling of a special token into that token, but has
    no setting against it: it must not know them.
    """
    rules = _without_truncation(tokenizer.backend_tokenizer).to_str()
    # The first key of that name is the tokenizer's own. Only its value is parsed: the vocabulary
    # and its merges, which stay as they are, would take ten times as long as all the rest.
    key = '"added_tokens":'
    before, _, rest = rules.partition(key)
    tokens, end = json.JSONDecoder().raw_decode(rest)
    ordinary = [token for token in tokens if not token["special"]]
    return f"{before}{key}{json.dumps(ordinary)}{rest[end:]}"


def fast_encoder(rules: str) -> Encode:
    """Encode by gigatoken. rules: from `rules_of_text`.

    Raises what gigatoken raises for a tokenizer that it does not know.
    """
    import awkward
    import gigatoken
    import numpy as np

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


def sample(
    documents: pa.LargeBinaryArray, count: int = 4, longest: int = 500
) -> pa.LargeBinaryArray:
    """A few texts that stand for `documents`: beginnings of some and, as mistakes hide there, some
    places where the text is not plain ASCII; each at most `longest` bytes."""
    import numpy as np
    import pyarrow as pa

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
    return pa.array(chosen, pa.large_binary())


def require_same(fast: Encode, reference: Encode, texts: pa.LargeBinaryArray) -> None:
    """Raise FastPathDiffers, naming the text, unless both encoders give the same tokens."""
    import numpy as np

    for text, ours, expected in zip(
        texts.to_pylist(),
        _per_document(*fast(texts)),
        _per_document(*reference(texts)),
        strict=True,
    ):
        if not np.array_equal(ours, expected):
            raise FastPathDiffers(
                f"gigatoken and the tokenizer differ on {text[:60].decode(errors='ignore')!r}"
            )


def _per_document(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    import numpy as np

    return np.split(tokens, np.cumsum(lengths))[:-1]


def control_token_guard(
    tokenizer: Any,
) -> Callable[[np.ndarray, np.ndarray, pa.LargeBinaryArray], None]:
    """A check of encoded documents (tokens, lengths, documents): ForgeError for a control token.

    Encoders here read the spelling of one as text, but some vocabularies list it among their
    ordinary entries and cannot tell the two apart.
    """
    import numpy as np

    control = sorted(_control_tokens(tokenizer).values())

    def guard(tokens: np.ndarray, lengths: np.ndarray, documents: pa.LargeBinaryArray) -> None:
        # Few are compared one by one; for many, isin makes a table and answers in one pass.
        if len(control) <= 4 and not any((tokens == token).any() for token in control):
            return
        places = np.flatnonzero(np.isin(tokens, control))
        if not len(places):
            return
        spelling = tokenizer.convert_ids_to_tokens(int(tokens[places[0]]))
        row = int(np.searchsorted(np.cumsum(lengths), places[0], side="right"))
        document = documents[row].as_py()
        raise ForgeError(
            f"the text holds {spelling!r}, which this tokenizer cannot tell from its control token "
            f"(in the document that begins {document[:40].decode(errors='ignore')!r}). "
            "Take it out of the text, or use another --tokenizer."
        )

    return guard
