"""Which start of a run a folder holds: folders of two starts are never mixed into one run.

The token in run.json is made when a run begins from scratch, and again where one leaves later
checkpoints behind, which a machine that is absent may hold too. Versions before it wrote none.
"""

from __future__ import annotations

import platform
import secrets
import shlex
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import Problems
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import Keepers, on_keepers
from p2p_llm_forge.shapes import is_count, is_flag, require_shape
from p2p_llm_forge.training.manifest import MANIFEST, checkpoint_dir, steps_saved
from p2p_llm_forge.training.run_record import METRICS, Resumed, RunRecord, is_token


def agreed_start(cluster: Cluster, keepers: Keepers, output_dir: Path) -> str | None:
    """The token in those folders of the run that have one; None in a new run. All ranks must call.

    A start of which nothing was saved or logged, such as one that was killed at once, is nothing:
    it takes the token of the others. Raises ForgeError, naming the machines, where two of them hold
    different starts.
    """
    own: dict[str, Any] = {"started": None, "holds": False}

    def read() -> None:
        if record := RunRecord.read(output_dir):
            metrics = output_dir / METRICS
            is_logged = metrics.is_file() and metrics.stat().st_size > 0
            own["started"] = record.started
            own["holds"] = is_logged or newest_saved(output_dir) >= 0

    on_keepers(cluster, keepers, read)
    facts = cluster.gather_facts({**own, "host": platform.node(), "folder": str(output_dir)})
    names = [f"rank {rank} ({fact['host']})" for rank, fact in enumerate(facts)]
    for name, fact in zip(names, facts, strict=True):
        with as_sent_by(name):
            if not (fact["started"] is None or is_token(fact["started"])):
                raise ValueError("no token of a start")
            require_shape(fact["holds"], is_flag)
    begun = [rank for rank, fact in enumerate(facts) if fact["started"]]
    if not begun:
        return None
    having = [rank for rank in begun if facts[rank]["holds"]] or begun[:1]
    first, problems = having[0], Problems()
    for rank in having:
        folder = facts[rank]["folder"]
        problems.require(
            facts[rank]["started"] == facts[first]["started"],
            f"{names[rank]} holds another start of a run in {folder} than {names[first]} in"
            f" {facts[first]['folder']}",
            f"on {facts[rank]['host']}, move it away: {moved_away(folder)}; or, to go on with it,"
            f" move that of {names[first]} away",
        )
    problems.raise_any()
    return str(facts[first]["started"])


def new_start() -> str:
    """A token for a run that begins."""
    return secrets.token_hex(16)


# --- machines that went on apart ------------------------------------------------------------------


def agreed_history(cluster: Cluster, keepers: Keepers, output_dir: Path) -> Resumed:
    """When the run was resumed, as the machine with its newest checkpoint has it on record.

    All ranks must call. Raises ForgeError where two machines have both saved what the run of the
    other one does not hold: which of the two is wanted, only the user knows.
    """
    own: dict[str, Any] = {"resumed": [], "newest": -1}

    def read() -> None:
        if record := RunRecord.read(output_dir):
            own["resumed"] = [list(one) for one in record.resumed]
            own["newest"] = newest_saved(output_dir)

    on_keepers(cluster, keepers, read)
    facts = cluster.gather_facts({**own, "host": platform.node(), "folder": str(output_dir)})
    for rank in range(len(facts)):
        with as_sent_by(f"rank {rank}"):
            require_resumed(facts[rank]["resumed"])
            require_shape(facts[rank]["newest"], int)
    histories = [tuple((str(a), int(b)) for a, b in fact["resumed"]) for fact in facts]
    problems = Problems()
    for rank in keepers.ranks:
        for other in (one for one in keepers.ranks if one < rank):
            step = parted_at(histories[rank], histories[other])
            newest = {one: facts[one]["newest"] for one in (rank, other)}
            folders = {one: str(facts[one]["folder"]) for one in newest}
            names = {one: f"rank {one} ({facts[one]['host']})" for one in newest}
            problems.require(
                step is None or min(newest.values()) <= step,
                f"{names[rank]} has checkpoint-{newest[rank]} in {folders[rank]}, {names[other]}"
                f" has checkpoint-{newest[other]} in {folders[other]}: after step {step} they went"
                " on without each other",
                f"keep one of the two: on {facts[rank]['host']} {moved_away(folders[rank])}, or on"
                f" {facts[other]['host']} {moved_away(folders[other])}",
            )
    problems.raise_any()
    head = max(keepers.ranks, key=lambda one: (facts[one]["newest"], len(histories[one])))
    return histories[head]


def newest_saved(output_dir: Path) -> int:
    """The step of the newest checkpoint with a manifest, readable or not; -1 without any."""
    steps = steps_saved(output_dir)
    own = (step for step in steps if (checkpoint_dir(output_dir, step) / MANIFEST).is_file())
    return next(own, -1)


def parted_at(one: Resumed, other: Resumed) -> int | None:
    """The step from which one of two machines went on without the other; None where none did."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return min((resumed[same][1] for resumed in (one, other) if len(resumed) > same), default=None)


def require_resumed(sent: Any) -> None:
    """Raise ValueError unless a rank has sent tokens and steps."""
    require_shape(sent, [list])
    if not all(len(one) == 2 and is_token(one[0]) and is_count(one[1]) for one in sent):
        raise ValueError("nothing that a run resumed from")


def moved_away(folder: str) -> str:
    """The command that moves a run's folder away."""
    return f"mv {shlex.quote(folder)} {shlex.quote(folder.rstrip('/') + '.other')}"
