"""Turn text into a prepared dataset: tokens in blocks of fixed length, ready for train.py.

python prepare_data.py --dataset-path corpus.txt --output-dir data/prepared/mine
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from p2p_llm_forge import config as configuration
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import dataset as corpus
from p2p_llm_forge.data import packing, readers, sources
from p2p_llm_forge.data import pieces as unfinished
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.dataset import TRAIN, VALIDATION, Manifest, SplitFacts
from p2p_llm_forge.data.parts import Part, Piece, ReadOptions
from p2p_llm_forge.data.pieces import PIECES_OF_A_PART, Pieces, Ranks
from p2p_llm_forge.data.sources import Found
from p2p_llm_forge.errors import ForgeError, run_script
from p2p_llm_forge.peers.launch import local_rank

if TYPE_CHECKING:
    import numpy as np

# A tokenizer is trained on about so much of a larger corpus, chosen by a hash: more changes little.
TOKENIZER_TEXT_BYTES = 256 << 20
POLL_S = 0.2
MAIN_STARTS_WITHIN_S = 300.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def main(argv: list[str] | None = None) -> int:
    """Prepare, or describe, what the command line asks for."""
    config = configuration.parse(
        PrepareConfig, sys.argv[1:] if argv is None else argv, "prepare_data.py"
    )
    if config.describe:
        from p2p_llm_forge.data import describe as inspection

        files = inspection.verify(Path(config.describe)) if config.verify else 0
        print(inspection.describe(Path(config.describe)))
        if files:
            print(f"all {files} files are as they were written")
        return 0
    prepare(config, unfinished.ranks_of_launch())
    return 0


def prepare(config: PrepareConfig, ranks: Ranks = Ranks()) -> Manifest:  # noqa: B008
    """Tokenize and pack the text into `config.output_dir`, unless it holds that dataset already.

    A run that was killed is gone on with. With several ranks, each tokenizes its share and the main
    one writes the dataset; all call this. Returns the dataset's manifest. Raises ForgeError when
    the text, the tokenizer or the folder does not allow it; a dataset in the folder is then as it
    was.
    """
    config.problems().raise_any()
    found = find_text(config)
    output_dir = Path(config.output_dir)
    tokenizer = _load_tokenizer(config)
    prepared = already_prepared(config, output_dir, found, tokenizer)
    if prepared:
        if ranks.is_main:
            unfinished.remove_leftovers(output_dir)
            print(f"{output_dir} is already prepared: {_summary(prepared)}")
        return prepared
    if not ranks.is_main:
        return help_main(config, found, tokenizer, ranks)
    with unfinished.claim(output_dir, ranks) as folder, resumable(config, found, folder):
        if tokenizer is None:
            tokenizer = trained_tokenizer(config, found, folder)
        manifest = build(config, found, tokenizer, folder, ranks)
        corpus.publish(folder / "dataset", output_dir)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"prepared {output_dir}: {_summary(manifest)}")
    return manifest


# --- before any work: what is asked, what is there ------------------------------------------------


def find_text(config: PrepareConfig) -> Found:
    """The parts of the text, in the order given. Raises ForgeError for what is no text."""
    reading = ReadOptions.of(config)
    found = sources.find(config.dataset_path, reading)
    if not found.parts:
        raise ForgeError(
            f"{', '.join(config.dataset_path)}: the file is empty, there is no text to prepare"
        )
    if config.validation_path:
        held_out = sources.find(config.validation_path, reading, validation=True)
        found = dataclasses.replace(
            found,
            parts=found.parts + held_out.parts,
            unreadable=found.unreadable + held_out.unreadable,
        )
    if found.unreadable:
        print(f"{found.unreadable} files cannot be read and are left out (--skip-bad-rows)")
    return found


def already_prepared(
    config: PrepareConfig, output_dir: Path, found: Found, tokenizer: Any
) -> Manifest | None:
    """The manifest of the dataset in `output_dir`, if it is what would be made now.

    None means that the dataset may be made there: the folder is new or empty, holds what a
    preparation left unfinished, or `config.overwrite` allows to replace the dataset in it.
    Raises ForgeError when the folder holds anything else.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ForgeError(f"--output-dir {output_dir} is a file: give another folder")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return None
    if not (output_dir / corpus.MANIFEST).exists():
        if (output_dir / corpus.UNFINISHED).exists():
            return None
        raise ForgeError(
            f"--output-dir {output_dir} is not empty and holds no prepared dataset: give another"
        )
    if config.overwrite:
        return None
    there = Manifest.load(output_dir)
    differences = _differences(there, config, found, tokenizer)
    if differences:
        raise ForgeError(
            f"--output-dir {output_dir} holds another dataset ({'; '.join(differences)}): "
            "give a new folder, or --overwrite to replace it"
        )
    return there


