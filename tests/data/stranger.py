"""A stranger's reader of rows: by csv, json, gzip, bz2, lzma and pyarrow, and nothing of ours.

python stranger.py FILE NAME[.NAME] ...    prints the text of every row as a JSON string
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys

import pyarrow.parquet

OPENED_BY = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
BETWEEN = {"csv": ",", "tsv": "\t"}


def rows_of(path: str, between: str | None = None) -> list[dict]:
    """The rows of a file; between: the fields of CSV."""
    *_, ending, last = path.split(".")
    ending = ending if last in OPENED_BY else last
    with OPENED_BY.get(last, open)(path, "rb") as file:
        content = file.read()
    if ending in BETWEEN:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        # IANA text/tab-separated-values knows no quotes.
        how = {"quoting": csv.QUOTE_NONE} if ending == "tsv" and not between else {"strict": True}
        return list(csv.DictReader(text, delimiter=between or BETWEEN[ending], **how))
    if ending == "parquet":
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    if ending == "json":
        return json.loads(content)
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def value(row: dict, name: str) -> object:
    """What a row has under a name, or inside an object of it; None for nothing."""
    if name in row:
        return row[name]
    for key in name.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def texts(path: str, names: list[str], between: str | None = None) -> list[str]:
    """The text of every row: what it has under the names, with a blank line between two."""
    found = [[value(row, name) for name in names] for row in rows_of(path, between)]
    return ["\n\n".join(part for part in parts if part) for parts in found]


if __name__ == "__main__":
    for text in texts(sys.argv[1], sys.argv[2:]):
        print(json.dumps(text))
