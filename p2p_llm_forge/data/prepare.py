"""Prepare a dataset: find the text, tokenize it in pieces, pack the tokens into blocks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.dataset import Manifest, SplitFacts, publish
from p2p_llm_forge.data.encode import Backend, Encoders
from p2p_llm_forge.data.fast_path import FastPathDiffers
from p2p_llm_forge.data.packing import DatasetSpec, Packer
from p2p_llm_forge.data.pieces import Pieces
from p2p_llm_forge.data.preparation import Preparation, already_prepared
from p2p_llm_forge.data.ranks import Helpers, Ranks, alive, failure_posted, lives, mark_of
from p2p_llm_forge.data.splits import TRAIN, VALIDATION, EncodeOptions
from p2p_llm_forge.data.tokenizer_training import tokenizer_folder, trained_tokenizer
from p2p_llm_forge.data.tokenizing import Job, tokenize
from p2p_llm_forge.data.unfinished import PIECES, claimed, disk_full_explained, remove_leftovers
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock, Pulse
from p2p_llm_forge.polling import wait_for

MAIN_STARTS_WITHIN_S = 300.0


def prepare(config: PrepareConfig, ranks: Ranks = Ranks()) -> Manifest:  # noqa: B008
    """Tokenize and pack the text into `config.output_dir`, unless it holds that dataset already.

    A run that was killed is resumed. With several ranks, each tokenizes a part of the text and the
    main one writes the dataset; all call this. Returns the dataset's manifest. Raises ForgeError
    when the text, the tokenizer or the folder does not allow it; a dataset in the folder is then as
    it was.
    """
    config.problems().raise_any()
    preparation = Preparation.of(config)
    if preparation.found.unreadable and ranks.is_main:
        print(
            f"{preparation.found.unreadable} files cannot be read and are left out"
            " (--skip-bad-rows)"
        )
    tokenizer = load_tokenizer(config)
    there = already_prepared(preparation, tokenizer)
    if there:
        if ranks.is_main:
            remove_leftovers(preparation.output_dir)
            print(f"{config.output_dir} is already prepared: {summary(there)}")
        return there
    if not ranks.is_main:
        return help_main(preparation, tokenizer, ranks)
    manifest = make(preparation, tokenizer, ranks)
    print(f"prepared {config.output_dir}: {summary(manifest)}")
    return manifest


def make(preparation: Preparation, tokenizer: Any, ranks: Ranks) -> Manifest:
    """The main rank's work: the dataset, made in the unfinished folder and then published."""
    folder = preparation.folder
    with (
        claimed(preparation.output_dir) as lock,
        disk_full_explained(folder, preparation.found.parts),
        alive(folder, ranks),
    ):
        if tokenizer is None:
            tokenizer = trained_tokenizer(preparation)
        backend = preparation.config.tokenizer_backend
        try:
            return build(preparation, tokenizer, backend, ranks, lock)
        except FastPathDiffers as difference:
            if backend == "fast":
                raise ForgeError(str(difference), "use --tokenizer-backend auto") from difference
            print(f"{difference}: starting again with the tokenizer itself")
            return build(preparation, tokenizer, "reference", ranks, lock)


def build(
    preparation: Preparation,
    tokenizer: Any,
    backend: Backend,
    ranks: Ranks,
    lock: Lock,
) -> Manifest:
    """Tokenize, with the other ranks, pack what is done meanwhile, and publish the dataset."""
    spec = spec_of(preparation, tokenizer)
    with encoders_of(preparation, tokenizer, backend) as encoders:
        if not encoders.is_fast:
            print(f"encoding by the tokenizer itself, which is slower: {encoders.reason}")
        job = job_of(preparation, spec, encoders)
        packer = Packer(preparation.folder, preparation.found, job.pieces, spec)
        helpers = Helpers(preparation.folder, ranks)

        def take_what_is_done() -> bool:
            lock.confirm()
            packer.catch_up()
            return helpers.are_working()

        def all_is_done() -> bool:
            if not take_what_is_done() and not packer.has_all:
                tokenize(job, Ranks(), take_what_is_done)  # what was left by ranks that are gone
            return packer.has_all

        with contextlib.closing(packer):
            tokenize(job, ranks, take_what_is_done)
            wait_for(all_is_done)
            manifest = packer.finish()
    lock.confirm()
    try:
        require_blocks(preparation, manifest.splits)
    except ForgeError:
        shutil.rmtree(preparation.folder / PIECES)  # the same text is of no use
        raise
    publish(packer.written, preparation.output_dir)
    return manifest


def help_main(preparation: Preparation, tokenizer: Any, ranks: Ranks) -> Manifest:
    """Tokenize the pieces of a rank that is not the main one; return what the main one wrote."""
    folder = preparation.folder
    main = Pulse(mark_of(folder, 0))

    def main_lives() -> bool:
        return lives(main)

    def main_has_started() -> bool:
        # A file that never changes was left by a run that was killed.
        return main_lives() and main.has_changed()

    wait_for(lambda: main_has_started() or is_ready(preparation), MAIN_STARTS_WITHIN_S)
    if main_has_started():
        try:
            with alive(folder, ranks), failure_posted(folder, ranks):
                tokenize_for_main(preparation, tokenizer, ranks, main_lives)
        except OSError:
            if main_lives():  # else the main rank has finished without this one
                raise
    wait_for(lambda: not main_lives())
    with contextlib.suppress(OSError):
        folder.rmdir()
    if not is_ready(preparation):
        raise ForgeError(
            f"the main process did not finish {preparation.output_dir}",
            "follow its message, and run the same command again",
        )
    return Manifest.load(preparation.output_dir)


