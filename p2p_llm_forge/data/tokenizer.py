"""A tokenizer: loaded or trained, its fingerprint and vocabulary, and its own answer to a text."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.dataset import TRUST_CODE
from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.data.token_runs import run_of
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import files_in, write_json

END_OF_TEXT = "<|endoftext|>"
NONE = "no token for a part of the text"  # stands for an unknown token, and in messages
TOKENIZER_CONFIG = "tokenizer_config.json"

# What transformers 5.23 keeps among a tokenizer's settings, and saves, of how it was reached.
HOW_IT_WAS_REACHED = ("local_files_only", "is_local")
# The same, in tokenizers of which the code comes with them: whether that was a folder or the Hub.
HOW_ITS_CODE_WAS_REACHED = ("auto_map",)
_SWITCHED_OFF = (
    "--tokenizer {name} encodes at random ({what}): that is switched off, so that the same text "
    "gives the same tokens"
)

# A LargeBinaryArray of documents (UTF-8) in; all their tokens, one after the other (uint32), and
# the number of tokens of each (int64) out.
Encode = Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray]]


def load_tokenizer(
    name: str,
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    report: Callable[[str], object] = lambda _: None,
) -> Any:
    """The tokenizer in folder `name`, or of that name on the Hub, as transformers loads it.

    What would make it encode at random is switched off; `report` is called with what that was.

    eos_token: what ends documents, where the tokenizer has none or another is wanted; added to the
    vocabulary if it is not in it. Raises ForgeError, also when nothing is known to end one with.
    """
    tokenizer = _from_pretrained(name, trust_remote_code=trust_remote_code)
    sampling = getattr(tokenizer, "sp_model_kwargs", None) or {}
    dropout = None if is_slow(tokenizer) else getattr(_model(tokenizer), "dropout", None)
    if dropout:
        _model(tokenizer).dropout = None
        report(_SWITCHED_OFF.format(name=name, what=f"BPE dropout {dropout}"))
    elif is_slow(tokenizer) and sampling.get("enable_sampling"):
        without = {"sp_model_kwargs": sampling | {"enable_sampling": False}}
        tokenizer = _from_pretrained(name, trust_remote_code=trust_remote_code, **without)
        report(_SWITCHED_OFF.format(name=name, what="enable_sampling of SentencePiece"))
    # transformers 5.23 would save how it was reached: offline, the same tokenizer has other bytes.
    for setting in HOW_IT_WAS_REACHED:
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


def _from_pretrained(name: str, **how: Any) -> Any:
    from transformers import AutoTokenizer

    collects = gc.isenabled()
    gc.disable()  # or the many strings of a vocabulary make it run over all imports
    try:
        return AutoTokenizer.from_pretrained(name, **how)
    except Exception as error:  # transformers raises what its parts raise: OSError, ValueError, ...
        if "trust_remote_code" in str(error) and not how.get("trust_remote_code"):
            raise ForgeError(
                f"--tokenizer {name} comes with its own Python code, which is not run unasked",
                f"{TRUST_CODE}, or give another tokenizer",
            ) from error
        raise ForgeError(
            f"--tokenizer {name} could not be loaded: {first_line(error)}",
            "give a folder that holds a tokenizer (as save_pretrained writes it) or a name of the "
            "Hub that this machine can reach or has downloaded before; or leave --tokenizer out to "
            "train one on the text",
        ) from error
    finally:
        if collects:
            gc.enable()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as `load_tokenizer` reads it, with the code that comes with it."""
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    settings = json.loads(path.read_text("utf-8"))
    own = settings.get("auto_map", {}).get("AutoTokenizer")
    if isinstance(own, str):
        # transformers 5.23 writes one class where no "Tokenizer" is in its name, but reads two.
        settings["auto_map"]["AutoTokenizer"] = [own, None]
        write_json(path, settings, durable=False)


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


def padding_of(tokenizer: Any) -> int:
    """The token that fills what is left of a block: its own for that, else EOS."""
    own = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if own is None else own)


def token_dtype(size: int) -> str:
    """The smallest type for a vocabulary of `size`. Raises ForgeError when four bytes are few."""
    if size > 2**32:
        found = f"the vocabulary has {size:,} entries, at most {2**32:,} fit into four bytes"
        raise ForgeError(found, "use another --tokenizer")
    return "uint16" if size <= 2**16 else "uint32"


def is_slow(tokenizer: Any) -> bool:
    """Whether it is written in Python, so that threads would take turns."""
    return getattr(tokenizer, "backend_tokenizer", None) is None


