"""Which formats files have, by their names: rows, text, source code, Markdown, and what is no text.

A text divided at blank lines is prose. In source code and Markdown a blank line ends nothing, so
each such file is one document, unless the user says what ends documents.
"""

from __future__ import annotations

from pathlib import Path

ROWS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
SOURCE_CODE = """
.ada .adb .ads .asm .awk .bash .bas .bat .c .cc .cjs .clj .cljs .cmake .coffee .cpp .cr .cs .css
.cu .cuh .cxx .d .dart .el .elm .erl .ex .exs .f .f03 .f90 .f95 .fish .for .fs .fsx .gd .glsl .go
.gradle .groovy .h .hh .hlsl .hpp .hrl .hs .hxx .java .jl .js .jsx .kt .kts .less .lisp .lua .m .mjs
.ml .mli .mm .nim .nix .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .s .sass .scala
.scm .scss .sh .sol .sql .sv .svelte .swift .tcl .tf .ts .tsx .v .vb .vhd .vhdl .vim .vue .wat .zig
.zsh
"""
MARKDOWN = ".adoc .markdown .md .mdx .mkd .org .qmd .rmd .rst .tex"
# By suffix. text: divided at blank lines; code and markdown: one document each.
FORMATS = {
    ".txt": "text",
    **ROWS,
    **dict.fromkeys(SOURCE_CODE.split(), "code"),
    **dict.fromkeys(MARKDOWN.split(), "markdown"),
}
SHORT_LIST = ".txt, .jsonl, .json, .csv, .tsv, .parquet, source code, Markdown"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# What cannot be read here, also where a user names it.
NO_TEXT = {".zip", ".tar", ".tgz", ".7z", ".rar", ".arrow", ".pdf", ".docx", ".bin"}
# How the text of a kind became documents: "3 files, 3 documents, one each: source code".
ONE_DOCUMENT = {
    "document": "one each",
    "code": "one each: source code",
    "markdown": "one each: Markdown and other markup",
}


def compression_of(path: str | Path) -> str | None:
    """The compression that a file's name shows, in pyarrow's words; "xz", which it lacks."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def suffix_of(path: str | Path) -> str:
    """The ending that shows the format: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    path = Path(path)
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


def format_of(path: str | Path) -> str | None:
    """The format that a file's name shows; None for an unknown ending."""
    return FORMATS.get(suffix_of(path))