def _differences(there: Manifest, config: PrepareConfig, found: Found, tokenizer: Any) -> list[str]:
    """In what a dataset differs from the one that is asked for, in words."""
    asked = _arguments(config)
    told = [
        f"{name}: {there.arguments.get(name)!r} there, {asked[name]!r} asked"
        for name in asked
        # What the names of files and tokenizers mean is compared below.
        if name not in ("dataset_path", "validation_path", "tokenizer")
        and there.arguments.get(name) != asked[name]
    ]
    trained_there = there.arguments.get("tokenizer") is None
    if trained_there != (tokenizer is None) or (
        tokenizer is not None
        and tokenization.tokenizer_fingerprint(tokenizer) != there.tokenizer_fingerprint
    ):
        told.append("another tokenizer")
    if not told and there.content_fingerprint != _content_fingerprint(config, found):
        told.append("made from another text")
    return told


def _content_fingerprint(config: PrepareConfig, found: Found) -> str:
    """The fingerprint of the text as it stands now."""
    reading = ReadOptions.of(config)

    def digests(part: Part) -> list[str]:
        return [corpus.digest_of(piece.column) for piece in readers.read_pieces(part, reading)]

    of_parts = in_order(digests, found.parts, config.workers())
    return packing.content_fingerprint(digest for part in of_parts for digest in part)


def _arguments(config: PrepareConfig) -> dict[str, Any]:
    """The arguments that decide what the dataset holds; paths by their last part only."""
    tokenizer = config.tokenizer
    if tokenizer and Path(tokenizer).exists():
        tokenizer = Path(tokenizer).resolve().name
    return {
        "dataset_path": [Path(path).name for path in config.dataset_path],
        "weights": [sources.split_weight(path)[1] for path in config.dataset_path],
        "validation_path": [Path(path).name for path in config.validation_path],
        "document_separator": config.separator(),
        "one_document_per_file": config.one_document_per_file,
        "text_column": config.text_column,
        "dataset_config": config.dataset_config,
        "dataset_split": config.dataset_split,
        "skip_bad_rows": config.skip_bad_rows,
        "encoding_errors": config.encoding_errors,
        "eos_token": config.eos_token,
        "seed": config.seed,
        "sequence_length": config.sequence_length,
        "tokenizer": tokenizer,
        "validation_fraction": held_out_share(config),
        "vocab_size": None if config.tokenizer else config.vocab_size,
    }


def held_out_share(config: PrepareConfig) -> float:
    """The share of the documents that is held out; none where other text is given for that."""
    return 0.0 if config.validation_path else config.validation_fraction


# --- the tokenizer --------------------------------------------------------------------------------


def _load_tokenizer(config: PrepareConfig) -> Any:
    """The tokenizer that was asked for; None when one is to be trained."""
    asked = _asked_tokenizer(config)
    return tokenization.load_tokenizer(**asked) if asked else None


def _asked_tokenizer(config: PrepareConfig) -> dict[str, Any] | None:
    """The arguments of `load_tokenizer`, if one is to be loaded."""
    if config.tokenizer is None:
        return None
    return {
        "name": config.tokenizer,
        "trust_remote_code": config.trust_remote_code,
        "eos_token": config.eos_token,
    }


def _encoders(
    config: PrepareConfig, tokenizer: Any, backend: tokenization.Backend
) -> contextlib.closing[tokenization.Encoders]:
    return contextlib.closing(tokenization.Encoders(tokenizer, backend, _asked_tokenizer(config)))


def tokenizer_folder(config: PrepareConfig, found: Found, folder: Path) -> Path:
    """Where a trained tokenizer is kept until the dataset is finished: named after its input."""
    rules = [dataclasses.asdict(ReadOptions.of(config)), config.vocab_size, config.seed]
    content = [*map(dataclasses.asdict, found.parts), *rules, held_out_share(config)]
    key = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=10)
    return folder / f"tokenizer-{key.hexdigest()}"


