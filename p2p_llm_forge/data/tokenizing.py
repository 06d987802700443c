"""The work on the pieces: which are to be done by which rank, and doing them on several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from p2p_llm_forge.data import readers, splits
from p2p_llm_forge.data.parts import Part, Piece, ReadOptions
from p2p_llm_forge.data.pieces import PieceId, Pieces, Record, digest, digest_of
from p2p_llm_forge.data.ranks import Ranks
from p2p_llm_forge.data.splits import EncodeOptions

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Job:
    """What is needed to tokenize any piece; the same on every rank."""

    parts: list[Part]
    read_options: ReadOptions
    encode_options: EncodeOptions
    pieces: Pieces
    workers: int
    give_up: Callable[[], None]  # makes pieces that are being encoded fail soon

    def encode(self, task: tuple[PieceId, Piece | None]) -> tuple[int, np.ndarray]:
        """Tokenize and keep a piece, read already or not.

        Returns the bytes of its file, and its tokens.
        """
        piece_id, piece = task
        part = piece_id.part
        piece = piece or next(readers.read_pieces(part, self.read_options))
        tokens, counts = splits.encode_piece(
            piece_id.number, piece.column, part.is_validation, self.encode_options
        )
        record = Record(
            splits=counts,
            digest=digest_of(piece.column),
            checksum=digest(tokens),
            skipped=piece.skipped,
            is_last=piece.is_last,
        )
        self.pieces.write(piece_id, tokens, record)
        return piece.source_bytes, tokens


def tokenize(job: Job, ranks: Ranks, after_each: Callable[[], object] = lambda: None) -> None:
    """Tokenize the pieces of this rank that are not done yet; a progress bar goes along.

    after_each: called after each, while workers are busy with the next ones.
    """
    from tqdm import tqdm

    total = sum(part.bytes for part in job.parts) // ranks.world_size
    tokens = 0
    with tqdm(
        total=total or None, unit="B", unit_scale=True, desc="tokenizing", disable=None
    ) as bar:
        for source_bytes, of_piece in in_order(
            job.encode, pieces_to_do(job, ranks), job.workers, job.give_up
        ):
            tokens += len(of_piece)
            bar.set_postfix_str(f"{tokens / 1e6:.1f} Mtoken", refresh=False)
            bar.update(source_bytes)
            after_each()


def pieces_to_do(job: Job, ranks: Ranks) -> Iterator[tuple[PieceId, Piece | None]]:
    """The pieces of this rank that are not done, in order; None: the worker reads its documents.

    Parts are divided among the ranks; where there are few, every rank reads all and takes every
    `world_size`th piece.
    """
    divide_parts = len(job.parts) >= 4 * ranks.world_size
    for number, part in enumerate(job.parts):
        mine = number % ranks.world_size == ranks.rank
        if ((divide_parts or part.is_one_piece) and not mine) or job.pieces.has_all_of(
            number, part
        ):
            continue
        if part.is_one_piece:
            yield PieceId(number, part, 0), None
            continue
        for place, piece in enumerate(readers.read_pieces(part, job.read_options)):
            is_mine = divide_parts or (number + place) % ranks.world_size == ranks.rank
            piece_id = PieceId(number, part, place)
            if is_mine and not job.pieces.record(piece_id):
                yield piece_id, piece


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    give_up: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`work` of every item by `workers` threads; results in the items' order, few in waiting.

    give_up: called before the threads are waited for when something fails or interrupts.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        give_up()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
