"""Shared fixtures: a small prepared dataset, and real processes that are always ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.texts import write_text

# Unless a test sets another: exact comparisons must hold on CPUs with bf16 units, too.
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
for launcher_variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(launcher_variable, None)

sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What programs keep for later runs goes to a folder of these tests, not to the user's."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("HF_HOME", str(before / "huggingface"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 200 documents."""
    return write_text(tmp_path_factory.mktemp("text") / "corpus.txt", documents=200)


@pytest.fixture(scope="session")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a prepared dataset: blocks of 32 tokens, a vocabulary of 300."""
    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare
    from tests.runs import SEQUENCE_LENGTH

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(
        PrepareConfig(
            dataset_path=[str(text_file)],
            output_dir=str(folder),
            vocab_size=300,
            sequence_length=SEQUENCE_LENGTH,
            validation_fraction=0.1,
        )
    )
    return folder


@pytest.fixture(scope="session")
def conversations() -> dict[str, Any]:
    """Blocks of conversations in the vocabulary of `prepared`, by split."""
    from tests.conversations import some_blocks
    from tests.runs import SEQUENCE_LENGTH

    made = {"train": (90, 1), "validation": (30, 2)}
    return {
        name: some_blocks(count, SEQUENCE_LENGTH, 300, end=0, seed=seed)
        for name, (count, seed) in made.items()
    }


@pytest.fixture(scope="session")
def prepared_conversations(
    prepared: Path, conversations: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """They as a prepared dataset."""
    from tests.conversations import write_conversations

    folder = tmp_path_factory.mktemp("prepared") / "conversations"
    return write_conversations(folder, prepared, conversations)


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Any:
    """A short run with a small model on the prepared dataset."""
    from p2p_llm_forge.config import TrainConfig
    from tests.runs import TINY

    return TrainConfig(
        dataset_path=str(prepared),
        output_dir=str(tmp_path / "run"),
        **TINY,
        batch_size=8,
        max_steps=6,
        log_every=2,
        save_every=3,
        report_to="none",
        pictures=False,
        cpu_threads=1,
    )


@pytest.fixture(scope="session")
def one_zygote() -> Any:
    """One for all tests, because its imports cost seconds."""
    from tests.zygote import Zygote

    return Zygote()


@pytest.fixture
def zygote(one_zygote: Any) -> Iterator[Any]:
    """Forks runs of the scripts; those that still run when the test is over are ended."""
    yield one_zygote
    one_zygote.close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program of this environment in the project's folder; ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(*words: object, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        if process.poll() is None:
            # The launcher and its workers are one session of their own.
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def run(start: Start) -> Callable[..., tuple[int, str]]:
    """Start a program, wait for it, and return its status and what it printed."""

    def run_one(*words: object, environ: dict[str, str] | None = None) -> tuple[int, str]:
        process = start(*words, environ=environ)
        output, _ = process.communicate()
        return process.returncode, output

    return run_one