def trained_tokenizer(config: PrepareConfig, found: Found, folder: Path) -> Any:
    """A tokenizer trained on documents that are not held out; kept, so that it is trained once."""
    place = tokenizer_folder(config, found, folder)
    if not place.exists():
        print(f"training a tokenizer of {config.vocab_size} entries")
        passing = folder / "tokenizer-in-training"
        shutil.rmtree(passing, ignore_errors=True)
        text = training_text(config, found)
        tokenization.train_tokenizer(text, config.vocab_size).save_pretrained(passing)
        passing.rename(place)
    return tokenization.load_tokenizer(str(place))


def training_text(config: PrepareConfig, found: Found) -> Iterator[str]:
    """The documents that are not held out: of all pieces, or of some where the text is large."""
    reading, left = ReadOptions.of(config), 2 * TOKENIZER_TEXT_BYTES
    total = sum(part.bytes for part in found.parts if not part.is_validation)
    share = min(1.0, TOKENIZER_TEXT_BYTES / max(1, total))
    for number, part in enumerate(found.parts):
        if part.is_validation or (part.is_one_piece and not _is_chosen(number, 0, share, config)):
            continue
        for place, piece in enumerate(readers.read_pieces(part, reading)):
            if left < 0 or not _is_chosen(number, place, share, config):
                continue
            hidden = corpus.held_out(
                number * PIECES_OF_A_PART + place,
                len(piece.column),
                held_out_share(config),
                config.seed,
            )
            for document, is_hidden in zip(piece.column, hidden.tolist(), strict=True):
                if not is_hidden:
                    text = document.as_py().decode()
                    left -= len(text)
                    yield text


def _is_chosen(number: int, place: int, share: float, config: PrepareConfig) -> bool:
    piece = number * PIECES_OF_A_PART + place
    return share == 1 or bool(corpus.held_out(piece, 1, share, config.seed + 1)[0])


class TooShort(ForgeError):
    """The text does not fill a block."""


# --- the work -------------------------------------------------------------------------------------


@contextlib.contextmanager
def resumable(config: PrepareConfig, found: Found, folder: Path) -> Iterator[None]:
    """Keep in `folder` what is done when the work inside fails; nothing done leaves no trace."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder / "dataset", ignore_errors=True)  # is written anew from the pieces
        full = _disk_full(config, found, folder) if _says_disk_full(error) else None
        if isinstance(error, TooShort) or not any((folder / "pieces").glob("*.json")):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                Path(config.output_dir).rmdir()
        if full:
            raise ForgeError(full) from error
        raise


def _says_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; tokenizers 0.23 tells it in a plain Exception."""
    told = [f"(os error {code})" for code in (errno.ENOSPC, errno.EDQUOT)]
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        type(error) is Exception and any(code in str(error) for code in told)
    )


def _disk_full(config: PrepareConfig, found: Found, folder: Path) -> str:
    """What to say when a write failed: how much more is needed, from what is done so far."""
    # Tokens lie on the disk twice, as pieces and as blocks, and take about half of their text.
    in_pieces = sum(path.stat().st_size for path in (folder / "pieces").glob("*.tokens"))
    text = sum(part.bytes for part in found.parts)
    needed = max(text - in_pieces, in_pieces)
    return packing.no_room(folder, needed, shutil.disk_usage(config.output_dir).free)


@dataclass
class Job:
    """What is needed to tokenize any piece."""

    parts: list[Part]
    reading: ReadOptions
    rules: corpus.EncodeOptions
    pieces: Pieces
    workers: int
    give_up: Callable[[], None]  # makes pieces that are being encoded fail soon

    def encode(self, task: Task) -> tuple[int, np.ndarray]:
        """Tokenize and keep a piece. Returns the bytes of its file, and its tokens."""
        piece = task.piece or next(readers.read_pieces(task.part, self.reading))
        tokens, splits = corpus.encode_piece(
            task.number * PIECES_OF_A_PART + task.place,
            piece.column,
            task.part.is_validation,
            self.rules,
        )
        facts = {
            "digest": corpus.digest_of(piece.column),
            "skipped": piece.skipped,
            "is_last": piece.is_last,
        }
        self.pieces.write(task.number, task.part, task.place, tokens, splits, facts)
        return piece.source_bytes, tokens


@dataclass
class Task:
    """A piece that is to be tokenized. piece: its documents; None where the worker reads them."""

    number: int
    part: Part
    place: int
    piece: Piece | None = None


