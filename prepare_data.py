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

from p2p_llm_forge.config import PrepareConfig, parse
from p2p_llm_forge.errors import run_script
from p2p_llm_forge.peers import launch
from p2p_llm_forge.peers.parent import end_with_parent

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    from p2p_llm_forge.data.dataset import Manifest


def main(argv: list[str] | None = None) -> int:
    """Prepare, or describe, what the command line asks for."""
    config = parse(PrepareConfig, sys.argv[1:] if argv is None else argv, "prepare_data.py")
    if not config.describe:
        prepare(config, *launch.rank_and_world_size())
        return 0
    from p2p_llm_forge.data.describe import describe, verify

    folder = Path(config.describe)
    files = verify(folder) if config.verify else 0
    print(describe(folder, config.trust_remote_code))
    if files:
        print(f"all {files} files are as they were written")
    return 0


def prepare(config: PrepareConfig, rank: int = 0, world_size: int = 1) -> Manifest:
    """Prepare what `config` asks for and return its manifest, as data/prepare.py says."""
    from p2p_llm_forge.data import prepare as chapters
    from p2p_llm_forge.data.unfinished import Ranks

    return chapters.prepare(config, Ranks(rank, world_size))


if __name__ == "__main__":
    end_with_parent(launch.launcher_pid())
    run_script(main, launch.local_rank())
