"""What a file gives when it is read, as preparing it would."""

from __future__ import annotations

from pathlib import Path

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import Piece, ReadOptions
from p2p_llm_forge.data.readers import read_pieces


def pieces(path: Path | str, **options) -> list[Piece]:
    """All pieces of a file, folder, glob or name. options: of ReadOptions."""
    asked = ReadOptions(**options)
    parts = sources.find([str(path)], asked).parts
    return [piece for part in parts for piece in read_pieces(part, asked)]


def documents(path: Path | str, **options) -> list[bytes]:
    """All documents of a file, piece after piece."""
    return [d for piece in pieces(path, **options) for d in piece.column.to_pylist()]
