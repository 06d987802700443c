"""Data for a GPU's tests, which need no text and no tokenizer of a text."""

from __future__ import annotations

from pathlib import Path

import pytest

LENGTH = 64


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of random tokens: blocks of 64, a vocabulary of 300."""
    from benchmarks.generated_blocks import generate

    return generate(tmp_path_factory.mktemp("generated") / "data", 300, LENGTH, 200, held_out=16)


@pytest.fixture(scope="session")
def long_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in blocks of 1,024 tokens."""
    from benchmarks.generated_blocks import generate

    return generate(tmp_path_factory.mktemp("generated") / "long", 300, 1024, 40)
