"""Turn text into a prepared dataset: tokens in blocks of fixed length, ready for train.py.

python prepare_data.py --dataset-path corpus.txt --output-dir data/prepared/mine

The text is found and cut into pieces (data/sources.py), tokenized piece by piece, by several
threads and ranks (data/tokenizing.py), and packed into blocks (data/packing.py). What is done is
kept, so that a run that was killed resumes (data/pieces.py). The story is in data/prepare.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_llm_forge import config as configuration
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.ranks import Ranks
from p2p_llm_forge.errors import run_script
from p2p_llm_forge.peers import launch

if TYPE_CHECKING:
    from p2p_llm_forge.data.dataset import Manifest


def main(argv: list[str] | None = None) -> int:
    """Prepare, or describe, what the command line asks for."""
    config = configuration.parse(
        PrepareConfig, sys.argv[1:] if argv is None else argv, "prepare_data.py"
    )
    if config.describe:
        describe(Path(config.describe), config.verify)
    else:
        prepare(config, Ranks(*launch.rank_and_world_size()))
    return 0


def prepare(config: PrepareConfig, ranks: Ranks = Ranks()) -> Manifest:  # noqa: B008
    """Tokenize and pack the text into `config.output_dir`, unless it holds that dataset already.

    Returns the dataset's manifest. Raises ForgeError when the text, the tokenizer or the folder
    does not allow it; a dataset in the folder is then as it was.
    """
    from p2p_llm_forge.data.prepare import prepare as prepare_dataset

    return prepare_dataset(config, ranks)


def describe(folder: Path, verify: bool) -> None:
    """Print what a prepared dataset holds; verify: after reading every file of it."""
    from p2p_llm_forge.data import describe as inspection

    files = inspection.verify(folder) if verify else 0
    print(inspection.describe(folder))
    if files:
        print(f"all {files} files are as they were written")


if __name__ == "__main__":
    run_script(main, launch.local_rank())
