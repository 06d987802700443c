"""How the text became documents, in words: "3 files, 3 documents, one each: source code"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from p2p_llm_forge.config.prepare import BLANK_LINES
from p2p_llm_forge.data.formats import ONE_DOCUMENT
from p2p_llm_forge.data.parts import Part, ReadOptions
from p2p_llm_forge.data.pieces import PieceId, Pieces
from p2p_llm_forge.errors import counted

MOST_SUFFIXES = 8  # in a message


def ways(parts: list[Part], options: ReadOptions) -> list[str]:
    """How documents are divided, each way once: what decides that besides the text."""
    return list(dict.fromkeys(_way(part.kind, options).strip(", ") for part in parts))


def _way(kind: str, options: ReadOptions) -> str:
    if kind in ONE_DOCUMENT:
        return f", {ONE_DOCUMENT[kind]}"
    if kind != "text":
        return ", one in each row"
    where = "blank lines" if options.separator == BLANK_LINES else repr(options.separator)
    return f" divided at {where}"


def documents_of(pieces: Pieces, part: int) -> int:
    """How many documents the pieces of a part hold, all of which are done."""
    documents, place = 0, 0
    while record := pieces.record(PieceId(part, place)):
        counts = [*record.splits.values(), *record.left_out.values()]
        documents += sum(of_split.documents for of_split in counts)
        place += 1
        if record.is_last:
            break
    return documents


def summary(parts: list[Part], options: ReadOptions, documents: Callable[[int], int]) -> str:
    """Files and documents by the way in which they were divided. documents: of a part's number."""
    files: dict[tuple[str, str], set[str]] = {}
    found: Counter[tuple[str, str]] = Counter()
    kind = "conversation" if options.train_on else "document"
    for number, part in enumerate(parts):
        what = "dataset" if part.kind in ("saved", "hub") else "file"
        key = (what, _way(part.kind, options))
        files.setdefault(key, set()).update(span.path for span in part.spans)
        found[key] += documents(number)
    return "; ".join(
        f"{counted(len(paths), what)}, {counted(found[what, way], kind)}{way}"
        for (what, way), paths in files.items()
    )


def left_out(suffixes: Counter[str]) -> str:
    """The files of folders that are no text by their names, by suffix."""
    several = suffixes.most_common(MOST_SUFFIXES)
    kinds = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in several]
    others = sum(suffixes.values()) - sum(count for _, count in several)
    kinds += [f"{others:,} others"] if others else []
    files = counted(sum(suffixes.values()), "file")
    return f"left out {files}, no text by their names: {', '.join(kinds)}"
