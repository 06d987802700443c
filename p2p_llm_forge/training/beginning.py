"""What a run begins from: the newest checkpoint that is whole among the peers.

Its files may lie on several machines. Every rank that keeps a folder fetches what it lacks into its
own --output-dir before anything else reads that. Of a shared folder, rank 0 answers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import Lock, fingerprint
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import Keepers, keep, on_keepers
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.shapes import is_count, is_flag, is_path_inside, require_shape
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.checkpoint import LONGEST_LINE
from p2p_llm_forge.training.fetched_checkpoint import Delivery, deliver
from p2p_llm_forge.training.fetched_record import adopt_record, fetch_figures
from p2p_llm_forge.training.identity import LOCK
from p2p_llm_forge.training.job import refuse_before_data
from p2p_llm_forge.training.manifest import (
    MANIFEST,
    MANIFEST_SHAPE,
    checkpoint_dir,
    damage,
    differences,
    is_digest,
    is_whole,
    no_checkpoints,
    read_manifest,
    read_state,
    steps_saved,
    unusable,
)
from p2p_llm_forge.training.precision import precision_begun
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.settle import begun_in, settle
from p2p_llm_forge.training.snapshot import SEEN_WITHIN_S
from p2p_llm_forge.training.starts import agreed_history, agreed_start

AUTO, NOTHING, FOLDER = "auto", "nothing", "folder"  # what may be resumed


class Beginning:
    """Where this rank finds what its run begins from.

    config: with what --resume has come to on this rank. checkpoint: verified; None to begin from
    scratch. is_agreed: whether the peers have settled it; else it is to be looked for.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.checkpoint: Path | None = None
        self.is_agreed = False

    def agree(self, cluster: Cluster) -> str | None:
        """Settle it with the peers, and fetch what this rank lacks. All ranks must call.

        Whether anything is resumed is the word of rank 0, in every mode. Returns the precision that
        the run was computed in; None where that is not known. Raises ForgeError on all ranks where
        folders do not belong together, or lack what nobody has.
        """
        own = asked_for(self.config.resume)
        asked = [fact["asked"] for fact in cluster.gather_facts({"asked": own})]
        if asked[0] == NOTHING:
            self.config = replace(self.config, resume=None)
        elif asked[0] == AUTO or own == NOTHING:
            self.config = replace(self.config, resume=AUTO)
        if cluster.is_main:
            print_not_resumed(asked)
        if cluster.world_size > 1 and begins_from_a_checkpoint(self.config):
            output_dir = Path(self.config.output_dir)
            what = f"--output-dir {output_dir}"
            with keep(cluster, output_dir / LOCK, what) as (keepers, lock):
                agreement = Agreement(self.config, cluster, keepers, lock, asked[0] == AUTO)
                self.checkpoint = agreement.settle()
            self.is_agreed = True
            if asked[0] == FOLDER:
                self.config = replace(self.config, resume=str(self.checkpoint))
        return cluster.main_only(lambda: precision_begun(self.config))


def asked_for(resume: str | None) -> str:
    """What a rank has been asked to resume from."""
    if not resume:
        return NOTHING
    return AUTO if resume == "auto" else FOLDER


def print_not_resumed(asked: Sequence[str]) -> None:
    """Name the ranks that were to resume where rank 0, whose word counts, was not."""
    others = [str(rank) for rank, one in enumerate(asked) if one != NOTHING]
    if others and asked[0] == NOTHING:
        ranks = f"rank{'s' if len(others) > 1 else ''} {' and '.join(others)}"
        print(f"note      {ranks} got --resume, rank 0 did not: nothing is resumed", flush=True)


