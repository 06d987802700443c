"""A tokenizer: loaded or trained, its fingerprint and vocabulary, and its own answer to a text."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.errors import ForgeError

END_OF_TEXT = "<|endoftext|>"

# A LargeBinaryArray of documents (UTF-8) in; all their tokens, one after the other (uint32), and
# the number of tokens of each (int64) out.
Encode = Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray]]


def load_tokenizer(name: str, trust_remote_code: bool = False, eos_token: str | None = None) -> Any:
    """The tokenizer in folder `name`, or of that name on the Hub, as transformers loads it.

    eos_token: what ends documents, where the tokenizer has none or another is wanted; added to the
    vocabulary if it is not in it. Raises ForgeError, also when nothing is known to end one with.
    """
    from transformers import AutoTokenizer

    collects = gc.isenabled()
    gc.disable()  # or the many strings of a vocabulary make it run over all imports
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises what its parts raise: OSError, ValueError, ...
        raise ForgeError(
            f"--tokenizer {name} could not be loaded: {first_line(error)}",
            "give a folder that holds a tokenizer (as save_pretrained writes it) or a name of the "
            "Hub that this machine can reach or has downloaded before; or leave --tokenizer out to "
            "train one on the text",
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
            f"--tokenizer {name} names no end-of-text token (eos_token) to end documents with",
            "give --eos-token '<|endoftext|>' (it is added if the vocabulary has none), or choose "
            "a tokenizer for causal language models",
        )
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab_size` entries, `<|endoftext|>` included.

    Only the counts of the documents' words stay in memory. The same ones give the same tokenizer.
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
    ends = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)


def vocabulary_size(tokenizer: Any) -> int:
    """Rows that an embedding needs: one more than the largest id, added tokens included."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def token_dtype(size: int) -> str:
    """The smallest type for a vocabulary of `size`. Raises ForgeError when four bytes are few."""
    if size > 2**32:
        found = f"the vocabulary has {size:,} entries, at most {2**32:,} fit into four bytes"
        raise ForgeError(found, "use another --tokenizer")
    return "uint16" if size <= 2**16 else "uint32"


def is_slow(tokenizer: Any) -> bool:
    """Whether it is written in Python, so that threads would take turns."""
    return getattr(tokenizer, "backend_tokenizer", None) is None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides what the tokenizer answers, and of its end-of-text token."""
    if is_slow(tokenizer):
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        rules = rules_of(tokenizer)
    return hashlib.sha256(f"{rules}\0{tokenizer.eos_token}".encode()).hexdigest()


def rules_of(tokenizer: Any) -> str:
    """The tokenizer as JSON (`tokenizer.json`), not truncating or padding, so nothing is lost."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def bytes_of_text(tokenizer: Any, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that `tokens` stand for; control tokens stand for none.

    Exact for byte-level tokenizers, even where the tokens begin inside a character; for others it
    is the length of the decoded text, which a normalizer can make differ by some bytes.
    """
    tokens = np.asarray(tokens, np.int64)
    tokens = tokens[~np.isin(tokens, list(control_tokens(tokenizer).values()))]
    if is_slow(tokenizer) or type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
        return len(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False).encode())
    # One character of a byte-level token stands for one byte.
    kinds, counts = np.unique(tokens, return_counts=True)
    spellings = tokenizer.convert_ids_to_tokens(kinds.tolist())
    return int(sum(len(text) * n for text, n in zip(spellings, counts, strict=True)))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that no text may produce, by their spelling; the unknown token is not one."""
    added = tokenizer.added_tokens_decoder
    control = {token.content: number for number, token in added.items() if token.special}
    control[tokenizer.eos_token] = tokenizer.eos_token_id
    if tokenizer.unk_token != tokenizer.eos_token:
        control.pop(tokenizer.unk_token, None)
    return control


def reference_encoder(tokenizer: Any) -> Encode:
    """Encode by the tokenizer itself."""
    encode_texts = _asking_python(tokenizer) if is_slow(tokenizer) else _asking_rust(tokenizer)

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        ids = encode_texts([document.decode() for document in documents.to_pylist()])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = itertools.chain.from_iterable(ids)
        return np.fromiter(flat, np.uint32, int(lengths.sum())), lengths

    return encode


def _asking_rust(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(rules_of(tokenizer))  # what is set next is for this one alone
    backend.encode_special_tokens = True  # the spelling of a special token is plain text
    ask = backend.encode_batch_fast
    return lambda texts: [one.ids for one in ask(texts, add_special_tokens=False)]


def _asking_python(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    def encode_texts(texts: list[str]) -> list[list[int]]:
        ask = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        try:
            return [tokenizer(text, **ask)["input_ids"] for text in texts]
        except Exception as error:  # anything: it may be code that came with the tokenizer
            raise ForgeError(
                f"the tokenizer failed ({type(error).__name__}: {error}) on one of the documents "
                f"after the one that begins {texts[0][:40]!r}",
                "correct the tokenizer's code, or use another --tokenizer",
            ) from error

    return encode_texts