def build(
    config: PrepareConfig, found: Found, tokenizer: Any, folder: Path, ranks: Ranks
) -> Manifest:
    """Write the dataset into `folder`/dataset, by the fastest encoder that is right."""
    labels = labels_of(config, tokenizer)
    backend = config.tokenizer_backend
    while True:
        try:
            with _encoders(config, tokenizer, backend) as encoders:
                if not encoders.is_fast:
                    print(f"encoding by the tokenizer itself, which is slower: {encoders.reason}")
                job = job_of(config, found, labels, encoders, folder)
                manifest = pack(job, found, tokenizer, labels, folder, ranks)
            require_blocks(manifest.splits, config)
            return manifest
        except tokenization.FastPathDiffers as difference:
            if backend == "fast":
                raise ForgeError(f"{difference}: use --tokenizer-backend auto") from difference
            print(f"{difference}: starting again with the tokenizer itself")
            backend = "reference"


def pack(
    job: Job, found: Found, tokenizer: Any, labels: packing.Labels, folder: Path, ranks: Ranks
) -> Manifest:
    """Tokenize, with the other ranks, and write what comes into `folder`/dataset meanwhile."""
    packer = packing.Packer(
        folder / "dataset", found.parts, job.pieces, found.weights, tokenizer, labels
    )
    with contextlib.closing(packer):
        tokenize(job, ranks, packer.catch_up)
        wait_for_ranks(job, ranks, folder, packer)
        return packer.finish()


def labels_of(config: PrepareConfig, tokenizer: Any) -> packing.Labels:
    """What the dataset is to be, the same on every rank."""
    vocab_size = tokenization.vocabulary_size(tokenizer)
    has_validation = held_out_share(config) or config.validation_path
    return packing.Labels(
        splits=(TRAIN, VALIDATION) if has_validation else (TRAIN,),
        sequence_length=config.sequence_length,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=tokenization.token_dtype(vocab_size),
        tokenizer_fingerprint=tokenization.tokenizer_fingerprint(tokenizer),
        arguments=_arguments(config),
    )


def job_of(
    config: PrepareConfig,
    found: Found,
    labels: packing.Labels,
    encoders: tokenization.Encoders,
    folder: Path,
) -> Job:
    """The work on the pieces, the same on every rank."""
    rules = corpus.EncodeOptions(
        encode=encoders.encode,
        eos_token_id=labels.eos_token_id,
        dtype=labels.dtype,
        validation_fraction=held_out_share(config),
        seed=config.seed,
    )
    decides = {**vars(rules), "encode": encoders.is_fast}
    names = unfinished.rules_of_pieces(
        ReadOptions.of(config), tokenizer=labels.tokenizer_fingerprint, **decides
    )
    pieces = Pieces(folder / "pieces", names, rules.dtype)
    return Job(found.parts, ReadOptions.of(config), rules, pieces, config.workers(), encoders.close)


