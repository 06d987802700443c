"""What is to be read: files of many formats, folders, globs, names of the Hub; cut into parts."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2p_llm_forge.data import folders, hub, json_files
from p2p_llm_forge.data.formats import (
    NO_TEXT,
    ONE_DOCUMENT,
    SHORT_LIST,
    compression_of,
    format_of,
    suffix_of,
)
from p2p_llm_forge.data.input_file import InputFile, first_line
from p2p_llm_forge.data.parts import Part, ReadOptions, Span
from p2p_llm_forge.data.text_files import separator_pattern
from p2p_llm_forge.errors import ForgeError

WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")
HIDDEN = "hidden"  # among the suffixes of files that are left out


@dataclass(frozen=True)
class Found:
    """All parts of the sources in their order, and each source's weight (empty: no mixture).

    left_out: how many files of folders are no text by their names, by suffix; left_out_folders:
    hidden ones, and those of datasets.
    """

    parts: list[Part] = field(default_factory=list)
    weights: tuple[float, ...] = ()
    unreadable: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    left_out_folders: list[Path] = field(default_factory=list)


def find(
    paths: list[str],
    options: ReadOptions,
    validation: bool = False,
    output_dir: Path | None = None,
) -> Found:
    """The parts of all `paths`: files, folders, globs, names of the Hub, each perhaps `:weight`.

    output_dir: where the dataset is to be written; nothing is read from there. Raises ForgeError,
    naming the path, for what is not there or not text.
    """
    flag = "--validation-path" if validation else "--dataset-path"
    weighted = [split_weight(path) for path in paths]
    for path in paths:
        _require_good_weight(path, flag, validation)
    weights = tuple(weight for _, weight in weighted if weight is not None)
    if weights and len(weights) != len(paths):
        without = next(path for path, weight in weighted if weight is None)
        raise ForgeError(
            f"{flag} {without} has no weight and others have",
            f"give every path one, as in {without}:0.5, or none",
        )
    parts: list[Part] = []
    unreadable, left_out = 0, Counter[str]()
    left_out_folders: list[Path] = []
    for source, (path, _) in enumerate(weighted):
        part = partial(Part, source=source, is_validation=validation)
        if dataset := _dataset(path, flag):
            kind, name = dataset
            parts.append(part(kind, (Span(name, 0, 0),)))
            continue
        spans: list[tuple[str, Span]] = []
        files, not_read = _files_of(path, flag, left_out, output_dir)
        left_out_folders += not_read
        for file in files:
            try:
                spans += _spans_of(file, options, flag)
            except (OSError, pa.ArrowException) as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                bad = InputFile(Span(str(file), 0, 0), options)
                bad.skip(f"{file} cannot be read: {reason}", "replace it by a readable file")
                unreadable += 1
        parts += _grouped(spans, part, options.piece_bytes)
    return Found(parts, shares_of(weights), unreadable, left_out, left_out_folders)


def shares_of(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights as parts of 1; the same for 1:2, 1.0:2.0 and 0.1:0.2, for decimals are exact."""
    exact = [Fraction(repr(weight)) for weight in weights]
    return tuple(float(weight / sum(exact)) for weight in exact)


def split_weight(path: str) -> tuple[str, float | None]:
    """`a.jsonl:0.7` as path and weight; a path that exists as it is written has none."""
    match = WEIGHTED.fullmatch(path)
    if not match or Path(path).exists():
        return path, None
    return match["path"], float(match["weight"])


