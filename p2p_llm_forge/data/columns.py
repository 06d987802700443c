"""The text of a row: one of its columns, one inside an object of it, or several joined.

`meta.text` is the column of that very name, or else `text` inside `meta`. `title,body` is the
column of that very name, or else the two joined by a blank line, without what is null or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

JOINED_BY = "\n\n"
MOST_NAMES = 30  # of columns, in a message
MOST_DOTS = 6  # up to which every way to read them is tried: twice as many with each
DEEPEST = 50  # for pyarrow
MISSING = object()

Path = tuple[str, ...]  # names from a column to what is inside it


def names_of(text_column: str, known: Iterable[str] = ()) -> list[str]:
    """The columns that `--text-column` asks for; one that is called like all of it wins."""
    return [text_column] if text_column in known else text_column.split(",")


def found_names(names: Iterable[str]) -> str:
    """Names of columns for a message, some of very many."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "nothing") + more


@lru_cache
def paths_of(name: str) -> tuple[Path, ...]:
    """All that a name may mean, the longest names first: `a.b`, then `b` inside `a`."""
    places = [place for place, letter in enumerate(name) if letter == "."]
    if len(places) > MOST_DOTS:
        return (name,), tuple(name.split("."))
    inside = [
        (name[:place], *rest) for place in reversed(places) for rest in paths_of(name[place + 1 :])
    ]
    return ((name,), *inside)


# --- rows of JSON ---------------------------------------------------------------------------------


def value_in(row: Mapping[str, Any], name: str) -> Any:
    """What a row has under a name: the first that is not null; MISSING where it has nothing."""
    found: Any = MISSING
    for path in paths_of(name):
        value: Any = row
        for key in path:
            value = value.get(key, MISSING) if isinstance(value, Mapping) else MISSING
            if value is None or value is MISSING:
                break
        if value is not None and value is not MISSING:
            return value
        found = None if value is None else found
    return found


def text_in(row: Any, text_column: str) -> str:
    """The text of a row. Raises NoTextError."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise NoTextError(f" holds a {kind} where an object with '{text_column}' is expected")
    texts, is_there = [], False
    for name in names_of(text_column, row):
        value = value_in(row, name)
        is_there |= value is not MISSING
        if isinstance(value, str):
            texts.append(value)
        elif value is not None and value is not MISSING:
            raise NoTextError(f": '{name}' is {type(value).__name__}, expected a string")
    if texts:
        return JOINED_BY.join(filter(None, texts))
    if is_there:
        raise NoTextError(f": '{text_column}' is null, expected a string")
    found = found_names(names_in(row))
    fix = "choose another with --text-column"
    raise NoTextError(f" has no text column '{text_column}': found {found}", fix)


class NoTextError(Exception):
    """A row has no text. found: why, to follow its place."""

    def __init__(self, found: str, fix: str = "correct it") -> None:
        super().__init__(found)
        self.found, self.fix = found, fix


def names_in(row: Mapping[str, Any], depth: int = 3) -> Iterator[str]:
    """The names of a row's values, those inside its objects with dots."""
    for key, value in row.items():
        if isinstance(value, Mapping) and value and depth:
            yield from (f"{key}.{name}" for name in names_in(value, depth - 1))
        else:
            yield str(key)


# --- columns of Arrow -----------------------------------------------------------------------------


@lru_cache
def schema_of(text_column: str) -> pa.Schema | None:
    """Strings under all that `--text-column` may mean; None where one would be inside another, or
    very deep."""
    if text_column.count(".") > DEEPEST:
        return None
    tree: dict[str, Any] = {}
    for path in (path for name in all_names(text_column) for path in paths_of(name)):
        inside = tree
        for key in path[:-1]:
            if (inside := inside.setdefault(key, {})) is None:
                return None
        if inside.setdefault(path[-1]):
            return None
    return pa.schema(_fields(tree))


def all_names(text_column: str) -> list[str]:
    """All names that `--text-column` may mean: of one column, or of several."""
    return list(dict.fromkeys([text_column, *names_of(text_column)]))


def _fields(tree: dict[str, Any]) -> list[tuple[str, pa.DataType]]:
    return [
        (key, pa.large_string() if inside is None else pa.struct(_fields(inside)))
        for key, inside in tree.items()
    ]


def text_of_rows(table: pa.Table, text_column: str) -> pa.ChunkedArray | None:
    """The text of rows that were read by `schema_of`; null where a row has none. None where some
    row has a column that is called like several."""
    names = names_of(text_column)
    if len(names) > 1 and table.column(text_column).null_count < len(table):
        return None
    found = (pc.coalesce(*(inside(table, path) for path in paths_of(name))) for name in names)
    return joined(list(found))


def path_in(schema: pa.Schema | pa.StructType, name: str) -> Path | None:
    """Where a table has what a name asks for: the first path that leads to something."""
    return next((path for path in paths_of(name) if _leads_somewhere(schema, path)), None)


def _leads_somewhere(kind: Any, path: Path) -> bool:
    if not path:
        return True
    if not isinstance(kind, pa.Schema | pa.StructType) or path[0] not in kind.names:
        return False
    return _leads_somewhere(kind.field(path[0]).type, path[1:])


def inside(table: Any, path: Path) -> Any:
    """The column of a table (or batch) to which a path leads."""
    column = table.column(path[0])
    return pc.struct_field(column, list(path[1:])) if path[1:] else column


def leaves(fields: Iterable[pa.Field], depth: int = 3) -> Iterator[str]:
    """The names of a table's columns, those inside structs with dots."""
    for field in fields:
        if pa.types.is_struct(field.type) and depth:
            yield from (f"{field.name}.{name}" for name in leaves(field.type, depth - 1))
        else:
            yield field.name


def joined(columns: list[Any]) -> Any:
    """Columns of one type, of strings or bytes, as one: null where all are null."""
    if len(columns) == 1:
        return columns[0]
    kind = columns[0].type
    nothing, empty, between = (
        pa.scalar(text, pa.large_binary()).cast(kind) for text in (None, b"", JOINED_BY.encode())
    )
    texts = [pc.if_else(pc.greater(pc.binary_length(c), 0), c, nothing) for c in columns]
    # pyarrow 26 loses a row of which all that is to be joined is null and skipped.
    has_none = reduce(pc.and_, [pc.is_null(text) for text in texts])
    texts[0] = pc.if_else(has_none, empty, texts[0])
    text = pc.binary_join_element_wise(*texts, between, null_handling="skip")
    is_null = reduce(pc.and_, [pc.is_null(column) for column in columns])
    return pc.if_else(is_null, nothing, text)
