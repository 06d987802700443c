"""Prepare a dataset: find the text, tokenize it in pieces, pack the tokens into blocks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import cutting, folders
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.conversation_encoder import ConversationEncoder
from p2p_llm_forge.data.conversations import ASSISTANT, in_words_of
from p2p_llm_forge.data.dataset import Manifest, publish
from p2p_llm_forge.data.encode import Backend, Encoders
from p2p_llm_forge.data.fast_path import FastPathDiffers
from p2p_llm_forge.data.formats import ONE_DOCUMENT
from p2p_llm_forge.data.packing import Packer
from p2p_llm_forge.data.preparation import Preparation, already_prepared
from p2p_llm_forge.data.readers import columns_not_seen
from p2p_llm_forge.data.shares import (
    SHORTEST_BLOCK,
    require_shares,
    share_lines,
    share_warnings,
    trained_lines,
)
from p2p_llm_forge.data.splits import TRAIN, VALIDATION, in_words
from p2p_llm_forge.data.tokenizer_training import tokenizer_folder, trained_tokenizer
from p2p_llm_forge.data.tokenizing import Job, tokenize
from p2p_llm_forge.data.unfinished import Helpers, OtherRank, Ranks, alive, claimed, room_explained
from p2p_llm_forge.errors import ForgeError, counted, in_one_line
from p2p_llm_forge.files import Lock
from p2p_llm_forge.polling import wait_for

MAIN_STARTS_WITHIN_S = 300.0


def prepare(config: PrepareConfig, ranks: Ranks = Ranks()) -> Manifest:  # noqa: B008
    """Tokenize and pack the text into `config.output_dir`, unless it holds that dataset already.

    A run that was killed is resumed. All ranks call this; each tokenizes a part of the text and the
    main one writes the dataset. Returns the dataset's manifest. Raises ForgeError when the text,
    the tokenizer or the folder does not allow it; a dataset in the folder is then as it was.
    """
    config.problems().raise_any()
    preparation, is_main = Preparation.of(config), ranks.rank == 0
    if preparation.unreadable and is_main:
        files = counted(preparation.unreadable, "file")
        print(f"left out {files} that cannot be read (--skip-bad-rows)")
    if preparation.left_out_folders and is_main:
        print(f"left out {folders.in_words(preparation.left_out_folders)}")
    if preparation.left_out and is_main:
        print(cutting.left_out(preparation.left_out))
    for note in preparation.notes if is_main else []:
        print(note)
    arguments = preparation.tokenizer_arguments
    report = print if is_main else lambda _: None
    tokenizer = tokenization.load_tokenizer(**arguments, report=report) if arguments else None
    there = already_prepared(preparation, tokenizer)
    if there:
        if is_main:
            print(f"{config.output_dir} is already prepared: {summary(there)}")
            if preparation.folder.exists():  # of a run that was killed when all but that was done
                with contextlib.suppress(ForgeError), claimed(preparation.output_dir):
                    pass  # at its end the folder is removed
        return there
    if not is_main:
        return help_main(preparation, tokenizer, ranks)
    manifest = make(preparation, tokenizer, ranks)
    print(f"prepared {config.output_dir}: {summary(manifest)}")
    return manifest


def is_prepared(config: PrepareConfig) -> bool:
    """Whether `prepare` would find this dataset there, so that it writes nothing."""
    config.problems().raise_any()
    preparation = Preparation.of(config)
    arguments = preparation.tokenizer_arguments
    tokenizer = (
        tokenization.load_tokenizer(**arguments, report=lambda _: None) if arguments else None
    )
    return already_prepared(preparation, tokenizer) is not None


def make(preparation: Preparation, tokenizer: Any, ranks: Ranks) -> Manifest:
    """The main rank's work: the dataset, made in the unfinished folder and then published."""
    folder, backend = preparation.folder, backend_of(preparation)
    for name, path in columns_not_seen(preparation.parts, preparation.read_options):
        print(f"warning: no row at the beginning of {in_one_line(path)} has the column '{name}'")
    with (
        claimed(preparation.output_dir) as lock,
        room_explained(folder, preparation.parts),
        alive(folder, ranks),
    ):
        if tokenizer is None:
            tokenizer = trained_tokenizer(preparation)
        for line in in_words_of_conversations(preparation, tokenizer):
            print(line)
        try:
            return build(preparation, tokenizer, backend, ranks, lock)
        except FastPathDiffers as difference:
            if backend == "fast":
                raise ForgeError(str(difference), "use --tokenizer-backend auto") from difference
            print(f"{difference}: starting again with the tokenizer itself")
            return build(preparation, tokenizer, "reference", ranks, lock)


