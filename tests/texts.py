"""Texts for tests: documents made up by a seed, files of every format, and what a dataset holds."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

WORDS = ["peers", "Blöcke", "ağ", "模型", "👩🏽\u200d🚀", "and", "<|endoftext|>", "don't", "3.14"]
ENDS = ["\n\n", "\n\n\n", "\r\n\r\n", ".\n\n"]
TEXTS = ["one", 'two\n\nparagraphs, with a "quote"', "üñî 模型 👩🏽\u200d🚀", "x" * 3000, "last"]


def some_text(count: int = 400, seed: int = 3) -> str:
    """Documents of many scripts, each beginning with its number, with blank lines after each."""
    chosen = random.Random(seed)
    return "".join(
        f"{number} "
        + " ".join(chosen.choices(WORDS, k=chosen.randint(1, 50)))
        + chosen.choice(ENDS)
        for number in range(count)
    )


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """Sentences of a small grammar, documents separated by blank lines."""
    draw = random.Random(seed)
    names, verbs = ["Mara", "Tobin", "Ines"], ["bakes", "mends", "reads"]
    things = ["bread", "nets"]
    texts = [
        " ".join(
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}"
            f" {draw.randint(0, 99)}."
            for _ in range(draw.randint(3, 30))
        )
        for _ in range(documents)
    ]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def compress(path: Path, content: bytes) -> Path:
    """Write a file, compressed as its name says."""
    if path.suffix in COMPRESS:
        content = COMPRESS[path.suffix](content)
    elif path.suffix == ".zst":
        stream = pa.BufferOutputStream()
        with pa.CompressedOutputStream(stream, "zstd") as out:
            out.write(content)
        content = stream.getvalue().to_pybytes()
    path.write_bytes(content)
    return path


def write_rows(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write the texts as rows, in the format of the file's name, with a column of numbers."""
    rows = [{"n": n, column: text} for n, text in enumerate(texts)]
    plain = path.with_suffix("") if path.suffix in (*COMPRESS, ".zst") else path
    if plain.suffix == ".parquet":
        table = pa.table({"n": range(len(texts)), column: texts})
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream, row_group_size=2)
        return compress(path, stream.getvalue().to_pybytes())
    if plain.suffix == ".tsv":  # without quotes, so no text with a line end or a tab fits in
        lines = [f"{row['n']}\t{row[column]}\n" for row in rows]
        return compress(path, "".join([f"n\t{column}\n", *lines]).encode())
    if plain.suffix == ".csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, ["n", column])
        writer.writeheader()
        writer.writerows(rows)
        return compress(path, lines.getvalue().encode())
    if plain.suffix == ".json":
        return compress(path, json.dumps(rows, indent=1).encode())
    return compress(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_manifest(folder: Path, content: dict) -> None:
    """Write the manifest of a dataset with its digest, that of the file while that is empty."""
    text = json.dumps(content | {"digest": ""}, indent=1)
    assert text.count('"digest": ""') == 1
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_bytes(
        text.replace('"digest": ""', f'"digest": "{digest}"').encode()
    )


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stream(folder: Path, split: str) -> list[int]:
    """All tokens of a split of a prepared dataset, as `datasets` reads it."""
    rows = datasets.load_from_disk(str(folder))[split]["input_ids"]
    return [token for row in rows for token in row]


def decoded_documents(folder: Path, split: str) -> list[str]:
    """The documents of a split, the last perhaps cut, by the tokenizer beside the dataset."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents: list[list[int]] = [[]]
    for token in stream(folder, split):
        if token == tokenizer.eos_token_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(document) for document in documents if document]