def tokenize_for_main(
    preparation: Preparation, tokenizer: Any, ranks: Ranks, main_lives: Callable[[], bool]
) -> None:
    """Tokenize this rank's pieces, with the tokenizer that the main rank may have to train."""
    if tokenizer is None:
        folder = tokenizer_folder(preparation)
        wait_for(lambda: folder.exists() or not main_lives())
        if not folder.exists():
            return
        tokenizer = tokenization.load_tokenizer(str(folder))
    spec, backend = spec_of(preparation, tokenizer), preparation.config.tokenizer_backend
    try:
        with encoders_of(preparation, tokenizer, backend) as encoders:
            tokenize(job_of(preparation, spec, encoders), ranks)
    except FastPathDiffers:
        with encoders_of(preparation, tokenizer, "reference") as encoders:
            tokenize(job_of(preparation, spec, encoders), ranks)


def is_ready(preparation: Preparation) -> bool:
    """Whether the folder holds a dataset of these arguments."""
    try:
        return Manifest.load(preparation.output_dir).arguments == preparation.arguments
    except ForgeError:
        return False


# --- what the parts of the work need --------------------------------------------------------------


def load_tokenizer(config: PrepareConfig) -> Any:
    """The tokenizer that was asked for; None when one is to be trained."""
    arguments = _load_arguments(config)
    return tokenization.load_tokenizer(**arguments) if arguments else None


def _load_arguments(config: PrepareConfig) -> dict[str, Any] | None:
    """The arguments of `tokenization.load_tokenizer`, if one is to be loaded."""
    if config.tokenizer is None:
        return None
    return {
        "name": config.tokenizer,
        "trust_remote_code": config.trust_remote_code,
        "eos_token": config.eos_token,
    }


def encoders_of(
    preparation: Preparation, tokenizer: Any, backend: Backend
) -> contextlib.closing[Encoders]:
    """The encoders of the tokenizer, closed at the end."""
    arguments = _load_arguments(preparation.config)
    return contextlib.closing(Encoders(tokenizer, backend, arguments))


def spec_of(preparation: Preparation, tokenizer: Any) -> DatasetSpec:
    """What the dataset is to be, the same on every rank."""
    vocab_size = tokenization.vocabulary_size(tokenizer)
    has_validation = preparation.validation_fraction or preparation.config.validation_path
    return DatasetSpec(
        tokenizer=tokenizer,
        splits=(TRAIN, VALIDATION) if has_validation else (TRAIN,),
        sequence_length=preparation.config.sequence_length,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=tokenization.token_dtype(vocab_size),
        tokenizer_fingerprint=tokenization.tokenizer_fingerprint(tokenizer),
        arguments=preparation.arguments,
    )


def job_of(preparation: Preparation, spec: DatasetSpec, encoders: Encoders) -> Job:
    """The work on the pieces, the same on every rank."""
    options = EncodeOptions(
        encode=encoders.encode,
        eos_token_id=spec.eos_token_id,
        dtype=spec.dtype,
        validation_fraction=preparation.validation_fraction,
        seed=preparation.config.seed,
    )
    decides = {
        **asdict(preparation.read_options),
        **vars(options),
        "encode": encoders.is_fast,
        "tokenizer": spec.tokenizer_fingerprint,
    }
    return Job(
        parts=preparation.found.parts,
        read_options=preparation.read_options,
        encode_options=options,
        pieces=Pieces(preparation.folder / PIECES, decides, spec.dtype),
        workers=preparation.config.workers(),
        give_up=encoders.close,
    )


# --- what came out --------------------------------------------------------------------------------


def require_blocks(preparation: Preparation, splits: dict[str, SplitFacts]) -> None:
    """Raise ForgeError when a split has not enough text for one block."""
    config = preparation.config
    documents = sum(facts.documents for facts in splits.values())
    divided = (
        f"found {documents} documents, divided at {config.separator()!r} (--document-separator)"
    )
    train, validation = splits[TRAIN], splits.get(VALIDATION)
    if not train.blocks:
        raise ForgeError(
            f"the text is too short: {train.dropped_tokens} tokens to train on do not fill one "
            f"block of {config.sequence_length}; {divided}",
            "add text, or use a shorter --sequence-length",
        )
    if validation and not validation.blocks:
        raise ForgeError(
            f"the validation split is too short: {validation.documents} documents, "
            f"{validation.dropped_tokens} tokens, fill no block of {config.sequence_length}; "
            f"{divided}",
            f"use a larger --validation-fraction (now {config.validation_fraction}), "
            "--validation-fraction 0 for no such split, or a shorter --sequence-length",
        )


def summary(manifest: Manifest) -> str:
    """Documents, blocks, tokens and bytes, for people."""
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
