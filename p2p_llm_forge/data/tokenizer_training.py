"""A tokenizer trained on the text itself, on just the documents that are not held out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from p2p_llm_forge.data import readers
from p2p_llm_forge.data.pieces import PieceId
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.data.splits import held_out
from p2p_llm_forge.data.tokenizer import load_tokenizer, train_tokenizer
from p2p_llm_forge.data.unfinished import TRAINED_TOKENIZER
from p2p_llm_forge.files import fingerprint

# A tokenizer is trained on about so much of a larger text, chosen by a hash: more changes little.
TRAINING_BYTES = 256 << 20


def trained_tokenizer(preparation: Preparation) -> Any:
    """The tokenizer of this text; kept in the unfinished folder, so that it is trained once."""
    folder, vocab_size = tokenizer_folder(preparation), preparation.config.vocab_size
    if not folder.exists():
        print(f"training a tokenizer of {vocab_size} entries")
        partial = folder.with_name("tmp-tokenizer")
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(training_text(preparation), vocab_size).save_pretrained(partial)
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
    bytes_left = 2 * TRAINING_BYTES  # the size of compressed text is a guess

    def is_chosen(piece: PieceId) -> bool:
        return fraction == 1 or bool(held_out(piece.number, 1, fraction, seed + 1)[0])

    for number, part in enumerate(parts):
        if part.is_validation or (part.is_one_piece and not is_chosen(PieceId(number, 0))):
            continue
        for place, piece in enumerate(readers.read_pieces(part, preparation.read_options)):
            piece_id, documents = PieceId(number, place), piece.column
            if bytes_left < 0 or not is_chosen(piece_id):
                continue
            fraction_hidden = preparation.validation_fraction
            hidden = held_out(piece_id.number, len(documents), fraction_hidden, seed)
            for document in documents.filter(pa.array(~hidden)):
                text = document.as_py().decode()
                bytes_left -= len(text)
                yield text
