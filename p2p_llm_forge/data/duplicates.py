"""Which documents are left out because the dataset holds them already.

Of documents with one key the first is kept, in the order of the text. But one that is held out
goes before all to train on: what is evaluated on is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import IntEnum

import numpy as np

from p2p_llm_forge.data.pieces import PieceId, Pieces, Record
from p2p_llm_forge.data.splits import HELD_OUT_TOO, REPEATED, TRAIN, VALIDATION, SplitCounts

SPLITS = (TRAIN, VALIDATION)
BUCKETS = 16  # keys are sorted in so many parts, so that sorting takes little memory


class Verdict(IntEnum):
    """What becomes of a document."""

    KEPT = 0
    REPEATED = 1  # an earlier one of its split is the same
    HELD_OUT_TOO = 2  # is to be trained on, and the same is held out


def chosen(
    done: list[tuple[PieceId, Record]], pieces: Pieces
) -> Iterator[tuple[Record, np.ndarray]]:
    """For each piece the record of what is kept of it, and which of its documents that is (bool).

    Takes about 24 bytes of memory for each document.
    """
    counts = [[record.splits[split].documents for split in SPLITS] for _, record in done]
    held_out = sum(of_validation for _, of_validation in counts)
    keys = np.empty((sum(map(sum, counts)), 2), np.uint64)
    rows = list(_rows_of_pieces(counts, held_out))
    for (piece, _), of_splits in zip(done, rows, strict=True):
        of_piece = pieces.documents(piece)[:, 2:]
        for where, own in zip(of_splits, _places(of_splits), strict=True):
            keys[where] = of_piece[own]
    found = verdicts(keys, held_out)
    del keys
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

    keys: of all documents (documents x 2, uint64), those `held_out` first, each in the order of the
    text. Beside the keys this takes about 7 bytes a document.
    """
    found = np.full(len(keys), Verdict.KEPT, np.uint8)
    for rows, firsts in groups(keys):
        is_first = rows == firsts
        is_leak = (firsts < held_out) & (rows >= held_out)
        found[rows[~is_first]] = Verdict.REPEATED
        found[rows[is_leak]] = Verdict.HELD_OUT_TOO
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