def tokenize(job: Job, ranks: Ranks, catch_up: Callable[[], None] = lambda: None) -> None:
    """Tokenize the pieces of this rank that are not done yet; a progress bar goes along.

    catch_up: called after each, while workers go on with the next ones.
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
            catch_up()


def pieces_to_do(job: Job, ranks: Ranks) -> Iterator[Task]:
    """The pieces of this rank that are not done, in order.

    Parts are dealt out to the ranks; where there are few, every rank reads all and takes every so
    manieth piece.
    """
    deal_parts = len(job.parts) >= 4 * ranks.world_size
    for number, part in enumerate(job.parts):
        mine = number % ranks.world_size == ranks.rank
        if ((deal_parts or part.is_one_piece) and not mine) or job.pieces.records(number, part):
            continue
        if part.is_one_piece:
            yield Task(number, part, 0)
            continue
        for place, piece in enumerate(readers.read_pieces(part, job.reading)):
            is_mine = deal_parts or (number + place) % ranks.world_size == ranks.rank
            if is_mine and not job.pieces.record(number, part, place):
                yield Task(number, part, place, piece)


def wait_for_ranks(job: Job, ranks: Ranks, folder: Path, packer: packing.Packer) -> None:
    """Until all pieces are done; the main process does those of ranks that are gone itself."""
    packer.catch_up()
    started = time.monotonic()
    marks = [folder / f"rank-{rank}" for rank in range(1, ranks.world_size)]
    while not packer.has_all:
        unfinished.require_no_failure(folder)
        may_still_start = time.monotonic() - started < unfinished.STALE_S
        if not marks or not (may_still_start or any(map(unfinished.is_alive, marks))):
            tokenize(job, Ranks(), packer.catch_up)
        time.sleep(POLL_S)
        packer.catch_up()


def help_main(config: PrepareConfig, found: Found, tokenizer: Any, ranks: Ranks) -> Manifest:
    """Tokenize the share of a rank that is not the main one; return what the main one wrote."""
    output_dir = Path(config.output_dir)
    folder = output_dir / corpus.UNFINISHED
    lock = folder / "lock"
    wait_until(lambda: unfinished.is_alive(lock) or _is_ready(config), MAIN_STARTS_WITHIN_S)
    if unfinished.is_alive(lock):
        with unfinished.claim(output_dir, ranks):
            try:
                share_work(config, found, tokenizer, ranks, folder)
            except ForgeError as error:
                unfinished.tell_failure(folder, ranks, str(error))
                raise
            except OSError:
                if unfinished.is_alive(lock):  # else the main process has finished without us
                    raise
    wait_until(lambda: not unfinished.is_alive(lock))
    with contextlib.suppress(OSError):
        folder.rmdir()
    if not _is_ready(config):
        raise ForgeError(f"the main process did not finish {output_dir}: see what it says")
    return Manifest.load(output_dir)


def share_work(
    config: PrepareConfig, found: Found, tokenizer: Any, ranks: Ranks, folder: Path
) -> None:
    """Tokenize this rank's pieces, with the tokenizer that the main process may have to train."""
    if tokenizer is None:
        place = tokenizer_folder(config, found, folder)
        wait_until(lambda: place.exists() or not unfinished.is_alive(folder / "lock"))
        if not place.exists():
            return
        tokenizer = tokenization.load_tokenizer(str(place))
    labels, backend = labels_of(config, tokenizer), config.tokenizer_backend
    try:
        with _encoders(config, tokenizer, backend) as encoders:
            tokenize(job_of(config, found, labels, encoders, folder), ranks)
    except tokenization.FastPathDiffers:
        with _encoders(config, tokenizer, "reference") as encoders:
            tokenize(job_of(config, found, labels, encoders, folder), ranks)


def _is_ready(config: PrepareConfig) -> bool:
    """Whether the folder holds a dataset of these arguments."""
    try:
        return Manifest.load(Path(config.output_dir)).arguments == _arguments(config)
    except ForgeError:
        return False


def wait_until(holds: Callable[[], bool], timeout_s: float = float("inf")) -> None:
    """Return when it holds, or after the time."""
    end = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < end:
        time.sleep(POLL_S)


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


def require_blocks(splits: dict[str, SplitFacts], config: PrepareConfig) -> None:
    """Raise TooShort when a split has not enough text for one block."""
    documents = sum(facts.documents for facts in splits.values())
    found = f"found {documents} documents, divided at {config.separator()!r} (--document-separator)"
    train = splits[TRAIN]
    if not train.blocks:
        raise TooShort(
            f"the text is too short: {train.dropped_tokens} tokens to train on do not fill one "
            f"block of {config.sequence_length}; {found}. Add text, or use a shorter "
            "--sequence-length"
        )
    validation = splits.get(VALIDATION)
    if validation and not validation.blocks:
        raise TooShort(
            f"the validation split is too short: {validation.documents} documents, "
            f"{validation.dropped_tokens} tokens, fill no block of {config.sequence_length}; "
            f"{found}. Use a larger --validation-fraction (now {config.validation_fraction}), "
            "--validation-fraction 0 for no such split, or a shorter --sequence-length"
        )


def _summary(manifest: Manifest) -> str:
    parts = [
        f"{name} {facts.documents:,} documents in {facts.blocks:,} blocks"
        for name, facts in manifest.splits.items()
    ]
    tokens = sum(facts.tokens for facts in manifest.splits.values())
    text_bytes = sum(facts.bytes for facts in manifest.splits.values())
    return (
        f"{'; '.join(parts)} of {manifest.sequence_length} tokens "
        f"({text_bytes / tokens:.2f} bytes of text per token, vocabulary {manifest.vocab_size:,})"
        + (f"; {manifest.skipped_rows:,} bad rows left out" if manifest.skipped_rows else "")
    )


if __name__ == "__main__":
    run_script(main, local_rank())
