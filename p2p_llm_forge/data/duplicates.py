"""Which documents are left out because an earlier one is the same, or resembles them.

Earlier is meant in the order of the text, but what is held out goes before all to train on: what is
evaluated on is never trained on.

Near duplicates are found by locality-sensitive hashing (Indyk and Motwani, 1998): of the 128 values
of a sketch, 8 are a band, and documents are compared if a band of theirs is the same. They resemble
each other if 0.8 of the values agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import numpy as np

from p2p_llm_forge.data.pieces import PieceId, Pieces, Record
from p2p_llm_forge.data.splits import (
    HELD_OUT_TOO,
    REPEATED,
    ROW,
    TRAIN,
    VALIDATION,
    SplitCounts,
)

SPLITS = (TRAIN, VALIDATION)
SIMILARITY = 0.8  # of near duplicates: the share of their runs of words that both have
COMPARED_WITH = 16  # documents at most, of those with one band: some families of pages are endless
COMPARED_AT_A_TIME = 1 << 14
BUCKETS = 16  # keys are sorted in so many parts, so that sorting takes little memory


class Verdict(IntEnum):
    """What becomes of a document."""

    KEPT = 0
    REPEATED = 1  # an earlier one of its split is the same
    HELD_OUT_TOO = 2  # is to be trained on, and the same is held out


def chosen(
    done: list[tuple[PieceId, Record]], pieces: Pieces, work: Path
) -> Iterator[tuple[Record, np.ndarray]]:
    """For each piece the record of what is kept of it, and which of its documents that is (bool).

    work: a new file, removed again, for all keys; in memory are about 24 bytes a document. Raises
    OSError.
    """
    counts = [[record.splits[split].documents for split in SPLITS] for _, record in done]
    held_out = sum(of_validation for _, of_validation in counts)
    rows = list(_rows_of_pieces(counts, held_out))
    with work.open("xb") as file:
        columns = 0
        for (piece, _), of_splits in zip(done, rows, strict=True):
            of_piece = pieces.documents(piece)[:, ROW + 1 :]
            columns = max(columns, of_piece.shape[1])
            for where, own in zip(of_splits, _places(of_splits), strict=True):
                file.seek(where.start * columns * 8)
                file.write(of_piece[own].tobytes())
    is_empty = not work.stat().st_size
    keys = np.empty((0, 2), np.uint64) if is_empty else np.memmap(work, "<u8", "r")
    found = verdicts(keys.reshape(-1, columns or 2), held_out)
    del keys
    work.unlink()
    for (piece, record), of_splits in zip(done, rows, strict=True):
        of_piece = np.concatenate([found[where] for where in of_splits])
        yield _record_of(record, of_piece, pieces.documents(piece)), of_piece == Verdict.KEPT


def _rows_of_pieces(counts: list[list[int]], held_out: int) -> Iterator[list[slice]]:
    """Where the documents of each piece stand among all: those held out come first."""
    begins = [held_out, 0]  # of train, of validation
    for of_piece in counts:
        yield [slice(at, at + count) for at, count in zip(begins, of_piece, strict=True)]
        begins = [at + count for at, count in zip(begins, of_piece, strict=True)]


def _places(of_splits: list[slice]) -> list[slice]:
    """Where the documents of each split stand in their piece."""
    train, held_out = (where.stop - where.start for where in of_splits)
    return [slice(0, train), slice(train, train + held_out)]


def _record_of(record: Record, found: np.ndarray, documents: np.ndarray) -> Record:
    """The record of a piece without its duplicates, which it counts as left out."""
    tokens, sizes = documents[:, 0], documents[:, 1]

    def counts(which: np.ndarray) -> SplitCounts:
        return SplitCounts(int(which.sum()), int(sizes[which].sum()), int(tokens[which].sum()))

    is_kept = found == Verdict.KEPT
    is_train = np.arange(len(found)) < record.splits[TRAIN].documents
    return replace(
        record,
        splits={TRAIN: counts(is_kept & is_train), VALIDATION: counts(is_kept & ~is_train)},
        left_out=record.left_out
        | {
            REPEATED: counts(found == Verdict.REPEATED),
            HELD_OUT_TOO: counts(found == Verdict.HELD_OUT_TOO),
        },
    )


def tokens_kept(
    tokens: dict[str, np.ndarray], lengths: np.ndarray, is_kept: np.ndarray
) -> dict[str, np.ndarray]:
    """The tokens of the documents that are kept. lengths: of each document, EOS included."""
    is_kept_token = np.repeat(is_kept, lengths.astype(np.int64))
    train = len(tokens[TRAIN])
    return {
        TRAIN: tokens[TRAIN][is_kept_token[:train]],
        VALIDATION: tokens[VALIDATION][is_kept_token[train:]],
    }


def verdicts(keys: np.ndarray, held_out: int) -> np.ndarray:
    """The verdict on each document (uint8).

    keys: of all documents (documents x columns, uint64), those `held_out` first, each in the order
    of the text; 2 columns are a hash, more are a sketch. Takes about 24 bytes a document.
    """
    found = np.full(len(keys), Verdict.KEPT, np.uint8)
    is_sketch = keys.shape[1] > 2
    for band in range(0, keys.shape[1], 2):
        for rows, firsts in groups(np.ascontiguousarray(keys[:, band : band + 2])):
            pairs = resembling(keys, rows, firsts) if is_sketch else [(rows, firsts)]
            for later, earlier in pairs:
                is_other = later != earlier
                is_leak = (earlier < held_out) & (later >= held_out)
                verdict = np.where(is_leak, Verdict.HELD_OUT_TOO, Verdict.REPEATED)[is_other]
                later = later[is_other]
                found[later] = np.maximum(found[later], verdict)
    return found


def resembling(
    sketches: np.ndarray, rows: np.ndarray, firsts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents of groups, and for each an earlier one of its group that resembles it.

    rows: grouped, in order within each group; firsts: the first of each one's group. Each is
    compared with the first; those that differ from it, with the first of those; and so on.
    """
    for _ in range(COMPARED_WITH):
        rows, firsts = rows[rows != firsts], firsts[rows != firsts]
        if not len(rows):
            return
        alike = similarity(sketches, rows, firsts) >= SIMILARITY
        yield rows[alike], firsts[alike]
        rows, firsts = rows[~alike], firsts[~alike]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = firsts[1:] != firsts[:-1]
        firsts = rows[is_new][np.cumsum(is_new) - 1]


def similarity(sketches: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of values that the sketches of two documents have in common, for pairs of them."""
    values = sketches.view("<u2")
    found = np.empty(len(rows))
    for start in range(0, len(rows), COMPARED_AT_A_TIME):
        some = slice(start, start + COMPARED_AT_A_TIME)
        found[some] = (values[rows[some]] == values[others[some]]).mean(axis=1)
    return found


def groups(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows at a time, and for each the first row that has its key."""
    bucket_of = keys.view(np.uint8).reshape(len(keys), 16)[:, 0] % BUCKETS
    for bucket in range(BUCKETS):
        rows = np.flatnonzero(bucket_of == bucket)
        order = np.lexsort((keys[rows, 1], keys[rows, 0]))  # stable: equal keys stay in order
        rows = rows[order]
        of_rows = keys[rows]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (of_rows[1:] != of_rows[:-1]).any(axis=1)
        yield rows, rows[is_new][np.cumsum(is_new) - 1]
