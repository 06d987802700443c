"""What only one rank has of a checkpoint: written by that rank, collected by the main process.

In a folder that both see it is moved; else it travels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import parse_json, sha256_of
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileFacts
from p2p_llm_forge.peers.findings import as_sent_by, problems_of_peer
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.shapes import require_shape
from p2p_llm_forge.training import snapshot
from p2p_llm_forge.training.manifest import FILE_SHAPE


@dataclass(frozen=True)
class RankFile:
    """What a rank has written. facts: of a file that it offers, since rank 0 cannot see it."""

    name: str
    facts: FileFacts | None = None


class RankFiles:
    """The files of all ranks with a state of their own. All ranks make one."""

    def __init__(self, cluster: Cluster, keepers: Keepers, output_dir: Path) -> None:
        self._cluster, self._output_dir = cluster, output_dir
        self._is_seen = [keeper == 0 for keeper in keepers.of]  # by rank 0
        self._exchange = None if keepers.is_shared else cluster.open_files()
        self._offered: dict[str, Path] = {}

    def write(self, step: int, own: dict[str, torch.Tensor]) -> None:
        """Write that of this rank, and post where it is, whatever happens."""
        rank = self._cluster.rank
        answer: dict[str, Any] = {
            "failure": [f"rank {rank} could not write its file", f"see what rank {rank} printed"]
        }
        try:
            name = snapshot.write_rank_file(self._output_dir, rank, own)
            facts = None if self._is_seen[rank] else self._offer(step, name)
            answer = {"file": name, "facts": facts}
        except ForgeError as error:
            one = error.problems[0]
            answer = {"failure": [one.found, one.fix]}
        finally:  # the main process waits for the answer
            self._cluster.post(f"saved/{step}", json.dumps(answer))

    def _offer(self, step: int, name: str) -> dict[str, Any]:
        """Let the main process fetch a file of this rank. Raises ForgeError."""
        assert self._exchange is not None
        path, key = self._output_dir / name, key_of(step)
        self._offered[key] = path
        try:
            facts = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        except OSError as error:
            found = f"rank {self._cluster.rank} cannot read {path}: {error.strerror or error}"
            raise ForgeError(found, "check the disk of that machine") from error
        self._exchange.offer(key, self._output_dir, [name])
        return facts

    def collect(self, step: int, rank: int, saved: Path) -> None:
        """Bring the file of a rank into the checkpoint. Raises ForgeError."""
        written = file_in(self._cluster.wait_for(f"saved/{step}", rank), rank)
        if written.facts is None or self._is_seen[rank]:
            snapshot.collect_rank_file(self._output_dir, written.name, rank, saved)
            return
        assert self._exchange is not None
        files = {written.name: written.facts}
        self._exchange.fetch(files, {rank: key_of(step)}, saved, is_behind=True)
        (saved / written.name).rename(saved / snapshot.rank_file(rank))

    def collected(self) -> None:
        """The main process has what was written so far: this rank needs it no more."""
        while self._offered and self._exchange is not None:
            key, path = self._offered.popitem()
            self._exchange.withdraw(key)
            path.unlink(missing_ok=True)


def key_of(step: int) -> str:
    """Under which a rank offers its file of a checkpoint."""
    return f"rank-file/{step}"


def file_in(answer: str, rank: int) -> RankFile:
    """What a rank says to have written into the folder of the run.

    Raises ForgeError where it says that it could not, and for what no rank of ours says: a path to
    another file of this machine, for instance.
    """
    with as_sent_by(f"rank {rank}"):
        said = parse_json(answer)
        if not isinstance(said, dict) or not said.keys() & {"failure", "file"}:
            raise ValueError("neither a file nor a failure")
        if "failure" in said:
            texts = said["failure"] if isinstance(said["failure"], list) else []
            fields = dict(zip(("found", "fix"), texts, strict=False))
            raise ForgeError.of(problems_of_peer(f"rank {rank}", [{**fields, "where": ""}]))
        if not snapshot.is_name_of_rank_file(said["file"], rank):
            raise ValueError("not the name of its file")
        facts = said.get("facts")
        require_shape(facts, (None, FILE_SHAPE))
        return RankFile(said["file"], FileFacts(facts["size"], facts["sha256"]) if facts else None)
