"""What is to be read: files of many formats, folders, globs, names of the Hub; cut into parts."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2p_llm_forge.data.parts import (
    BYTE_ORDER_MARK,
    FORMATS,
    BadRows,
    Part,
    ReadOptions,
    Span,
    compression_of,
    first_line,
    format_of,
    suffix_of,
)
from p2p_llm_forge.data.text_files import separator_pattern
from p2p_llm_forge.errors import ForgeError

NO_TEXT = {".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".arrow", ".pdf", ".docx", ".bin"}
WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Found:
    """All parts of the sources in their order, and each source's weight (empty: no mixture)."""

    parts: list[Part] = field(default_factory=list)
    weights: tuple[float, ...] = ()
    unreadable: int = 0


def find(paths: list[str], options: ReadOptions, validation: bool = False) -> Found:
    """The parts of all `paths`: files, folders, globs, names of the Hub, each perhaps `:weight`.

    Raises ForgeError, naming the path, for what is not there or not text.
    """
    weighted = [split_weight(path) for path in paths]
    weights = tuple(weight for _, weight in weighted if weight is not None)
    if weights and len(weights) != len(paths):
        without = next(path for path, weight in weighted if weight is None)
        raise ForgeError(
            f"--dataset-path {without} has no weight and others have",
            f"give every path one, as in {without}:0.5, or none",
        )
    if weights and min(weights) <= 0:
        raise ForgeError(f"--dataset-path has a weight of {min(weights):g}", "give weights above 0")
    bad_files = BadRows(options)
    parts: list[Part] = []
    for source, (path, _) in enumerate(weighted):
        part = partial(Part, source=source, is_validation=validation)
        parts += _parts_of(path, part, options, bad_files)
    total = sum(weights)
    return Found(parts, tuple(weight / total for weight in weights), bad_files.count)


def split_weight(path: str) -> tuple[str, float | None]:
    """`a.jsonl:0.7` as path and weight; a path that exists as it is written has none."""
    match = WEIGHTED.fullmatch(path)
    if not match or Path(path).exists():
        return path, None
    return match["path"], float(match["weight"])


def _parts_of(
    path: str, part: partial[Part], options: ReadOptions, bad_files: BadRows
) -> list[Part]:
    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return [part("saved", (Span(path, 0, 0),))]
        files = _files_below(Path(path))
        if not files:
            raise ForgeError(
                f"--dataset-path {path} is a folder without text: found none of "
                f"{', '.join(sorted(FORMATS))} (.gz, .zst)",
                f"for files of other names give a glob, as in '{path}/*.md'",
            )
    elif Path(path).exists():
        files = [Path(path)]
    elif glob.has_magic(path):
        files = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ForgeError(
                f"--dataset-path {path}: no file matches this pattern",
                "give a pattern that matches a file; ** stands for any folders",
            )
    elif _may_be_on_the_hub(path):
        return [part("hub", (Span(path, 0, 0),))]
    else:
        raise ForgeError(f"--dataset-path {path}: no such file", "give a file, a folder or a glob")
    spans = _spans_of_files(files, options, bad_files)
    return list(_grouped(spans, part, options.piece_bytes))


def _files_below(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if format_of(path)]


def _may_be_on_the_hub(path: str) -> bool:
    name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)
    return bool(name) and not format_of(Path(path)) and suffix_of(Path(path)) not in NO_TEXT


# --- cutting files --------------------------------------------------------------------------------


def _spans_of_files(
    files: list[Path], options: ReadOptions, bad_files: BadRows
) -> Iterator[tuple[str, Span]]:
    """Every file as (kind, span), large ones of some formats as several."""
    for path in files:
        if suffix_of(path) in NO_TEXT:
            raise ForgeError(
                f"--dataset-path {path}: {suffix_of(path)} is not text that can be read here",
                f"give {', '.join(sorted(FORMATS))}, each perhaps .gz or .zst",
            )
        try:
            yield from _spans_of_file(path, options)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            bad_files.add(f"{path} cannot be read: {reason}", "replace it by a readable file")


def _spans_of_file(path: Path, options: ReadOptions) -> Iterator[tuple[str, Span]]:
    stat = path.stat()
    if not stat.st_size:
        return
    with path.open("rb") as file:
        cuts = list(_cuts_of(file, path, stat.st_size, options))
    for kind, start, end in cuts:
        portion = stat.st_size // len(cuts) if kind == "parquet" else end - start
        yield kind, Span(str(path), start, end, portion, stat.st_size, stat.st_mtime_ns)


def _cuts_of(
    file: Any, path: Path, size: int, options: ReadOptions
) -> Iterator[tuple[str, int, int]]:
    kind = format_of(path) or "text"
    if compression_of(path):
        yield kind, 0, size
        return
    if kind == "json":
        first = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
        kind = "json" if first == b"[" else "jsonl"
    if kind == "parquet":
        for group in range(pq.ParquetFile(file).num_row_groups):
            yield kind, group, group + 1
    elif kind == "jsonl" or (kind == "text" and not options.one_document_per_file):
        pattern = separator_pattern("\n" if kind == "jsonl" else options.separator)
        yield from ((kind, *ends) for ends in _ranges(file, size, pattern, options.piece_bytes))
    else:
        yield kind, 0, size


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
        if found and (found.end() < len(text) or place + len(text) >= size):
            return place + found.end()
        if place + len(text) >= size or not text:
            return size
        window *= 4


def _grouped(
    spans: Iterable[tuple[str, Span]], part: partial[Part], piece_bytes: int
) -> Iterator[Part]:
    """Parts of the spans; small neighbours of one kind are one part, for there may be millions."""
    group: list[Span] = []
    group_kind, group_bytes = "", 0
    for kind, span in spans:
        alone = kind not in ("text", "jsonl") or bool(compression_of(span.path))
        is_full = group_bytes + span.bytes > piece_bytes
        if group and (alone or kind != group_kind or is_full):
            yield part(group_kind, tuple(group))
            group, group_bytes = [], 0
        if alone:
            yield part(kind, (span,))
        else:
            group.append(span)
            group_kind, group_bytes = kind, group_bytes + span.bytes
    if group:
        yield part(group_kind, tuple(group))
