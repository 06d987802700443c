"""Whether the rows of a preparation hold texts or conversations: their first ones show it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import csv_files, json_files, table_files
from p2p_llm_forge.data.columns import found_names
from p2p_llm_forge.data.conversations import IN_WORDS, form_of
from p2p_llm_forge.data.input_file import InputFile
from p2p_llm_forge.data.parts import Part, ReadOptions, Span
from p2p_llm_forge.errors import ForgeError

Columns = dict[str, bool]  # by name, whether it holds lists


def are_conversations(
    parts: list[Part], config: PrepareConfig, options: ReadOptions
) -> tuple[bool, list[str]]:
    """Whether all rows are read as conversations; and what is to be said of those that are not.

    Of each source the first file of a kind that has rows is looked at. Raises ForgeError where
    conversations are asked for and are not there, or are together with text.
    """
    found: dict[bool, str] = {}
    notes, seen = [], set()
    for part in parts:
        kind = part.source, part.is_validation, part.kind
        names = None if kind in seen else columns_of(part, options)
        if names is None:
            continue
        seen.add(kind)
        path = part.spans[0].path
        is_one = holds_conversations(names, path, config)
        found.setdefault(is_one, path)
        if not is_one and config.text_column in names and (form := form_of(names)):
            notes.append(
                f"{path}: rows have '{config.text_column}' and {_quoted(form)}: the text is read;"
                " with --train-on assistant, the conversations"
            )
    if len(found) == 2:
        raise ForgeError(
            f"{found[True]} holds conversations and {found[False]} holds text, which are not packed"
            " into one dataset",
            "prepare them apart, each into a folder of its own",
        )
    return True in found or (not found and config.asks_for_conversations), notes


def holds_conversations(names: Columns, path: str, config: PrepareConfig) -> bool:
    """Whether rows of these columns are conversations: asked for, or without the text to read."""
    column, form = config.text_column, form_of(names)
    is_usual = column == ReadOptions.text_column
    if names.get(column) is True:
        return True
    if not config.asks_for_conversations:
        return is_usual and column not in names and form is not None
    if form is None or not is_usual:
        has = f"found {found_names(names)}" if names else "it is text"
        given = "--chat-template" if config.chat_template else f"--train-on {config.train_on}"
        fix = f"give rows with {IN_WORDS}, or leave {given} out"
        if form:
            fix = "leave --text-column out"
        raise ForgeError(f"{path} holds no conversations: {has}", fix)
    return True


def columns_of(part: Part, options: ReadOptions) -> Columns | None:
    """The columns that the rows of a part have; none of a text. None: nobody knows."""
    span = part.spans[0]
    file = InputFile(Span(span.path, 0, span.end), replace(options, skip_bad_rows=True))
    if part.kind in ("json", "jsonl"):
        row = json_files.first_row(file, part.kind == "json")
        return {str(key): isinstance(row[key], list) for key in row} if row else None
    if part.kind == "csv":
        return dict.fromkeys(csv_files.header_of(file), False) or None
    if part.kind == "parquet":
        with contextlib.suppress(pa.ArrowException, OSError), file.seekable() as stream:
            return _of_schema(pq.ParquetFile(stream).schema_arrow)
        return None  # what is wrong is said where it is read
    if part.kind in ("saved", "hub"):
        rows = (table_files.open_saved if part.kind == "saved" else table_files.open_streamed)(file)
        # What is streamed is not begun twice: some datasets of the Hub show no columns before.
        return None if rows.features is None else _of_schema(rows.features.arrow_schema)
    return {}


def _of_schema(schema: Any) -> Columns:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return {field.name: any(is_kind(field.type) for is_kind in kinds) for field in schema}


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
