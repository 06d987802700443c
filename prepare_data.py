"""Turn text into a prepared dataset: tokens in blocks of fixed length, ready for train.py.

python prepare_data.py --dataset-path corpus.txt --output-dir data/prepared/mine
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from p2p_llm_forge import config as configuration
from p2p_llm_forge import corpus, tokenization
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.corpus import TRAIN, VALIDATION, BlockWriter, Manifest, SplitFacts, Unit
from p2p_llm_forge.errors import ForgeError, run_script

NOT_PLAIN_TEXT = {".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst", ".zip", ".arrow"}

Item = TypeVar("Item")
Result = TypeVar("Result")


def main(argv: list[str] | None = None) -> int:
    """Prepare what the command line asks for."""
    prepare(
        configuration.parse(
            PrepareConfig, sys.argv[1:] if argv is None else argv, "prepare_data.py"
        )
    )
    return 0


def prepare(config: PrepareConfig) -> Manifest:
    """Tokenize and pack the text into `config.output_dir`, unless it holds that dataset already.

    Returns the dataset's manifest. Raises ForgeError, and leaves the folder as it was, when the
    text, the tokenizer or the folder does not allow it.
    """
    config.check()
    units = find_text(config)
    output_dir = Path(config.output_dir)
    tokenizer = _load_tokenizer(config)
    prepared = already_prepared(config, output_dir, units, tokenizer)
    if prepared:
        print(f"{output_dir} is already prepared: {_summary(prepared)}")
        return prepared
    with growing_in(output_dir) as folder:
        if tokenizer is None:
            tokenizer = train_tokenizer(config, units)
        manifest = write_dataset(config, units, tokenizer, folder)
        corpus.publish(folder, output_dir)
    print(f"prepared {output_dir}: {_summary(manifest)}")
    return manifest


# --- before any work: what is asked, what is there ------------------------------------------------


def find_text(config: PrepareConfig) -> list[Unit]:
    """The units of the text files, in the order given. Raises ForgeError for what is no text."""
    units: list[Unit] = []
    for path in map(Path, config.dataset_path):
        if path.is_dir():
            raise ForgeError(
                f"--dataset-path {path} is a folder, not prepared and not text: give a .txt file"
            )
        if not path.exists():
            raise ForgeError(f"--dataset-path {path}: no such file. Give the path of a .txt file")
        if path.suffix in NOT_PLAIN_TEXT:
            raise ForgeError(f"--dataset-path {path}: {path.suffix} is not plain text: convert it")
        try:
            units += corpus.units_of(path, config.separator())
        except OSError as error:
            raise ForgeError(f"--dataset-path {path} cannot be read: {error.strerror}") from error
    if not units:
        raise ForgeError(
            f"{', '.join(config.dataset_path)}: the file is empty, there is no text to prepare"
        )
    return units


def already_prepared(
    config: PrepareConfig, output_dir: Path, units: list[Unit], tokenizer: Any
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
    found = Manifest.load(output_dir)
    differences = _differences(found, config, units, tokenizer)
    if differences:
        raise ForgeError(
            f"--output-dir {output_dir} holds another dataset ({'; '.join(differences)}): "
            "give a new folder, or --overwrite to replace it"
        )
    return found


def _differences(
    found: Manifest, config: PrepareConfig, units: list[Unit], tokenizer: Any
) -> list[str]:
    """In what a dataset differs from the one that is asked for, in words."""
    asked = _arguments(config)
    told = [
        f"{name}: {found.arguments.get(name)!r} there, {asked[name]!r} asked"
        for name in asked
        # What the names of files and tokenizers mean is compared below.
        if name not in ("dataset_path", "tokenizer") and found.arguments.get(name) != asked[name]
    ]
    trained_there = found.arguments.get("tokenizer") is None
    if trained_there != (tokenizer is None) or (
        tokenizer is not None
        and tokenization.tokenizer_fingerprint(tokenizer) != found.tokenizer_fingerprint
    ):
        told.append("another tokenizer")
    if not told and found.content_fingerprint != content_fingerprint(units, config.workers()):
        told.append("made from another text")
    return told


def content_fingerprint(units: list[Unit], workers: int) -> str:
    """sha256 of the units' sha256: the text as it stands in the files, whatever they are called."""
    digests = in_order(lambda unit: hashlib.sha256(corpus.read_unit(unit)).digest(), units, workers)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _arguments(config: PrepareConfig) -> dict[str, Any]:
    """The arguments that decide what the dataset holds; paths by their last part only."""
    tokenizer = config.tokenizer
    if tokenizer and Path(tokenizer).exists():
        tokenizer = Path(tokenizer).resolve().name
    return {
        "dataset_path": [Path(path).name for path in config.dataset_path],
        "document_separator": config.separator(),
        "encoding_errors": config.encoding_errors,
        "seed": config.seed,
        "sequence_length": config.sequence_length,
        "tokenizer": tokenizer,
        "validation_fraction": config.validation_fraction,
        "vocab_size": None if config.tokenizer else config.vocab_size,
    }


# --- the work -------------------------------------------------------------------------------------


@contextlib.contextmanager
def growing_in(output_dir: Path) -> Iterator[Path]:
    """A fresh folder inside `output_dir` for a dataset that grows; removed when that fails."""
    folder = output_dir / corpus.UNFINISHED
    made = not output_dir.exists()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} is not writable ({error.strerror}): give another folder"
        ) from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                output_dir.rmdir()
        raise