def _model(tokenizer: Any) -> Any:
    return tokenizer.backend_tokenizer.model


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides what the tokenizer answers, and of its end-of-text token."""
    rules = json.dumps(saved_files(tokenizer)) if is_slow(tokenizer) else rules_of(tokenizer)
    return hashlib.sha256(f"{rules}\0{tokenizer.eos_token}".encode()).hexdigest()


def saved_files(tokenizer: Any) -> list[tuple[str, str]]:
    """Name and sha256 of each file that the tokenizer saves, the same wherever it was loaded from.

    Its vocabulary, its settings, its Python code if that came with it. Raises ForgeError.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # anything: it may be code that came with the tokenizer
            raise ForgeError(
                f"the tokenizer cannot be saved ({type(error).__name__}: {first_line(error)}), and "
                "a prepared dataset holds its tokenizer",
                "correct the tokenizer's code, or use another --tokenizer",
            ) from error
        names = sorted(files_in(Path(folder)))
        files = [(name, Path(folder, name).read_bytes()) for name in names]
    return [(name, hashlib.sha256(_settled(name, content)).hexdigest()) for name, content in files]


def _settled(name: str, content: bytes) -> bytes:
    """A file that a tokenizer has saved, without what differs between machines."""
    if name != TOKENIZER_CONFIG:
        return content
    settings = json.loads(content)
    for volatile in (*HOW_IT_WAS_REACHED, *HOW_ITS_CODE_WAS_REACHED):
        settings.pop(volatile, None)
    return json.dumps(settings, sort_keys=True).encode()


def rules_of(tokenizer: Any) -> str:
    """The tokenizer as JSON (`tokenizer.json`), not truncating or padding, so nothing is lost."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def settings_of(rules: str) -> dict[str, Any]:
    """A tokenizer's JSON without its model's vocabulary, and without what follows after that.

    Parsing the vocabulary would take ten times as long as all the rest.
    """
    # As a key it stands there but once: within a string its quotes would have backslashes.
    settings: dict[str, Any] = json.loads(rules.partition(',"vocab":')[0] + "}}")
    return settings


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that no text may produce, by their spelling; the unknown token is not one.

    Nor is the one that the tokenizer's model makes of what it does not know, declared or not.
    """
    added = tokenizer.added_tokens_decoder
    control = {token.content: number for number, token in added.items() if token.special}
    control[tokenizer.eos_token] = tokenizer.eos_token_id
    for unknown in {tokenizer.unk_token, unknown_of_model(tokenizer)} - {tokenizer.eos_token}:
        control.pop(unknown, None)
    return control


def unknown_of_model(tokenizer: Any) -> str | None:
    """The token that the model of a tokenizer makes of what it does not know."""
    if is_slow(tokenizer):
        return None
    model = _model(tokenizer)
    if type(model).__name__ != "Unigram":
        unknown: str | None = model.unk_token
        return unknown
    number = settings_of(rules_of(tokenizer))["model"]["unk_id"]
    return None if number is None else str(tokenizer.convert_ids_to_tokens(number))


def reference_encoder(tokenizer: Any) -> Encode:
    """Encode by the tokenizer itself. The length of a document on which it fails is -1."""
    ask = (ask_python if is_slow(tokenizer) else ask_rust)(tokenizer)

    def encode_one(text: str) -> list[int] | None:
        try:
            return ask([text])[0]
        except Exception:  # anything: it may be code that came with the tokenizer
            return None

    def encode(documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        texts = [document.decode() for document in documents.to_pylist()]
        ids: list[Any]
        try:
            ids = ask(texts)
        except Exception:  # on one of them
            ids = [encode_one(text) for text in texts]
        return run_of(ids)

    return encode


def ask_rust(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The tokens of texts by a tokenizer that is not written in Python. It may raise Exception."""
    return ask_rules(rules_of(tokenizer))


def ask_rules(rules: str) -> Callable[[list[str]], list[list[int]]]:
    """The tokens of texts by the tokenizer of this JSON, in which control tokens are plain text.

    It raises Exception for a text of which it would leave something out.
    """
    from tokenizers import Tokenizer

    # Without an unknown token, a BPE model drops what it does not know. With one that it lacks, it
    # fails instead. The first key of that name is the model's: in a string it has backslashes.
    backend = Tokenizer.from_str(rules.replace('"unk_token":null', f'"unk_token":"{NONE}"', 1))
    backend.encode_special_tokens = True  # the spelling of a special token is plain text

    def ask(texts: list[str]) -> list[list[int]]:
        with panics_as_errors():
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in found]

    return ask


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError for a panic of a library in Rust, which PyO3 makes no Exception of."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise RuntimeError(f"its code in Rust failed: {error}") from error


def ask_python(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """The tokens of texts by a tokenizer written in Python, which may raise anything.

    transformers 5.23 can read the spellings of added tokens as text, but then of all: that is asked
    for only where a text holds that of a special one, so that the others are found in the rest.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    spelled = re.compile("|".join(map(re.escape, sorted(special))))

    def ask(text: str) -> list[int]:
        split = spelled.search(text) is not None
        asked = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
        tokens: list[int] = tokenizer(text, **asked)["input_ids"]
        return tokens

    return lambda texts: [ask(text) for text in texts]