def begins_from_a_checkpoint(config: TrainConfig) -> bool:
    """Whether a run is to resume, and not only to be looked at."""
    return bool(config.resume) and not (config.overwrite or config.eval_only or config.dry_run)


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that some ranks have, perhaps not whole. digest: of what its manifest names."""

    step: int
    digest: str
    ranks: tuple[int, ...]


def candidates(saved: Sequence[Sequence[Sequence[Any]]]) -> list[Candidate]:
    """What may be resumed from, newest first. saved: by rank, steps and digests.

    Machines that went on without each other may have different ones of one step: that of rank 0
    comes first, else that of most ranks.
    """
    ranks: dict[tuple[int, str], list[int]] = {}
    for rank, of_rank in enumerate(saved):
        for step, digest in of_rank:
            ranks.setdefault((step, digest), []).append(rank)
    found = [Candidate(step, digest, tuple(having)) for (step, digest), having in ranks.items()]
    return sorted(found, key=lambda one: (-one.step, 0 not in one.ranks, -len(one.ranks), one))


def saved_in(folders: Sequence[Path]) -> dict[tuple[int, str], tuple[Path, dict[str, Any]]]:
    """The folders with a manifest of ours, by step and digest, and the files that it names."""
    found = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError):
            continue
        files = manifest["files"]
        found[manifest["step"], digest_of(manifest["step"], files)] = (folder, files)
    return found


def digest_of(step: int, files: dict[str, Any]) -> str:
    """The same for checkpoints of the same content, whatever else their manifests say."""
    named = {name: [facts["size"], facts["sha256"]] for name, facts in files.items()}
    return fingerprint([step, named])


# --- agreeing -------------------------------------------------------------------------------------


class Agreement:
    """The peers on their way to a checkpoint. All ranks call `settle`."""

    def __init__(
        self,
        config: TrainConfig,
        cluster: Cluster,
        keepers: Keepers,
        lock: Lock | None,
        is_auto: bool,
    ) -> None:
        self._config, self._cluster, self._keepers = config, cluster, keepers
        self._lock, self._is_auto = lock, is_auto
        self._output_dir = Path(config.output_dir)
        self._is_keeper = keepers.keeps(cluster.rank)
        self._saved = saved_in(self._folders())

    def _folders(self) -> list[Path]:
        """What this rank may have to offer."""
        if not self._is_auto and self._config.resume != AUTO:
            return [Path(str(self._config.resume))]
        if not self._is_keeper:
            return []
        return [checkpoint_dir(self._output_dir, one) for one in steps_saved(self._output_dir)]

    def settle(self) -> Path | None:
        """The checkpoint, whole and verified, where this rank reads it; None without one."""
        cluster, keepers = self._cluster, self._keepers
        started = agreed_start(cluster, keepers, self._output_dir)
        resumed = agreed_history(cluster, keepers, self._output_dir)
        on_keepers(cluster, keepers, lambda: refuse_another_run(self._config))
        run = RunRecord({}, frozenset(), started, resumed)
        adopt_record(cluster, keepers, self._config, run)
        name = "" if self._config.resume == AUTO else Path(str(self._config.resume)).name
        facts = cluster.gather_facts({"saved": [list(key) for key in self._saved], "asked": name})
        saved = [fact["saved"] for fact in facts]
        for rank, of_rank in enumerate(saved):
            with as_sent_by(f"rank {rank}"):
                require_saved(of_rank)
        found, step = None, -1
        asked = [rank for rank, fact in enumerate(facts) if fact["asked"] == facts[0]["asked"]]
        for candidate in self._may_be(candidates(saved), asked):
            if found := self._complete(candidate):
                step = candidate.step
                break
        self._print_skipped(step)
        if found is None and not self._is_auto:
            cluster.main_only(lambda: self._require_asked())
        if found:
            state = cluster.main_only(lambda: read_state(found))
            fetch_figures(self._config, cluster, keepers, state)
        return found

    def _may_be(self, there: list[Candidate], asked: list[int]) -> list[Candidate]:
        """The candidates that are tried: of a folder that was asked for, one.

        asked: the ranks that were asked for one of the name that rank 0 was. That of rank 0 counts;
        where it has none, that of another of them.
        """
        if self._is_auto:
            return there
        of_them = [one for one in there if set(one.ranks) & {*asked}]
        return sorted(of_them, key=lambda one: 0 not in one.ranks)[:1]

    def _require_asked(self) -> None:
        """Raise ForgeError, since the folder that --resume names is whole nowhere."""
        asked = str(self._config.resume)
        checkpoint.find(self._output_dir, asked)
        raise ForgeError(f"--resume {asked} cannot be brought to all", "use --resume auto")

    def _print_skipped(self, step: int) -> None:
        """Name, on rank 0, what is called like a newer checkpoint in its folder and is none."""
        if not (self._cluster.is_main and self._is_auto):
            return
        for path, reason in no_checkpoints(self._output_dir):
            self._skip(f"{path}: {reason}")
        known = {path for path, _ in self._saved.values()}
        for newer in (one for one in steps_saved(self._output_dir) if one > step):
            path = checkpoint_dir(self._output_dir, newer)
            if path not in known:
                self._skip(f"{path}: {damage(path) or 'it has changed meanwhile'}")

    def _skip(self, what: str) -> None:
        if self._cluster.is_main:
            print(in_one_line(f"skipped {what}", LONGEST_LINE), file=sys.stderr, flush=True)

    def _complete(self, candidate: Candidate) -> Path | None:
        """Where the candidate lies whole, on every rank, once who lacks it has fetched it; None
        where it cannot be whole."""
        cluster, rank = self._cluster, self._cluster.rank
        path, _ = here = self._saved.get((candidate.step, candidate.digest), (None, None))
        standing = self._standing(candidate, *here)
        for line in standing.wrong:
            self._skip(line)
        if not standing.is_whole_among_all or standing.is_useless:
            return None
        ready = [one for one in self._keepers.ranks if standing.is_ready(one, self._keepers)]
        wanting = tuple(one for one in self._keepers.ranks if one not in ready)
        deliver(
            Delivery(
                candidate.step, candidate.digest, standing.files, path, standing.holds, wanting
            ),
            self._config,
            cluster,
            self._lock,
        )
        if path is None or self._keepers.of[rank] in wanting:
            path = checkpoint_dir(self._output_dir, candidate.step)
        cluster.together(lambda: require_seen(path))
        if not standing.complete and (
            wrong := cluster.main_only(lambda: unusable(path, standing.files))
        ):
            self._skip(f"{path}: {wrong}")
            return None
        return path

    def _standing(
        self, candidate: Candidate, path: Path | None, files: dict[str, Any] | None
    ) -> Standing:
        """Who has what of a candidate. path, files: where this rank has it, and its manifest's."""
        good, why = self._look(path, files)
        sender = candidate.ranks[0]
        facts = self._cluster.gather_facts(
            {
                "files": files if self._cluster.rank == sender else None,
                "good": good,
                "why": why,
                "sees": path is not None and is_whole(path),
                "path": str(path),
            }
        )
        for rank, fact in enumerate(facts):
            with as_sent_by(f"rank {rank}"):
                require_shape(fact, {"good": (None, [str]), "why": (None, str), "sees": is_flag})
        known = files_of(candidate, facts[sender]["files"])
        holds = {
            rank: frozenset(facts[rank]["good"] or ()) & known.keys()
            for rank in self._keepers.ranks
        }
        return Standing(
            known,
            holds,
            [fact["why"] for fact in facts],
            [self._is_auto or fact["sees"] for fact in facts],
            [fact["path"] for fact in facts],
        )

    def _look(
        self, path: Path | None, files: dict[str, Any] | None
    ) -> tuple[list[str] | None, str | None]:
        """What of a checkpoint is good here, and what is wrong with it; only keepers look."""
        if path is None or files is None or not self._is_keeper:
            return None, None
        wrong = dict(differences(path, files))
        good = [name for name in files if name not in wrong]
        return good, next(iter(wrong.values()), None) or unusable(path, files)