def _load_tokenizer(config: PrepareConfig) -> Any:
    """The tokenizer that was asked for; None when one is to be trained."""
    if config.tokenizer is None:
        return None
    return tokenization.load_tokenizer(config.tokenizer, config.trust_remote_code)


def train_tokenizer(config: PrepareConfig, units: list[Unit]) -> Any:
    """Train a tokenizer on the documents that are not held out."""
    print(f"training a tokenizer of {config.vocab_size} entries")

    def training_text() -> Iterator[str]:
        for number, unit in enumerate(units):
            documents = corpus.documents_of(
                unit, corpus.read_unit(unit), config.separator(), config.encoding_errors
            )
            is_held_out = corpus.held_out(
                number, len(documents), config.validation_fraction, config.seed
            )
            for document, hidden in zip(documents, is_held_out.tolist(), strict=True):
                if not hidden:
                    yield document.decode()

    return tokenization.train_tokenizer(training_text(), config.vocab_size)


def write_dataset(
    config: PrepareConfig, units: list[Unit], tokenizer: Any, folder: Path
) -> Manifest:
    """Write splits, tokenizer and manifest into `folder`, by the fastest encoder that is right."""
    encoders = tokenization.Encoders(tokenizer, config.tokenizer_backend)
    if not encoders.is_fast:
        print(f"encoding by the tokenizer itself, which is slower: {encoders.reason}")
    try:
        return _write_dataset(config, units, tokenizer, encoders, folder)
    except tokenization.FastPathDiffers as difference:
        if config.tokenizer_backend == "fast":
            raise ForgeError(f"{difference}: use --tokenizer-backend auto") from difference
        print(f"{difference}: starting again with the tokenizer itself")
    for path in folder.iterdir():
        shutil.rmtree(path)
    encoders = tokenization.Encoders(tokenizer, "reference")
    return _write_dataset(config, units, tokenizer, encoders, folder)


def _write_dataset(
    config: PrepareConfig,
    units: list[Unit],
    tokenizer: Any,
    encoders: tokenization.Encoders,
    folder: Path,
) -> Manifest:
    vocab_size = tokenization.vocabulary_size(tokenizer)
    rules = corpus.Rules(
        encode=encoders.encode,
        eos_token_id=tokenizer.eos_token_id,
        dtype="uint16" if vocab_size <= 2**16 else "uint32",
        separator=config.separator(),
        encoding_errors=config.encoding_errors,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
    )
    names = (TRAIN, VALIDATION) if config.validation_fraction else (TRAIN,)
    writers = {
        name: BlockWriter(folder / name, config.sequence_length, rules.dtype) for name in names
    }
    documents, text_bytes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    digests = []
    for unit in encoded(units, rules, config.workers()):
        digests.append(unit.digest)
        for name in names:
            writers[name].append(unit.parts[name].tokens)
            documents[name] += unit.parts[name].documents
            text_bytes[name] += unit.parts[name].bytes
    splits = {}
    for name, writer in writers.items():
        tail = writer.finish()
        splits[name] = SplitFacts(
            documents=documents[name],
            blocks=writer.blocks,
            tokens=writer.blocks * config.sequence_length,
            bytes=text_bytes[name] - tokenization.bytes_of_text(tokenizer, tail.tolist()),
            dropped_tokens=len(tail),
        )
    require_blocks(splits, config)
    manifest = Manifest(
        sequence_length=config.sequence_length,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=rules.dtype,
        splits=splits,
        tokenizer_fingerprint=tokenization.tokenizer_fingerprint(tokenizer),
        content_fingerprint=hashlib.sha256(b"".join(digests)).hexdigest(),
        arguments=_arguments(config),
    )
    for name, writer in writers.items():
        writer.describe(name, f"{manifest.fingerprint[:16]}-{name}")
    corpus.write_json(folder / corpus.DATASET_DICT, {"splits": list(names)})
    tokenizer.save_pretrained(folder / corpus.TOKENIZER)
    manifest.save(folder)
    return manifest


def encoded(units: list[Unit], rules: corpus.Rules, workers: int) -> Iterator[corpus.EncodedUnit]:
    """The units, tokenized by `workers` threads, in order; a progress bar goes along."""
    from tqdm import tqdm

    total = sum(unit.end - unit.start for unit in units)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        work = in_order(
            lambda numbered: corpus.encode_unit(*numbered, rules), list(enumerate(units)), workers
        )
        for unit, result in zip(units, work, strict=True):
            bar.update(unit.end - unit.start)
            yield result


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """`work` of every item by `workers` threads; results in the items' order, few in waiting."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def require_blocks(splits: dict[str, SplitFacts], config: PrepareConfig) -> None:
    """Raise ForgeError when a split has not enough text for one block."""
    documents = sum(facts.documents for facts in splits.values())
    found = f"found {documents} documents, divided at {config.separator()!r} (--document-separator)"
    train = splits[TRAIN]
    if not train.blocks:
        raise ForgeError(
            f"the text is too short: {train.dropped_tokens} tokens to train on do not fill one "
            f"block of {config.sequence_length}; {found}. Add text, or use a shorter "
            "--sequence-length"
        )
    validation = splits.get(VALIDATION)
    if validation and not validation.blocks:
        raise ForgeError(
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
    )


if __name__ == "__main__":
    run_script(main)
