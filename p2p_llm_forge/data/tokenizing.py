"""The work on the pieces: which are to be done by which rank, and doing them on several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from p2p_llm_forge.data import readers, splits
from p2p_llm_forge.data.conversation_encoder import PIECES_DTYPE, ConversationEncoder
from p2p_llm_forge.data.dataset import Manifest
from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.parts import Piece
from p2p_llm_forge.data.pieces import PieceId, Pieces, Record, digest, digest_of
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.data.splits import ConversationOptions, EncodeOptions
from p2p_llm_forge.data.unfinished import PIECES, Ranks

Item = TypeVar("Item")
Result = TypeVar("Result")


class Job:
    """Tokenizes any piece of a preparation; the same on every rank. manifest: not yet counted.

    conversations: what encodes them; None: documents are texts.
    """

    def __init__(
        self,
        preparation: Preparation,
        manifest: Manifest,
        encoders: Encoders,
        conversations: ConversationEncoder | None = None,
    ) -> None:
        self.preparation = preparation
        long, longest = preparation.config.long_conversations, manifest.sequence_length
        self.encode_text = encoders.encode_few
        self.give_up = encoders.close  # makes pieces that are being encoded fail soon
        self._options = EncodeOptions(
            encode=encoders.encode,
            eos_token_id=manifest.eos_token_id,
            dtype=manifest.dtype,
            validation_fraction=preparation.validation_fraction,
            seed=preparation.config.seed,
            min_document_tokens=preparation.config.min_document_tokens,
            max_document_tokens=preparation.config.max_document_tokens,
            deduplicate=preparation.config.deduplicate,
            conversations=ConversationOptions(conversations.encode, longest, long)
            if conversations
            else None,
        )
        decides = asdict(preparation.read_options) | vars(self._options)
        decides |= {"encode": encoders.is_fast, "tokenizer": manifest.tokenizer_fingerprint}
        decides["conversations"] = manifest.conversations and [manifest.conversations, longest]
        folder, parts = preparation.folder / PIECES, preparation.parts
        dtype = PIECES_DTYPE if conversations else manifest.dtype
        self.pieces = Pieces(folder, parts, decides, dtype)

    def encode(self, task: tuple[PieceId, Piece | None]) -> tuple[int, np.ndarray]:
        """Tokenize and keep a piece, read already or not: the bytes of its file, its tokens."""
        piece_id, piece = task
        part = self.preparation.parts[piece_id.part]
        piece = piece or next(readers.read_pieces(part, self.preparation.read_options))
        encoded = splits.encode_piece(
            piece_id.number, piece.column, part.is_validation, self._options
        )
        record = Record(
            splits=encoded.splits,
            left_out=encoded.left_out,
            digest=digest_of(piece.column),
            checksum=digest(encoded.tokens),
            documents_checksum=digest(encoded.documents),
            skipped=piece.skipped,
            is_last=piece.is_last,
        )
        if (
            part.kind == "hub" and not self._options.conversations
        ):  # else its text would be downloaded again where a block cuts it
            self.pieces.keep_text(piece_id, piece.column)
        self.pieces.write(piece_id, encoded.tokens, encoded.documents, record)
        return piece.source_bytes, encoded.tokens


def tokenize(job: Job, ranks: Ranks, after_each: Callable[[], object] = lambda: None) -> None:
    """Tokenize the pieces of this rank that are not done yet; a progress bar goes along.

    after_each: called after each, while workers are busy with the next ones.
    """
    total = sum(part.bytes for part in job.preparation.parts) // ranks.world_size or None
    todo, workers = pieces_to_do(job, ranks), job.preparation.config.workers()
    tokens = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for source_bytes, of_piece in in_order(job.encode, todo, workers, job.give_up):
            tokens += len(of_piece)
            bar.set_postfix_str(f"{tokens / 1e6:.1f} Mtoken", refresh=False)
            bar.update(source_bytes)
            after_each()


def pieces_to_do(job: Job, ranks: Ranks) -> Iterator[tuple[PieceId, Piece | None]]:
    """The pieces of this rank that are not done, in order; None: the worker reads its documents.

    Parts are divided among the ranks; where there are few, every rank reads all and takes every
    `world_size`th piece.
    """
    parts, world_size = job.preparation.parts, ranks.world_size
    divide_parts = len(parts) >= 4 * world_size
    for number, part in enumerate(parts):
        mine = number % world_size == ranks.rank
        if ((divide_parts or part.is_one_piece) and not mine) or job.pieces.has_all_of(number):
            continue
        if part.is_one_piece:
            yield PieceId(number, 0), None
            continue
        for place, piece in enumerate(readers.read_pieces(part, job.preparation.read_options)):
            piece_id = PieceId(number, place)
            is_mine = divide_parts or (number + place) % world_size == ranks.rank
            if is_mine and not job.pieces.record(piece_id):
                yield piece_id, piece


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    give_up: Callable[[], None],
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
