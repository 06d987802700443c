"""Reading a part: its pieces, by the reader of its format."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from p2p_llm_forge.data import hf_datasets, json_files, table_files, text_files
from p2p_llm_forge.data.columns import column_of, without_empty
from p2p_llm_forge.data.parts import BadRows, Columns, Part, Piece, ReadOptions, require_unchanged

READERS = {
    "text": text_files.compressed, "jsonl": json_files.compressed_lines,
    "json": json_files.values, "csv": table_files.csv, "parquet": table_files.parquet,
    "saved": hf_datasets.saved, "hub": hf_datasets.streamed,
}  # fmt: skip


def read_pieces(part: Part, options: ReadOptions) -> Iterator[Piece]:
    """The pieces of a part, the last one marked. There is at least one, perhaps empty.

    Raises ForgeError for what cannot be read (naming file and line or row) unless bad rows are
    skipped, and when a file changes meanwhile.
    """
    bad_rows = BadRows(options)
    for span in part.spans:
        require_unchanged(span)
    waiting: Piece | None = None
    for column, source_bytes in _columns(part, options, bad_rows):
        if waiting:
            yield waiting
        waiting = Piece(without_empty(column), source_bytes, bad_rows.take())
    for span in part.spans:
        require_unchanged(span)
    last = waiting or Piece(column_of([]), part.bytes)
    last.is_last = True
    last.skipped += bad_rows.take()
    yield last


def _columns(part: Part, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """The documents of a part as columns, each with the bytes of the file that it took."""
    if part.is_one_piece:
        read = text_files.plain if part.kind == "text" else json_files.plain_lines
        yield pa.concat_arrays([read(span, options, bad_rows) for span in part.spans]), part.bytes
    else:
        yield from READERS[part.kind](part.spans[0], options, bad_rows)
