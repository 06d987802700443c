"""Rank 0's part in the copies of checkpoints on other machines: see copies.py."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import link, parse_json, sha256_of
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange
from p2p_llm_forge.peers.findings import as_sent_by, problems_of_peer
from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.shapes import require_shape
from p2p_llm_forge.training.copies import (
    ANSWER,
    BESIDE,
    Copies,
    Following,
    answer_of,
    request_to,
)
from p2p_llm_forge.training.copy_limits import Limits
from p2p_llm_forge.training.fetched_record import BESIDE as OF_RUN
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.manifest import read_manifest
from p2p_llm_forge.training.pruning import IN_USE
from p2p_llm_forge.training.run_folder import RunFolder

SILENCE_S = 3.0  # at the end, after which it is said what this waits for


@dataclass(frozen=True)
class Offered:
    """What others may fetch of a run after a checkpoint: its files, and those beside it."""

    step: int
    folder: Path  # second names of the files, which pruning leaves alone
    files: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(saved: Path) -> Offered:
        """What there is with the checkpoint `saved`. Raises OSError, ValueError."""
        manifest = read_manifest(saved)
        folder = saved.parent / f"tmp-copied-{manifest['step']}-{secrets.token_hex(4)}"
        offered = Offered(manifest["step"], folder, manifest["files"])
        IN_USE.add(folder)
        try:
            for name in offered.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                link(saved / name, folder / name)
            (folder / BESIDE).mkdir()
            for name in OF_RUN:
                offered._take_beside(saved.parent / name)
        except BaseException:
            offered.remove()
            raise
        return offered

    def _take_beside(self, file: Path) -> None:
        """Copy a file to which the run adds lines, up to the last whole one."""
        if file.is_symlink() or not file.is_file():
            return
        name, content = f"{BESIDE}/{file.name}", file.read_bytes()
        copied = self.folder / name
        copied.write_bytes(content[: content.rfind(b"\n") + 1])
        self.beside[name] = {"size": copied.stat().st_size, "sha256": sha256_of(copied)}

    @property
    def bytes(self) -> int:
        """Of the checkpoint."""
        return sum(int(facts["size"]) for facts in self.files.values())

    def remove(self) -> None:
        """Offer it no longer. May be called again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        IN_USE.discard(self.folder)


