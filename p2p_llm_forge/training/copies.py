"""Copies of a run's checkpoints on other machines, so that losing the main machine loses nothing.

Where machines keep folders of their own, others fetch each checkpoint that rank 0 has completed, in
the background and behind the training's own traffic. It is safe when it lies on as many machines as
are wanted. What fails here is said, and never ends the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fsync, parse_json
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, GivenUp, Watch
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.shapes import is_count, is_flag, is_number, require_shape
from p2p_llm_forge.training.checkpoint import complete
from p2p_llm_forge.training.fetched_record import BESIDE as OF_RUN
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.manifest import (
    TRAINER_STATE,
    checkpoint_dir,
    is_digest,
    is_whole,
    read_manifest,
    require_files,
)
from p2p_llm_forge.training.pruning import prune_checkpoints
from p2p_llm_forge.training.run_folder import RunFolder

BESIDE = "beside"  # where in what is offered lies what the run writes beside its checkpoints
FILES = {str: {"size": is_count, "sha256": is_digest}}
REQUEST = {
    **{"step": is_count, "key": str, "holders": [is_count], "limit_s": (None, is_number)},
    **{"files": FILES, "beside": FILES},
}
ANSWER = {
    **{"seconds": is_number, "bytes_done": is_count, "bytes_total": is_count},
    **{"is_given_up": is_flag, "problem": (None, {"found": str, "fix": str, "where": str})},
}


class Copies:
    """The part of every rank. All call `begin` and `finish` alike: each is one round.

    What a round does, it does in a thread of its own, after the round before. This one is of a rank
    that keeps no folder, which does nothing.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._round = cluster, 0
        self._is_over = threading.Event()
        self._thread = ThreadPoolExecutor(1, "copies")
        self._tasks: list[Future[None]] = []

    def start(self, first_step: int) -> None:
        """The first update is about to be taken."""

    def begin(self, step: int) -> None:
        """A checkpoint after `step` updates is about to be written."""
        self._round += 1

    def saved(self, step: int, saved: Path | None) -> None:
        """It lies there; None: it could not be written. Rank 0 calls, from any thread."""

    def figures(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of the copies."""
        return {}

    def finish(self) -> None:
        """Return when the last checkpoint is copied, or when that is given up."""
        self._round += 1

    def close(self) -> None:
        """End what is under way."""
        self._is_over.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, task: Callable[[], None]) -> None:
        self._tasks = [*(one for one in self._tasks if not one.done()), self._thread.submit(task)]

    def _wait_for(self, key: str, rank: int) -> str:
        return self._cluster.wait_for(key, rank, self._is_over.is_set)


def require_request(sent: Any, world_size: int, with_code: bool = False) -> None:
    """Raise ValueError for what rank 0 asks no other rank."""
    require_shape(sent, REQUEST)
    require_files(sent["files"], with_code)
    if TRAINER_STATE not in sent["files"]:
        raise ValueError("these are not the files of a checkpoint")
    if not set(sent["beside"]) <= {f"{BESIDE}/{name}" for name in OF_RUN}:
        raise ValueError("it names what lies beside no checkpoint")
    if not sent["holders"] or max(sent["holders"]) >= world_size:
        raise ValueError("no rank of ours has them")


def request_to(rank: int, number: int) -> str:
    """The key under which rank 0 posts what a rank is to fetch in a round, or null."""
    return f"copy/{number}/{rank}"


def answer_of(number: int) -> str:
    """The key under which a rank posts what has come of it."""
    return f"copied/{number}"


# --- the other machines ---------------------------------------------------------------------------


class Following(Copies):
    """The part of a rank that keeps the folder of another machine: it fetches what rank 0 asks."""

    def __init__(self, job: Job, folder: RunFolder, exchange: FileExchange) -> None:
        super().__init__(job.cluster)
        self._config, self._folder, self._exchange = job.config, folder, exchange
        self._watch = Watch()
        self._offered: str | None = None  # the key under which this rank offers its copy

    def begin(self, step: int) -> None:
        """A checkpoint after `step` updates is about to be written."""
        super().begin(step)
        number = self._round
        self._submit(lambda: self._follow(number))

    def finish(self) -> None:
        """Wait for what rank 0 still asks for."""
        self.begin(0)
        wait(self._tasks)

    def close(self) -> None:
        """End what is under way."""
        self._is_over.set()
        self._watch.give_up()
        super().close()

    def _follow(self, number: int) -> None:
        """One round: what rank 0 asks for, and what has come of it."""
        cluster, answer = self._cluster, _nothing()
        with contextlib.suppress(CancelledError, RankFailure):  # the main thread says why
            text = self._wait_for(request_to(cluster.rank, number), 0)
            if self._offered is not None:
                self._exchange.withdraw(self._offered)
            try:
                with as_sent_by("rank 0"):
                    if (request := parse_json(text)) is None:
                        return
                    with_code = self._config.trust_remote_code
                    require_request(request, cluster.world_size, with_code)
                answer = self._fetch(request)
            except ForgeError as error:
                answer["problem"] = _as_json(error)
            except Exception as error:
                bug = ForgeError(f"an error of this program: {error!r}", "report it")
                answer["problem"] = _as_json(bug)
            finally:
                cluster.post(answer_of(number), json.dumps(answer))

    def _fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fetch a checkpoint and what lies beside it; the answer to rank 0. Raises ForgeError."""
        began, step, key = time.monotonic(), request["step"], request["key"]
        files, beside, answer = request["files"], request["beside"], _nothing()
        output_dir, sources = self._folder.path, dict.fromkeys(request["holders"], key)

        def fetch(partial: Path) -> None:
            self._exchange.fetch(facts_of(files), sources, partial, self._watch, is_behind=True)

        self._watch, done = Watch(), 0
        if self._is_over.is_set():  # `close` has given up the watch before this one
            self._watch.give_up()
        try:
            with _given_up_after(self._watch, request["limit_s"]):
                self._fetch_beside(facts_of(beside), key)
                done = _size(beside)
                if not self._has(step, files):
                    complete(output_dir, step, fetch, self._folder.confirm, files)
        except GivenUp:
            answer["is_given_up"] = True
        else:
            prune_checkpoints(output_dir, step, self._config)
            self._offered = key
            self._exchange.offer(key, checkpoint_dir(output_dir, step), files)
        answer["seconds"] = time.monotonic() - began
        answer["bytes_total"] = total = _size(beside) + _size(files)
        answer["bytes_done"] = min(total, done + self._watch.bytes_done)
        return answer

    def _fetch_beside(self, files: dict[str, FileFacts], key: str) -> None:
        """Fetch what the run has written beside its checkpoints; what is of others stays."""
        folder = self._folder.path
        partial = folder / f"tmp-copied-0-{secrets.token_hex(4)}"
        try:
            self._exchange.fetch(files, {0: key}, partial, self._watch, is_behind=True)
            for name in OF_RUN:
                if f"{BESIDE}/{name}" in files and self._folder.may_write(name):
                    os.replace(partial / BESIDE / name, folder / name)
            fsync(folder)
        except OSError as error:
            found = f"{folder} cannot be written: {error.strerror or error}"
            raise ForgeError(found, "make room there, or make it writable") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _has(self, step: int, files: dict[str, Any]) -> bool:
        """Whether the checkpoint lies here already: it was fetched when the run began."""
        there = checkpoint_dir(self._folder.path, step)
        return is_whole(there) and bool(read_manifest(there)["files"] == files)


def facts_of(files: dict[str, Any]) -> dict[str, FileFacts]:
    """The files of a manifest, as they are fetched."""
    return {name: FileFacts(one["size"], one["sha256"]) for name, one in files.items()}


def _size(files: dict[str, Any]) -> int:
    return sum(int(facts["size"]) for facts in files.values())


def _nothing() -> dict[str, Any]:
    """An answer, when nothing has come yet."""
    return dict(seconds=0.0, bytes_done=0, bytes_total=0, is_given_up=False, problem=None)


def _as_json(error: ForgeError) -> dict[str, str]:
    one = error.problems[0]
    return {"found": one.found, "fix": one.fix, "where": ""}


@contextlib.contextmanager
def _given_up_after(watch: Watch, limit_s: float | None) -> Iterator[None]:
    """Give a fetch up that takes longer than that."""
    timer = threading.Timer(limit_s, watch.give_up) if limit_s is not None else None
    if timer is not None:
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