def build(
    preparation: Preparation, tokenizer: Any, backend: Backend, ranks: Ranks, lock: Lock
) -> Manifest:
    """Tokenize, with the other ranks, pack what is done meanwhile, and publish the dataset."""
    blank = blank_manifest(preparation, tokenizer)
    from_where, skips_bad = preparation.tokenizer_arguments, preparation.config.skip_bad_rows
    with contextlib.closing(Encoders(tokenizer, backend, from_where, skips_bad)) as encoders:
        conversations = conversation_encoder(preparation, tokenizer, encoders)
        if not (encoders.is_fast or conversations):
            print(f"encoding by the tokenizer itself, which is slower: {encoders.reason}")
        job = Job(preparation, blank, encoders, conversations)
        packer = Packer(job, blank, tokenizer)
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
    require_shares(manifest)  # the same tokens are of use with other weights
    try:
        require_blocks(preparation, manifest)
    except ForgeError:
        shutil.rmtree(job.pieces.folder)  # the same text is of no use
        raise
    print(
        cutting.summary(
            preparation.parts, preparation.read_options, partial(cutting.documents_of, job.pieces)
        )
    )
    publish(packer.written, preparation.output_dir)
    return manifest


def help_main(preparation: Preparation, tokenizer: Any, ranks: Ranks) -> Manifest:
    """Tokenize the pieces of a rank that is not the main one; return what the main one wrote."""
    main = OtherRank(preparation.folder, 0)

    def main_has_started() -> bool:
        # A file that never changes was left by a run that was killed.
        return main.lives() and main.has_changed()

    wait_for(lambda: main_has_started() or finished(preparation), MAIN_STARTS_WITHIN_S)
    if main_has_started():
        try:
            with alive(preparation.folder, ranks):
                tokenize_for_main(preparation, tokenizer, ranks, main.lives)
        except OSError:
            if main.lives():  # else the main rank has finished without this one
                raise
    wait_for(lambda: not main.lives())
    with contextlib.suppress(OSError):
        preparation.folder.rmdir()
    manifest = finished(preparation)
    if not manifest:
        raise ForgeError(
            f"the main process did not finish {preparation.output_dir}",
            "follow its message, and run the same command again",
        )
    return manifest


def tokenize_for_main(
    preparation: Preparation, tokenizer: Any, ranks: Ranks, main_lives: Callable[[], bool]
) -> None:
    """Tokenize this rank's pieces, with the tokenizer that the main rank may have to train."""
    if tokenizer is None:
        folder = tokenizer_folder(preparation)
        wait_for(lambda: folder.exists() or not main_lives())
        if not folder.exists():
            return
        try:
            tokenizer = tokenization.load_tokenizer(str(folder))
        except ForgeError:
            if main_lives():
                raise
            return  # the main rank has finished, and cleared up, meanwhile
    blank = blank_manifest(preparation, tokenizer)
    from_where, skips_bad = preparation.tokenizer_arguments, preparation.config.skip_bad_rows
    backends: tuple[Backend, Backend] = (backend_of(preparation), "reference")
    for backend in backends:
        with (
            contextlib.suppress(FastPathDiffers),
            contextlib.closing(Encoders(tokenizer, backend, from_where, skips_bad)) as encoders,
        ):
            conversations = conversation_encoder(preparation, tokenizer, encoders)
            return tokenize(Job(preparation, blank, encoders, conversations), ranks)


def backend_of(preparation: Preparation) -> Backend:
    """What encodes; conversations are always encoded by the tokenizer itself."""
    is_text = not preparation.read_options.train_on
    return preparation.config.tokenizer_backend if is_text else "reference"


def conversation_encoder(
    preparation: Preparation, tokenizer: Any, encoders: Encoders
) -> ConversationEncoder | None:
    """What encodes conversations; None where documents are texts. Raises ForgeError."""
    template, train_on = preparation.template(tokenizer), preparation.read_options.train_on
    if not (template and train_on):
        return None
    skips_bad = preparation.config.skip_bad_rows
    return ConversationEncoder(
        tokenizer, template, train_on, skips_bad, gives_up=lambda: encoders.is_closed
    )


def finished(preparation: Preparation) -> Manifest | None:
    """The manifest of the output folder, if it holds a dataset of these arguments."""
    try:
        manifest = Manifest.load(preparation.output_dir)
    except ForgeError:
        return None
    return manifest if manifest.arguments == preparation.arguments else None


