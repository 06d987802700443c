"""Reading a part: its pieces, by the reader of its format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from p2p_llm_forge.data import csv_files, json_files, table_files, text_files
from p2p_llm_forge.data.columns import names_of
from p2p_llm_forge.data.formats import ONE_DOCUMENT
from p2p_llm_forge.data.input_file import Columns, InputFile
from p2p_llm_forge.data.parts import Part, Piece, ReadOptions, column_of, without_empty

PLAIN = {
    "text": text_files.plain, "jsonl": json_files.plain_lines,
    **dict.fromkeys(ONE_DOCUMENT, text_files.plain_document),
}  # fmt: skip
READERS = {
    "text": text_files.compressed, "jsonl": json_files.compressed_lines,
    **dict.fromkeys(ONE_DOCUMENT, text_files.compressed_document),
    "json": json_files.values, "csv": csv_files.rows, "parquet": table_files.parquet,
    "saved": table_files.saved, "hub": table_files.streamed,
}  # fmt: skip


def read_pieces(part: Part, options: ReadOptions) -> Iterator[Piece]:
    """The pieces of a part, the last one marked. There is at least one, perhaps empty.

    Raises ForgeError for what cannot be read (naming file and line or row) unless bad rows are
    skipped, and when a file changes meanwhile.
    """
    files = [InputFile(span, options) for span in part.spans]
    for file in files:
        file.require_unchanged()
    waiting: Piece | None = None
    for column, source_bytes in _columns(part, files):
        if waiting:
            yield waiting
        skipped = sum(file.take_skipped() for file in files)
        waiting = Piece(without_empty(column), source_bytes, skipped)
    for file in files:
        file.require_unchanged()
    last = waiting or Piece(column_of([]), part.bytes)
    last.is_last = True
    last.skipped += sum(file.take_skipped() for file in files)
    yield last


def _columns(part: Part, files: list[InputFile]) -> Columns:
    if part.is_one_piece:
        yield pa.concat_arrays([PLAIN[part.kind](file) for file in files]), part.bytes
    else:
        yield from READERS[part.kind](files[0])


def columns_not_seen(parts: list[Part], options: ReadOptions) -> Iterator[tuple[str, str]]:
    """Of several columns that are joined those that no row has at the beginning of a source of
    JSON lines, each with the file: perhaps misspelt, where a table would be refused."""
    names, sources = names_of(options.text_column), set()
    for part in parts if len(names) > 1 else []:
        source = (part.source, part.is_validation)
        if part.kind != "jsonl" or source in sources:
            continue
        sources.add(source)
        first = replace(part, spans=part.spans[:1])
        for name in names:
            alone = replace(options, text_column=name, skip_bad_rows=True)
            piece = next(read_pieces(first, alone))
            if piece.skipped and not len(piece.column):
                yield name, first.spans[0].path
