"""What a prepared dataset holds, in words, and whether its files are as they were written."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.conversations import in_words_of
from p2p_llm_forge.data.dataset import PREPARE_AGAIN, Manifest, PreparedDataset, open_prepared
from p2p_llm_forge.data.shares import share_lines, trained_lines
from p2p_llm_forge.data.splits import TRAIN, in_words
from p2p_llm_forge.errors import ForgeError, counted, plain, quoted
from p2p_llm_forge.files import sha256_of

END_MARK = "⏹"  # what stands for the end of a document in a decoded block
BEGIN_MARK, TRAINED_MARKS = "▶", "⟦⟧"  # of conversations
BAR = 40  # characters of the longest bar of a histogram
SHOWN_TOKENS = 40  # of a repeated document


class Documents(NamedTuple):
    """The documents of a split whose ends are in its blocks, in order, each by one number (uint64).

    begins: which token of the split is its first; lengths: in tokens, EOS not counted; hashes: of
    its tokens.
    """

    begins: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray


def describe(folder: Path, trust_remote_code: bool = False) -> str:
    """All that a dataset holds, for people: counts, shares, lengths, repetitions, a block."""
    data = open_prepared(folder)
    manifest = data.manifest
    tokenizer = data.load_tokenizer(trust_remote_code)
    lines = [
        f"{folder}: blocks of {manifest.sequence_length} tokens ({manifest.dtype}), "
        f"vocabulary {manifest.vocab_size:,}, fingerprint {manifest.fingerprint[:16]}"
    ]
    if of := manifest.conversations:
        lines.append(f"conversations, of which {in_words_of(of['train_on'])} is trained")
    lines += [_split_line(data, name) for name in manifest.splits]
    if manifest.skipped_rows:
        lines.append(f"bad rows left out: {manifest.skipped_rows:,}")
    if left_out := in_words(manifest.left_out):
        lines.append(f"left out: {left_out}")
    lines += [*trained_lines(manifest), *share_lines(manifest)]
    found = {name: documents_of(data, name) for name in manifest.splits}
    what = "conversations, or parts of cut ones," if manifest.conversations else "documents"
    for name, documents in found.items():
        lines += [f"lengths of {what} in {name}, in tokens:", *histogram(documents.lengths)]
    lines.append(_longest_repeated(data, found, tokenizer))
    lines += _block_lines(data, found[TRAIN], tokenizer)
    return plain("\n".join(lines), longest=10**6)


def documents_of(data: PreparedDataset, split: str) -> Documents:
    """Find the documents of a split by their ends, without more of it in memory than is looked at.

    One that a mixture has cut has no end, and counts with the next.
    """
    blocks = data.blocks(split)
    if blocks and blocks.is_of_conversations:
        return _conversations_of(blocks)
    found = [array("Q"), array("Q"), array("Q")]
    state, begin, before = xxhash.xxh3_64(), 0, 0
    for chunk in blocks.chunks if blocks else ():
        tokens = chunk.reshape(-1)
        start = 0
        for end in np.flatnonzero(tokens == data.manifest.eos_token_id).tolist():
            state.update(tokens[start:end].data)
            facts = begin, before + end - begin, state.intdigest()
            for column, value in zip(found, facts, strict=True):
                column.append(value)
            state.reset()
            start, begin = end + 1, before + end + 1
        state.update(tokens[start:].data)
        before += len(tokens)
    return Documents(*(np.array(column, np.uint64) for column in found))


def _conversations_of(blocks: Blocks) -> Documents:
    """The conversations of a split, each part of one that was cut by itself, without padding."""
    found = [array("Q"), array("Q"), array("Q")]
    for number in range(len(blocks)):
        (tokens,), (trained,) = blocks.tokens([number]), blocks.trained([number])
        begins = blocks.begins([number])
        assert begins is not None
        ends = np.append(np.flatnonzero(begins[0]), len(tokens))
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            if trained[start:end].any():  # else it is padding
                of = xxhash.xxh3_64(np.ascontiguousarray(tokens[start:end]).data).intdigest()
                facts = number * len(tokens) + start, end - start, of
                for column, value in zip(found, facts, strict=True):
                    column.append(int(value))
    return Documents(*(np.array(column, np.uint64) for column in found))


def histogram(lengths: np.ndarray) -> list[str]:
    """How many documents are how long, for people: a line for every power of two."""
    if not len(lengths):
        return ["  none has its end in a block"]
    # frexp gives the number of binary digits: 0 of 0, 1 of 1, 2 of 2 and 3, 3 of 4 to 7.
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    lines = []
    for digits in range(int(np.flatnonzero(counts)[0]), len(counts)):
        least, most = (1 << digits) >> 1, max(0, (1 << digits) - 1)
        part = counts[digits] / len(lengths)
        bar = "#" * round(BAR * counts[digits] / counts.max())
        lines.append(
            f"{least:>12,} to {most:<12,} {counts[digits]:>12,} {part:>7.2%} {bar}".rstrip()
        )
    return lines


def _longest_repeated(data: PreparedDataset, found: dict[str, Documents], tokenizer: Any) -> str:
    """The longest document that is there more than once, in any split, for people."""
    begins, lengths, hashes = (np.concatenate(of) for of in zip(*found.values(), strict=True))
    order = np.lexsort((hashes, lengths))[::-1]
    is_next_same = (np.diff(lengths[order]) == 0) & (np.diff(hashes[order]) == 0)
    if not is_next_same.any():
        return "no document is there twice"
    first = order[is_next_same.argmax()]
    is_same = (hashes == hashes[first]) & (lengths == lengths[first])
    ends = np.cumsum([len(documents.lengths) for documents in found.values()])
    times = [int(of.sum()) for of in np.split(is_same, ends[:-1])]
    split = list(found)[int(np.searchsorted(ends, first, side="right"))]
    tokens = _tokens_at(data, split, int(begins[first]), min(int(lengths[first]), SHOWN_TOKENS))
    where = ", ".join(f"{count:,} in {name}" for name, count in zip(found, times, strict=True))
    return (
        f"longest repeated document: {lengths[first]:,} tokens, {sum(times):,} times ({where}), "
        f"begins {quoted(tokenizer.decode(tokens), 200)}"
    )


def _tokens_at(data: PreparedDataset, split: str, begin: int, count: int) -> np.ndarray:
    blocks, length = data.blocks(split), data.manifest.sequence_length
    assert blocks is not None
    first, last = begin // length, (begin + max(1, count) - 1) // length
    tokens = blocks.tokens(range(first, last + 1)).reshape(-1)
    return tokens[begin - first * length :][:count]


def _split_line(data: PreparedDataset, name: str) -> str:
    facts = data.manifest.splits[name]
    used = vocabulary_use(data, name)
    size = sum(path.stat().st_size for path in (data.path / name).glob("*.arrow"))
    text_size, disk_size = facts.bytes / max(1, facts.trained), size / max(1, facts.tokens)
    sizes = f"{text_size:.2f} bytes of text and {disk_size:.3f} bytes of disk per token"
    if facts.trained_tokens is not None:
        sizes = f"{text_size:.2f} bytes of text per trained one, {disk_size:.3f} of disk per token"
    return (
        f"{name}: {counted(facts.documents, 'document')}, {counted(facts.blocks, 'block')}, "
        f"{counted(facts.tokens, 'token')} ({sizes}), "
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


def _block_lines(data: PreparedDataset, documents: Documents, tokenizer: Any) -> list[str]:
    """A block, for people: the first in which a document ends, or one of conversations."""
    blocks = data.train_blocks()
    if blocks.is_of_conversations:
        what = f"{BEGIN_MARK} begins a conversation, what stands in {TRAINED_MARKS} is trained"
        return [f"block 0 of {TRAIN} ({what}):", _trained_text(blocks, tokenizer)]
    first_end = int(documents.lengths[0]) if len(documents.lengths) else 0
    block = first_end // data.manifest.sequence_length
    which = f"block {block} of {TRAIN}, the first with an end" if block else f"block 0 of {TRAIN}"
    return [f"{which} ({END_MARK} ends a document):", _block_text(data, tokenizer, block)]


def _block_text(data: PreparedDataset, tokenizer: Any, block: int) -> str:
    end = data.manifest.eos_token_id
    tokens = data.train_blocks().tokens([block])[0]
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    texts = (tokenizer.decode(document[document != end]) for document in documents)
    return f"{END_MARK}\n".join(texts)


def _trained_text(blocks: Blocks, tokenizer: Any) -> str:
    """The first block with signs where a conversation begins and around what is trained."""
    (tokens,), (trained,), begins = blocks.tokens([0]), blocks.trained([0]), blocks.begins([0])
    assert begins is not None
    changes = np.flatnonzero((np.diff(trained, prepend=False)) | begins[0])
    text = ""
    for start, end in zip(changes, np.append(changes, len(tokens))[1:], strict=True):
        part = tokenizer.decode(tokens[start:end])
        is_padding = begins[0, start] and not trained[start:].any()
        if is_padding:
            return f"{text}\n({counted(len(tokens) - start, 'token')} of padding)"
        text += f"\n{BEGIN_MARK}" if begins[0, start] else ""
        text += f"{TRAINED_MARKS[0]}{part}{TRAINED_MARKS[1]}" if trained[start] else part
    return text.removeprefix("\n")


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