def blank_manifest(preparation: Preparation, tokenizer: Any) -> Manifest:
    """What the dataset is to be, the same on every rank; nothing is counted yet."""
    vocab_size = tokenization.vocabulary_size(tokenizer)
    return Manifest(
        sequence_length=preparation.config.sequence_length,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=tokenization.token_dtype(vocab_size),
        tokenizer_fingerprint=tokenization.tokenizer_fingerprint(tokenizer),
        arguments=preparation.arguments,
        conversations=preparation.conversations(tokenizer),
    )


def in_words_of_conversations(preparation: Preparation, tokenizer: Any) -> list[str]:
    """What conversations are trained on and by which template they are written, for people."""
    template, train_on = preparation.template(tokenizer), preparation.read_options.train_on
    if not (template and train_on):
        return []
    what = in_words_of(train_on)
    lines = [f"conversations, of which {what} is trained, written by {template.origin}"]
    if template.depends_on_the_day:
        lines.append(
            "warning: this template writes the date of today: on another day it is another dataset"
        )
    if train_on == ASSISTANT and not template.ends_answers:
        lines.append(
            "warning: by this template no control token ends what the assistant says, so a model"
            " does not learn to stop; --chat-template FILE takes another"
        )
    return lines


def require_blocks(preparation: Preparation, manifest: Manifest) -> None:
    """Raise ForgeError when a split has not enough text for one block."""
    config, length = preparation.config, manifest.sequence_length
    train, validation = manifest.splits[TRAIN], manifest.splits.get(VALIDATION)
    documents = sum(facts.documents for facts in manifest.splits.values())
    ways = " and ".join(cutting.ways(preparation.parts, preparation.read_options))
    has_text = any(part.kind in ("text", *ONE_DOCUMENT) for part in preparation.parts)
    divided = (
        f"{counted(documents, 'document')}, {ways}{' (--document-separator)' if has_text else ''}"
    )
    less = ""
    if left_out := in_words(manifest.left_out):
        divided += f"; left out: {left_out}"
        less = "leave out fewer documents, "
    if manifest.skipped_rows:
        divided += f"; left out: {counted(manifest.skipped_rows, 'bad row')} (--skip-bad-rows)"
        less += "correct bad rows, "
    if preparation.whole_files and not all(facts.documents for facts in manifest.splits.values()):
        less += "divide the files at blank lines with --document-separator '\\n\\n', "
    if train.tokens + train.dropped_tokens < SHORTEST_BLOCK:
        less += "hold out fewer documents, " if validation and validation.documents else ""
        found = f"the text is too short: there is nothing to train on; found {divided}"
        raise ForgeError(found, f"{less}or add text" if less else "add text")
    if not train.blocks:
        raise ForgeError(
            f"the text is too short: {train.dropped_tokens} tokens to train on do not fill one "
            f"block of {length}; found {divided}",
            f"{less}add text, or use a shorter --sequence-length",
        )
    if validation and not validation.blocks:
        has_tokens = validation.dropped_tokens >= SHORTEST_BLOCK
        shorter = ", or use a shorter --sequence-length" if has_tokens else ""
        what, fix = (
            "the validation split",
            (
                f"{less}use a larger --validation-fraction (now {config.validation_fraction}), "
                f"or --validation-fraction 0 for no such split{shorter}"
            ),
        )
        if config.validation_path:
            what = f"the text of --validation-path {', '.join(config.validation_path)}"
            fix = f"{less}add text there{shorter}"
        raise ForgeError(
            f"{what} is too short: {counted(validation.documents, 'document')}, "
            f"{counted(validation.dropped_tokens, 'token')}, fill no block of {length}; found "
            f"{divided}",
            fix,
        )


def summary(manifest: Manifest) -> str:
    """Documents, blocks, tokens, bytes and shares, for people."""
    parts = [
        f"{name} {counted(facts.documents, 'document')} in {counted(facts.blocks, 'block')}"
        for name, facts in manifest.splits.items()
    ]
    tokens = sum(facts.trained for facts in manifest.splits.values())
    kind = "token" if manifest.conversations is None else "trained token"
    text_bytes = sum(facts.bytes for facts in manifest.splits.values())
    left_out = in_words(manifest.left_out)
    facts = (
        f"{'; '.join(parts)} of {manifest.sequence_length} tokens "
        f"({text_bytes / tokens:.2f} bytes of text per {kind}, vocabulary {manifest.vocab_size:,})"
        + (
            f"; {counted(manifest.skipped_rows, 'bad row')} left out"
            if manifest.skipped_rows
            else ""
        )
        + (f"; left out: {left_out}" if left_out else "")
    )
    warnings = [f"warning: {warning}" for warning in share_warnings(manifest)]
    return "\n".join([facts, *trained_lines(manifest), *share_lines(manifest), *warnings])
