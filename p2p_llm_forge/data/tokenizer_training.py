"""A tokenizer trained on the text itself, on just the documents that are not held out."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from p2p_llm_forge.data import readers
from p2p_llm_forge.data.conversations import texts_of
from p2p_llm_forge.data.pieces import PieceId
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.data.splits import held_out
from p2p_llm_forge.data.tokenizer import load_tokenizer, train_tokenizer
from p2p_llm_forge.data.unfinished import TRAINED_TOKENIZER
from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.memory import return_memory

# A tokenizer is trained on about so much of a larger text, chosen by a hash: more changes little.
TRAINING_BYTES = 256 << 20
# A trainer keeps every different word in memory, with some 90 bytes for each of its own.
MOST_BYTES_OF_WORDS = 3 << 20
WORDS = re.compile(r"[^\W\d_]+|\d+|[^\s\w]+|_+")  # nearly as a trainer divides a text
MOST_STRINGS = 300_000
CHARACTERS_AT_A_TIME = 64 << 10  # a trainer is given so long texts at most


def trained_tokenizer(preparation: Preparation) -> Any:
    """The tokenizer of this text; kept in the unfinished folder, so that it is trained once."""
    folder, vocab_size = tokenizer_folder(preparation), preparation.config.vocab_size
    if not folder.exists():
        print(f"training a tokenizer of {vocab_size} entries")
        partial = folder.with_name("tmp-tokenizer")
        shutil.rmtree(partial, ignore_errors=True)
        text = within_memory(training_text(preparation))
        train_tokenizer(text, vocab_size).save_pretrained(partial)
        return_memory()
        partial.rename(folder)
    return load_tokenizer(str(folder))


def tokenizer_folder(preparation: Preparation) -> Path:
    """Where a trained tokenizer is kept until the dataset is finished: named after its input."""
    config = preparation.config
    decides = [
        *map(asdict, preparation.parts),
        asdict(preparation.read_options),
        [config.vocab_size, config.seed, preparation.validation_fraction],
    ]
    return preparation.folder / f"{TRAINED_TOKENIZER}{fingerprint(decides)[:20]}"


def training_text(preparation: Preparation) -> Iterator[str]:
    """The documents that are not held out: of all pieces, or of some where the text is large."""
    parts, seed = preparation.parts, preparation.config.seed
    total = sum(part.bytes for part in parts if not part.is_validation)
    fraction = min(1.0, TRAINING_BYTES / max(1, total))
    text_of = texts_of if preparation.read_options.train_on else bytes.decode
    bytes_left = 2 * TRAINING_BYTES  # the size of compressed text is a guess

    def is_chosen(piece: PieceId) -> bool:
        return fraction == 1 or bool(held_out(piece.number, 1, fraction, seed + 1)[0])

    # In any order, for the first ones may be all that memory allows.
    for number in random.Random(seed).sample(range(len(parts)), len(parts)):
        part = parts[number]
        if part.is_validation or (part.is_one_piece and not is_chosen(PieceId(number, 0))):
            continue
        for place, piece in enumerate(readers.read_pieces(part, preparation.read_options)):
            piece_id, documents = PieceId(number, place), piece.column
            if bytes_left < 0 or not is_chosen(piece_id):
                continue
            fraction_hidden = preparation.validation_fraction
            hidden = held_out(piece_id.number, len(documents), fraction_hidden, seed)
            for document in documents.filter(pa.array(~hidden)):
                text = text_of(document.as_py())
                bytes_left -= len(text)
                yield text


def within_memory(documents: Iterable[str]) -> Iterator[str]:
    """The documents in pieces, up to the one in which all different words become too many."""
    strings: set[str] = set()  # between spaces: most are known, and need not be divided again
    words: set[str] = set()
    bytes_left = MOST_BYTES_OF_WORDS
    for document in documents:
        for start in range(0, len(document), CHARACTERS_AT_A_TIME):
            text = document[start : start + CHARACTERS_AT_A_TIME]
            yield text
            new_strings = set(text.split()) - strings
            new_words = set(WORDS.findall(" ".join(new_strings))) - words
            bytes_left -= len(" ".join(new_words).encode())
            if bytes_left < 0:
                print("the text has more different words than a tokenizer is trained on")
                return
            if len(strings) > MOST_STRINGS:
                strings.clear()
            strings |= new_strings
            words |= new_words
