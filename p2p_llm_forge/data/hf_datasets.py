"""Datasets of Hugging Face: folders that `save_to_disk` wrote, and names of the Hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from p2p_llm_forge.data.parts import BadRows, Columns, ReadOptions, Span, first_line
from p2p_llm_forge.data.table_files import joined_by_size, require_column, texts
from p2p_llm_forge.errors import ForgeError


def saved(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """Rows of a folder that `save_to_disk` of datasets wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(span.path)
    except Exception as error:  # what datasets raises for damaged folders is not one class
        raise ForgeError(
            f"{span.path} cannot be read: {first_line(error)}",
            "save the dataset again with save_to_disk, or give another folder",
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if options.dataset_split not in saved:
            raise ForgeError(
                f"{span.path} has no split '{options.dataset_split}': found {', '.join(saved)}",
                "choose one with --dataset-split",
            )
        saved = saved[options.dataset_split]
    yield from _rows_of_dataset(saved, span, options, bad_rows)


def streamed(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """Rows of a dataset of the Hub, streamed."""
    import datasets

    try:
        stream = datasets.load_dataset(
            span.path, options.dataset_config, split=options.dataset_split, streaming=True
        )
    except Exception as error:  # the Hub, the network and the dataset fail in their own ways
        raise ForgeError(
            f"--dataset-path {span.path}: no such file, and no dataset of that name could be read "
            f"from the Hub ({first_line(error)})",
            "give a file, a folder or a glob that exists, or what the Hub has (--dataset-config, "
            "--dataset-split) and this machine can reach",
        ) from error
    yield from _rows_of_dataset(stream, span, options, bad_rows)


def _rows_of_dataset(rows: Any, span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    def columns() -> Iterator[pa.Array]:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            require_column(table.schema, span.path, options)
            yield from table.column(options.text_column).chunks

    documents = texts(columns(), span.path, options, bad_rows)
    for column in joined_by_size(documents, options.piece_bytes):
        yield column, 0
