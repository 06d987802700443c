"""PrepareConfig: all that prepare_data.py can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.conversations import ConversationOptions
from p2p_llm_forge.config.fields import Options, flag, require_at_least, require_between
from p2p_llm_forge.config.launch import MOST_THREADS
from p2p_llm_forge.config.names_of_prepare import OF_PREPARATION
from p2p_llm_forge.config.train import LONGEST_BLOCK
from p2p_llm_forge.errors import Problems
from p2p_llm_forge.limits import cores

CAN_DELIMIT = {*map(chr, range(1, 127))} - set('"\r\n')
BLANK_LINES = "\n\n"  # as a separator: one or more of them

MOST_WORDS = 2**24  # entries of a tokenizer that is trained here; more is a slip of the keys


@dataclass
class TextOptions(Options):
    """Which text is prepared, how it is read, and where the result goes."""

    heading = "text and output"
    COMMON = [
        *("dataset_path", "output_dir", "validation_path", "validation_fraction"),
        *("document_separator", "text_column", "dataset_config", "dataset_split"),
        *("skip_bad_rows", "encoding_errors"),
    ]

    dataset_path: list[str] = flag(
        [],
        "text to prepare: files (.txt .jsonl .json .csv .tsv .parquet, source code, Markdown, each"
        " also .gz .zst .bz2 .xz), folders, globs, save_to_disk folders, names of datasets of the"
        " Hub; PATH:0.7 gives a weight by tokens",
        "--input",
        metavar="PATH[:WEIGHT]",
    )
    output_dir: str = flag(
        "", "folder of the prepared dataset; must be new, empty or the same dataset"
    )
    validation_path: list[str] = flag(
        [], "text that is held out for evaluation, instead of a share of the documents"
    )
    validation_fraction: float = flag(
        0.05, "share of the documents that is held out for evaluation"
    )
    document_separator: str | None = flag(
        None,
        "what ends a document of a text file; \\n\\n: blank lines; escapes like \\n are understood"
        " (default: blank lines, and in source code and Markdown the end of the file)",
    )
    one_document_per_file: bool = flag(
        False, "a text file is one document, whatever lines it holds"
    )
    text_column: str = flag(
        "text",
        "column or key that holds the text of a row; meta.text: inside an object; title,body: both,"
        " joined by a blank line",
        "--text_column_name",
    )
    csv_delimiter: str | None = flag(
        None,
        "what divides the fields of .csv and .tsv, such as ';' (default: of .csv what its first row"
        " shows, of .tsv a tab, without quotes)",
    )
    dataset_config: str | None = flag(
        None, "configuration of a dataset of the Hub", "--dataset_config_name"
    )
    dataset_split: str = flag("train", "split of a dataset of the Hub or of a save_to_disk folder")
    skip_bad_rows: bool = flag(
        False, "count and report rows that cannot be read instead of ending at the first"
    )
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not UTF-8: refuse them, or replace each by U+FFFD"
    )
    seed: int = flag(0, "chooses the documents that are held out")

    def check(self, problems: Problems) -> None:
        problems.require(
            0 <= self.validation_fraction < 1,
            f"--validation-fraction is {self.validation_fraction}",
            "use a share from 0 to below 1",
        )
        problems.require(
            self.document_separator != "",
            "--document-separator is empty",
            "give the text that ends a document",
        )
        problems.require(
            all(self.text_column.split(",")),
            f"--text-column {self.text_column!r} names a column without a name",
            "give the names of columns with commas between them, as in title,body",
        )
        delimiter = self.delimiter()
        problems.require(
            delimiter is None or (len(delimiter) == 1 and delimiter in CAN_DELIMIT),
            f"--csv-delimiter is {self.csv_delimiter!r}",
            "give one ASCII character that ends no quotes and no line, or \\t for a tab",
        )
        problems.require(
            abs(self.seed) < 2**63, f"--seed is {self.seed}", "use a number of at most 63 bits"
        )
        try:
            self.separator().encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            problems.require(
                False,
                f"--document-separator {self.document_separator!r}: {error.reason}",
                "write \\\\ for a backslash",
            )

    def delimiter(self) -> str | None:
        """What divides the fields of CSV, if that is asked for; a tab may be written \\t."""
        return {"\\t": "\t", "tab": "\t"}.get(self.csv_delimiter or "", self.csv_delimiter)

    def separator(self) -> str:
        """The document separator with its escapes resolved."""
        # unicode_escape reads Latin-1; everything beyond it is first written as an escape itself.
        if self.document_separator is None:
            return BLANK_LINES
        latin = self.document_separator.encode("latin-1", "backslashreplace")
        return latin.decode("unicode_escape")


@dataclass
class DocumentOptions(Options):
    """Which documents of the text are left out."""

    heading = "documents that are left out"
    COMMON = ["deduplicate"]

    deduplicate: Literal["none", "exact", "near"] = flag(
        "none",
        "leave out, and count, documents that are there already: the same text but for white space"
        " and Unicode's composition (exact), or about 0.8 of the runs of five words in common"
        " (near); the first is kept, and what is held out rather than what is to train on",
    )
    min_document_tokens: int | None = flag(
        None, "documents of fewer tokens (without their end) are left out and counted"
    )
    max_document_tokens: int | None = flag(
        None, "documents of more tokens are left out and counted; they are not cut"
    )

    def check(self, problems: Problems) -> None:
        least, most = self.min_document_tokens, self.max_document_tokens
        require_at_least(1, self, problems, "min_document_tokens", "max_document_tokens")
        problems.require(
            least is None or most is None or least <= most,
            f"--min-document-tokens {least} is above --max-document-tokens {most}, which leaves out"
            " every document",
            "give a smaller --min-document-tokens or a larger --max-document-tokens",
        )


@dataclass
class TokenizerOptions(Options):
    """The tokenizer, loaded or trained."""

    heading = "tokenizer"
    COMMON = ["tokenizer", "vocab_size"]

    tokenizer: str | None = flag(
        None, "tokenizer: a folder or a name of the Hub; without it one is trained on the text"
    )
    eos_token: str | None = flag(
        None, "what ends a document, for a tokenizer that does not say it; added if it is new"
    )
    vocab_size: int = flag(8192, "entries of a tokenizer that is trained here")
    tokenizer_backend: Literal["auto", "fast", "reference"] = flag(
        "auto", "encode by gigatoken where it answers as the tokenizer does (auto), always or never"
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that comes with a tokenizer of the Hub"
    )

    def check(self, problems: Problems) -> None:
        problems.require(
            257 <= self.vocab_size <= MOST_WORDS,
            f"--vocab-size is {self.vocab_size}",
            f"use 257 (256 bytes and EOS) or more, up to {MOST_WORDS}",
        )
        problems.require(
            self.eos_token != "",
            "--eos-token is empty",
            "give the text that ends a document, such as '<|endoftext|>'",
        )


@dataclass
class BlockOptions(Options):
    """What the prepared dataset is cut into, and the work on it."""

    heading = "blocks and the work on them"
    COMMON = ["sequence_length", "num_workers", "overwrite", "describe", "verify", "config"]

    sequence_length: int = flag(256, "tokens in a block", "--block_size")
    num_workers: int = flag(
        0,
        "threads that tokenize, or processes for a tokenizer written in Python; 0: one per core; "
        "any number gives the same bytes",
    )
    overwrite: bool = flag(False, "replace a dataset that the output directory already holds")
    describe: str | None = flag(
        None, "report what a prepared dataset holds, and stop", metavar="FOLDER"
    )
    verify: bool = flag(False, "with --describe: read every file and compare its checksum")
    config: str | None = flag(
        None, "recipe: a YAML file whose keys are these flags; the command line wins"
    )

    def check(self, problems: Problems) -> None:
        require_between((2, LONGEST_BLOCK), self, problems, "sequence_length")
        require_between((0, MOST_THREADS), self, problems, "num_workers")
        problems.require(
            bool(self.describe) or not self.verify,
            "--verify checks a prepared dataset, and none is given",
            "add --describe FOLDER",
        )

    def workers(self) -> int:
        """How many threads tokenize: as asked, or one per core that this process may use."""
        return self.num_workers or cores()


# A dataclass takes the fields of its last base first: so the text comes first, as in GROUPS.
@dataclass
class PrepareConfig(
    BlockOptions, TokenizerOptions, ConversationOptions, DocumentOptions, TextOptions
):
    """One preparation: which text, which tokenizer, which blocks."""

    GROUPS = [TextOptions, DocumentOptions, ConversationOptions, TokenizerOptions, BlockOptions]
    OTHER_NAMES = OF_PREPARATION

    def check_together(self, problems: Problems) -> None:
        problems.require(
            bool((self.dataset_path and all(self.dataset_path)) or self.describe),
            "no text given",
            "add --dataset-path FILE",
        )
        problems.require(
            all(self.validation_path),
            "--validation-path is empty",
            "give a file, or leave the flag out",
        )
        problems.require(
            bool(self.output_dir or self.describe),
            "no place for the result",
            "add --output-dir FOLDER",
        )
