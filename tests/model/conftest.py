"""The text that models are fitted to; losses in small chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_llm_forge.model.fit import TextSpec


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a few words, saved."""
    from p2p_llm_forge.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Mara bakes bread", "Ines mends nets"] * 9, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tokenizer_dir: Path) -> TextSpec:
    """Blocks of 32 tokens, a vocabulary of 300."""
    return TextSpec(vocab_size=300, eos_token_id=1, sequence_length=32, tokenizer_dir=tokenizer_dir)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss takes 7 tokens at a time."""
    monkeypatch.setattr("p2p_llm_forge.model.loss.chunk_tokens", lambda *_: 7)