class Leading(Copies):
    """Rank 0's part: it asks one machine after the other to fetch, until a checkpoint is safe.

    The later ones fetch from the earlier ones as well. A machine that fails is asked last from then
    on. others: the ranks that keep the folders of the other machines. say: shows a line.
    """

    def __init__(
        self,
        cluster: Cluster,
        exchange: FileExchange,
        others: list[int],
        limits: Limits,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(cluster)
        self._exchange, self._others, self._limits, self._say = exchange, [*others], limits, say
        self._newest: Offered | None = None  # that was completed
        self._left: Offered | None = None  # for which there was no time
        self._safe_step: int | None = None
        self._said_of: int | None = None  # the step that was last said to be safe
        self._holders = [0]  # of the last one that was copied
        self._said: set[str] = set()

    def start(self, first_step: int) -> None:
        """The first update is about to be taken. A checkpoint that is resumed from lies on all."""
        self._limits.start(first_step)
        if first_step and 1 + len(self._others) >= self._limits.wanted:
            self._safe_step = first_step

    def begin(self, step: int) -> None:
        """A checkpoint after `step` updates is about to be written."""
        super().begin(step)
        self._limits.mark(step)

    def saved(self, step: int, saved: Path | None) -> None:
        """Let the others fetch it."""
        offered = None
        if saved is not None:
            try:
                self._newest = offered = Offered.of(saved)
            except (OSError, ValueError) as error:
                self._say_once(f"warning: checkpoint-{step} is not copied: {error}", "offer")
        number = self._round
        self._submit(lambda: self._lead(number, offered))

    def figures(self) -> dict[str, Any]:
        """The newest checkpoint that is safe."""
        return {} if self._safe_step is None else {"safe_step": self._safe_step}

    def finish(self) -> None:
        """Wait for the last copy; what there was no time for is tried again."""
        super().finish()
        number = self._round
        self._submit(lambda: self._lead(number, self._left, is_at_end=True))
        newest, wanted = self._newest, self._limits.wanted
        if newest is None:
            return
        if wait(self._tasks, SILENCE_S).not_done:
            self._say(f"copying   checkpoint-{newest.step} to another machine before this ends")
            wait(self._tasks)
        if newest.step == self._safe_step:
            self._say_safe(newest.step)
        elif not self._limits.is_by_default:
            found = f"checkpoint-{newest.step} lies on {len(self._holders)} of the {wanted}"
            self._say(f"warning: {found} machines that --replicate-checkpoints asks for")

    def close(self) -> None:
        """End what is under way."""
        super().close()
        for offered in filter(None, (self._newest, self._left)):
            offered.remove()

    def _lead(self, number: int, offered: Offered | None, is_at_end: bool = False) -> None:
        """One round; all who may be asked in it are, or hear that there is nothing to do."""
        asked: set[int] = set()
        is_done = True
        if self._left is not offered and self._left is not None:
            self._left.remove()
        self._left = None
        try:
            # Of those that came while one was copied, the newest alone is worth it.
            if offered is not None and offered is self._newest:
                is_done = self._copy(number, offered, asked, is_at_end)
        except (CancelledError, RankFailure):
            pass  # the run ends, and the main thread says why
        except Exception as error:
            self._say_once(f"warning: no copies of checkpoints: {error!r}; training continues", "")
        finally:
            if offered is not None and is_done:
                offered.remove()
            self._left = None if is_done else offered
            with contextlib.suppress(ForgeError):
                for rank in {*self._others} - asked:
                    self._cluster.post(request_to(rank, number), json.dumps(None))

    def _copy(self, number: int, offered: Offered, asked: set[int], is_at_end: bool) -> bool:
        """Ask for copies of a checkpoint, and note in `asked` whom.

        Returns whether nothing is left to try.
        """
        limits, key = self._limits, f"copies/{number}"
        if limits.is_too_large(offered.bytes):
            size = f"{offered.bytes / 1e9:,.1f} GB"
            allowed = "with --fetch yes, or with --replicate-checkpoints 2"
            self._say_once(f"note      checkpoints of {size} are copied only {allowed}", "size")
            return True
        if not (is_at_end or limits.is_turn()):
            return False
        self._holders = [0]
        self._exchange.offer(key, offered.folder, [*offered.files, *offered.beside])
        try:
            for rank in [*self._others]:
                if len(self._holders) == limits.wanted:
                    break
                request = self._request(offered, key, limits.limit_s(is_at_end))
                self._cluster.post(request_to(rank, number), json.dumps(request))
                asked.add(rank)
                if not self._has_tried(rank, number, offered.step, is_at_end):
                    return False
        finally:
            self._exchange.withdraw(key)
        if len(self._holders) == limits.wanted:
            self._safe_step = offered.step
            if self._said_of is None:
                self._say_safe(offered.step)
        return True

    def _request(self, offered: Offered, key: str, limit_s: float | None) -> dict[str, Any]:
        return {
            **{"step": offered.step, "key": key, "holders": self._holders, "limit_s": limit_s},
            **{"files": offered.files, "beside": offered.beside},
        }

    def _has_tried(self, rank: int, number: int, step: int, is_at_end: bool) -> bool:
        """Wait for a rank's answer, and say what keeps it from a copy. False: it was too slow.

        Raises CancelledError, RankFailure.
        """
        name = self._exchange.name(rank)
        text = self._wait_for(answer_of(number), rank)
        with as_sent_by(name):
            require_shape(answer := parse_json(text), ANSWER)
        self._judge(name, answer, is_at_end)
        if answer["is_given_up"]:
            return False
        if answer["problem"] is not None:
            (problem,) = problems_of_peer(name, [answer["problem"]])
            self._say_once(
                f"warning: checkpoint-{step} is not copied to {name}; training continues:\n"
                f"  {problem}",
                f"rank {rank}",
            )
            self._others.sort(key=lambda one: one == rank)
            return True
        self._said.discard(f"rank {rank}")
        self._holders = [*self._holders, rank]
        return True

    def _judge(self, name: str, answer: dict[str, Any], is_at_end: bool) -> None:
        """Copy less often, and say what would allow more, where a copy took too long."""
        is_given_up, limits = answer["is_given_up"], self._limits
        if answer["problem"] is not None:
            return
        if not is_given_up and (is_at_end or not limits.is_too_slow(answer["seconds"])):
            limits.copied()
            return
        limits.given_up()
        figures = (answer[key] for key in ("seconds", "bytes_done", "bytes_total"))
        why = limits.too_slow(*figures)
        self._say_once(f"note      not every checkpoint is copied to {name}: {why}", "slow")

    def _say_safe(self, step: int) -> None:
        """Say where a checkpoint lies: the first and the last, each once."""
        if self._said_of == step:
            return
        self._said_of = step
        names = ", ".join(map(self._exchange.name, self._holders))
        self._say(f"safe      checkpoint-{step} lies on {len(self._holders)} machines: {names}")

    def _say_once(self, text: str, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(text)


def copies_of(job: Job, folder: RunFolder, say: Callable[[str], None]) -> Copies:
    """This rank's part in the copies of a run. All ranks must call."""
    config, cluster, keepers = job.config, job.cluster, folder.keepers
    asked, others = config.replicate_checkpoints, [rank for rank in keepers.ranks if rank]
    if asked is not None and asked > 1 + len(others):
        seen = "1 folder" if keepers.is_shared else f"{len(keepers.ranks)} folders"
        say(
            f"note      --replicate-checkpoints {asked}: the machines of this run see {seen} at"
            " --output-dir, so each checkpoint lies on no more machines"
        )
    if not others or asked == 1 or (asked is None and config.fetch == "never"):
        return Copies(cluster)
    exchange = cluster.open_files()
    if cluster.is_main:
        longest_s = job.budget.between_saves_s if job.budget else None
        limits = Limits(config, job.plan.total_steps, longest_s)
        return Leading(cluster, exchange, others, limits, say)
    if keepers.keeps(cluster.rank):
        return Following(job, folder, exchange)
    return Copies(cluster)
