"""What a prepared dataset holds, in words, and whether its files are as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from p2p_llm_forge.data.dataset import PREPARE_AGAIN, Manifest, PreparedDataset, open_prepared
from p2p_llm_forge.data.splits import TRAIN, in_words
from p2p_llm_forge.errors import ForgeError, plain
from p2p_llm_forge.files import sha256_of

END_MARK = "⏹"  # what stands for the end of a document in a decoded block


def describe(folder: Path) -> str:
    """Documents, blocks, tokens, bytes per token, vocabulary use, and the first block as text."""
    data = open_prepared(folder)
    manifest = data.manifest
    tokenizer = data.load_tokenizer()
    lines = [
        f"{folder}: blocks of {manifest.sequence_length} tokens ({manifest.dtype}), "
        f"vocabulary {manifest.vocab_size:,}, fingerprint {manifest.fingerprint[:16]}"
    ]
    lines += [_split_line(data, name) for name in manifest.splits]
    if manifest.skipped_rows:
        lines.append(f"bad rows left out: {manifest.skipped_rows:,}")
    if manifest.left_out:
        lines.append(f"left out: {in_words(manifest.left_out)}")
    lines += [f"first block of {TRAIN} ({END_MARK} ends a document):", _block_text(data, tokenizer)]
    return plain("\n".join(lines), longest=10**6)


def _split_line(data: PreparedDataset, name: str) -> str:
    facts = data.manifest.splits[name]
    used = vocabulary_use(data, name)
    size = sum(path.stat().st_size for path in (data.path / name).glob("*.arrow"))
    return (
        f"{name}: {facts.documents:,} documents, {facts.blocks:,} blocks, {facts.tokens:,} tokens "
        f"({facts.bytes / max(1, facts.tokens):.2f} bytes of text and "
        f"{size / max(1, facts.tokens):.3f} bytes of disk per token), "
        f"{used:,} entries of the vocabulary used ({100 * used / data.manifest.vocab_size:.1f} %)"
    )


def vocabulary_use(data: PreparedDataset, split: str) -> int:
    """How many different tokens the blocks of a split hold."""
    blocks = data.blocks(split)
    counts = np.zeros(data.manifest.vocab_size, np.int64)
    for chunk in blocks.chunks if blocks else ():
        if chunk.max() >= len(counts):
            raise ForgeError(
                f"{data.path / split} is damaged: it holds the token {chunk.max()}, the vocabulary "
                f"has {len(counts)}",
                PREPARE_AGAIN,
            )
        counts += np.bincount(chunk.ravel(), minlength=len(counts))
    return int(np.count_nonzero(counts))


def _block_text(data: PreparedDataset, tokenizer: Any) -> str:
    end = data.manifest.eos_token_id
    tokens = data.train_blocks().inputs_and_targets([0])[1][0]
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    texts = (tokenizer.decode(document[document != end]) for document in documents)
    return f"{END_MARK}\n".join(texts)


def verify(folder: Path) -> int:
    """Read every file of a prepared dataset. Returns how many there are.

    Raises ForgeError that names all files which are missing or not as they were written.
    """
    manifest = Manifest.load(folder)
    wrong = []
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}")
        elif sha256_of(path) != facts["sha256"]:
            wrong.append(f"{name} has another checksum")
    if wrong:
        raise ForgeError(f"{folder} is damaged: {'; '.join(wrong)}", PREPARE_AGAIN)
    return len(manifest.files)