def _require_good_weight(path: str, flag: str, validation: bool) -> None:
    """Raise ForgeError if what ends a path is meant as a weight, and is none or has no use."""
    name, _, end = path.rpartition(":")
    if not name or Path(path).exists() or not (_is_number(end) or Path(name).exists()):
        return
    if validation:
        raise ForgeError(
            f"{flag} {path} has a weight, and only what is to train on is mixed by weights",
            f"give {name}, for weights are of --dataset-path",
        )
    if not WEIGHTED.fullmatch(path) or not float(end):
        raise ForgeError(
            f"{flag} {path}: {end!r} is no weight",
            f"a weight is a decimal number above 0, as in {name}:0.5",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _dataset(path: str, flag: str) -> tuple[str, str] | None:
    """A dataset of Hugging Face as its kind (`saved` by save_to_disk, or of the `hub`) and its
    name; None for files of text, which may not be there."""
    if any((Path(path) / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        return "saved", path
    name = None if glob.has_magic(path) else hub.name_on_hub(path, flag)
    return ("hub", name) if name else None


def _files_of(
    path: str, flag: str, left_out: Counter[str], output_dir: Path | None
) -> tuple[list[Path], list[Path]]:
    """The files of a path, and the folders that are left out."""
    left_out_folders: list[Path] = []
    if Path(path).is_dir():
        there, left_out_folders = folders.files_below(Path(path), output_dir)
        hidden = [file for file in there if file.name.startswith(".")]
        there = [file for file in there if not file.name.startswith(".")]
        files = [file for file in there if format_of(file)]
        left_out.update(suffix_of(file) for file in there if not format_of(file))
        left_out.update(HIDDEN for _ in hidden)
        found = f" is a folder without text: found none of {SHORT_LIST} (.gz, .zst, .bz2, .xz)"
        fix = f"for files of other names give a glob, as in '{path}/*.log'"
    elif glob.has_magic(path) and not Path(path).exists():
        files, left_out_folders = folders.files_matching(path, output_dir)
        found = ": no file matches this pattern"
        fix = "give a pattern that matches a file; ** stands for any folders"
    elif Path(path).exists():
        return [Path(path)], []
    else:
        raise hub.not_here(flag, path)
    files = [file for file in files if file.is_file()]
    if not files:
        raise ForgeError(f"{flag} {path}{found}{_besides(left_out_folders)}", fix)
    return files, left_out_folders


def _besides(left_out_folders: list[Path]) -> str:
    if not left_out_folders:
        return ""
    return f", besides {folders.in_words(left_out_folders)}"


# --- cutting files --------------------------------------------------------------------------------


def _spans_of(path: Path, options: ReadOptions, flag: str) -> list[tuple[str, Span]]:
    """A file as (kind, span), a large one of some formats as several."""
    if suffix_of(path) in NO_TEXT:
        raise ForgeError(
            f"{flag} {path}: {suffix_of(path)} is not text that can be read here",
            f"give {SHORT_LIST}, each perhaps .gz, .zst, .bz2 or .xz",
        )
    stat = path.stat()
    if not stat.st_size:
        return []
    with path.open("rb") as file:
        kind, cuts = _cuts_of(file, path, stat.st_size, options)
    spans = []
    for start, end in cuts:
        size = stat.st_size // len(cuts) if kind == "parquet" else end - start
        span = Span(str(path), start, end, size, stat.st_size, stat.st_mtime_ns)
        spans.append((kind, span))
    return spans


def _cuts_of(
    file: Any, path: Path, size: int, options: ReadOptions
) -> tuple[str, list[tuple[int, int]]]:
    """The kind of a file, and the ranges of bytes or row groups that are read by themselves."""
    kind = format_of(path) or "text"
    if kind == "text" or kind in ONE_DOCUMENT:
        if options.one_document_per_file:
            kind = "document"
        elif not options.whole_sources:
            kind = "text"
    if kind in ("json", "jsonl"):
        found = InputFile(Span(str(path), 0, 0), options)
        kind = "json" if json_files.is_stream_of_values(found) else "jsonl"
    if compression_of(path):
        return kind, [(0, size)]
    if kind == "parquet":
        groups = range(pq.ParquetFile(file).num_row_groups)
        return kind, [(group, group + 1) for group in groups]
    if kind in ("json", "csv", *ONE_DOCUMENT):
        return kind, [(0, size)]
    separator = "\n" if kind == "jsonl" else options.separator
    return kind, _ranges(file, size, separator_pattern(separator), options.piece_bytes)


def _ranges(
    file: Any, size: int, pattern: re.Pattern[bytes], piece_bytes: int
) -> list[tuple[int, int]]:
    """Cut a file into ranges of about `piece_bytes` after matches of `pattern`, reading only there.

    The cuts depend on the file, the pattern and `piece_bytes` alone.
    """
    cuts = [0]
    for place in range(piece_bytes, size, piece_bytes):
        if place > cuts[-1]:
            cuts.append(_end_of_document(file, place, size, pattern))
    if cuts[-1] < size:
        cuts.append(size)
    return list(zip(cuts, cuts[1:], strict=False))


def _end_of_document(file: Any, place: int, size: int, pattern: re.Pattern[bytes]) -> int:
    """The byte after the first match at or after `place`, or the end of the file."""
    window = 64 << 10
    while True:
        file.seek(place)
        text = file.read(window)
        found = pattern.search(text)
        # A separator that touches the end of the window may continue behind it.
        is_end = not text or place + len(text) >= size
        if found and (found.end() < len(text) or is_end):
            return place + found.end()
        if is_end:
            return size
        window *= 4


def _grouped(
    spans: list[tuple[str, Span]], part: partial[Part], piece_bytes: int
) -> Iterator[Part]:
    """Parts of the spans; small neighbours of one kind are one part, for there may be millions."""
    groups: list[tuple[str, list[Span]]] = []
    bytes_left = -1  # in the last group
    for kind, span in spans:
        can_grow = Part(kind, (span,)).is_one_piece
        if can_grow and span.bytes <= bytes_left and kind == groups[-1][0]:
            groups[-1][1].append(span)
            bytes_left -= span.bytes
        else:
            groups.append((kind, [span]))
            bytes_left = piece_bytes - span.bytes if can_grow else -1
    return (part(kind, tuple(group)) for kind, group in groups)