@dataclass(frozen=True)
class Standing:
    """Who has what of a candidate. files: that its manifest names. By rank: which of them are good
    in the folder that it keeps; what is wrong with it there; whether it is seen; and where."""

    files: dict[str, Any]
    holds: dict[int, frozenset[str]]
    why: list[str | None]
    sees: list[bool]
    paths: list[str]

    @property
    def complete(self) -> list[int]:
        """The keepers that have all of it."""
        return [rank for rank, names in self.holds.items() if names >= self.files.keys()]

    @property
    def is_whole_among_all(self) -> bool:
        """Whether every file is good somewhere."""
        return frozenset().union(*self.holds.values()) >= self.files.keys()

    @property
    def is_useless(self) -> bool:
        """Whether it is whole, and was written with what nobody can resume from."""
        return any(self.why[rank] for rank in self.complete)

    @property
    def wrong(self) -> list[str]:
        """A line for each folder in which it is not what it should be."""
        fetched = "; what is good elsewhere is fetched"
        mended = fetched if self.is_whole_among_all and not self.is_useless else ""
        return [
            f"{f'rank {rank}: ' if rank else ''}{self.paths[rank]}: {why}{mended}"
            for rank, why in enumerate(self.why)
            if why
        ]

    def is_ready(self, keeper: int, keepers: Keepers) -> bool:
        """Whether all who see the folder of a keeper find it whole where they look."""
        return keeper in self.complete and all(self.sees[one] for one in keepers.sharing(keeper))


def refuse_another_run(config: TrainConfig) -> None:
    """Raise ForgeError if the folder here holds another run, as far as that is known before data
    and model are: nothing is fetched for a run that cannot be."""
    rate = config.learning_rate or 1.0  # it makes no run another one, and needs the model
    refuse_before_data(settle(replace(config, learning_rate=rate), begun_in(config)))


def require_saved(saved: Any) -> None:
    """Raise ValueError unless a rank has sent steps and digests."""
    require_shape(saved, [list])
    for pair in saved:
        if len(pair) != 2 or not is_count(pair[0]) or not is_digest(pair[1]):
            raise ValueError("no checkpoint")


def files_of(candidate: Candidate, sent: Any) -> dict[str, Any]:
    """What the manifest of a candidate names, as a rank has sent it. Raises ForgeError."""
    with as_sent_by(f"rank {candidate.ranks[0]}"):
        require_shape(sent, MANIFEST_SHAPE["files"])
        if not all(is_path_inside(name) and name != MANIFEST for name in sent):
            raise ValueError("names that are no files in a checkpoint")
        if digest_of(candidate.step, sent) != candidate.digest:
            raise ValueError("the files of another checkpoint")
    return dict(sent)


def require_seen(path: Path) -> None:
    """Raise ForgeError unless the checkpoint is seen, which on a network share may take a while."""
    if not wait_for(lambda: is_whole(path), SEEN_WITHIN_S):
        raise ForgeError(
            f"{path} is not seen, but another rank has written it into the folder that they share",
            "look whether the network share works, and start this again",
        )
