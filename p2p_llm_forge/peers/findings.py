"""What a check has found, and the report that is made of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from p2p_llm_forge.errors import ForgeError, Problem, in_one_line
from p2p_llm_forge.tables import table

FINE, WARNING, FAILURE = "fine", "warning", "failure"
MARKS = {FINE: "ok", WARNING: "WARNING", FAILURE: "FAILED"}
WORKS, WILL_NOT_WORK, WORKS_WITH_WARNINGS = 0, 1, 3  # exit status
VERDICTS = {
    WORKS: "this launch will work",
    WORKS_WITH_WARNINGS: "this launch will work; see the warnings",
    WILL_NOT_WORK: "this launch will not work; see what failed",
}
UNTIL_THEY_MEET = (
    "as far as one machine can tell, this launch will work; to know, start this on all of them"
    " with --meet"
)
SAME_VERSION_FIX = (
    "start the same version of this program on all machines; if it is, let only the peers reach the"
    " main port, with --cluster-secret-file on all of them"
)


@dataclass(frozen=True)
class Finding(Problem):
    """One thing that was looked at. What is not fine has a fix.

    where: such as "rank 1 (berta)"; empty: of the machine that prints it, or of all.
    """

    level: str = field(kw_only=True)
    topic: str = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.fix or self.level == FINE, f"{self.found}: no fix"


def fine(topic: str, found: str) -> Finding:
    """Something that is as it should be."""
    return Finding(found, "", level=FINE, topic=topic)


def warning(topic: str, found: str, fix: str) -> Finding:
    """Something that works, but not as well as it could."""
    return Finding(found, fix, level=WARNING, topic=topic)


def failure(topic: str, found: str, fix: str) -> Finding:
    """Something because of which the launch will not work."""
    return Finding(found, fix, level=FAILURE, topic=topic)


def refusal(topic: str, found: str, fix: str) -> ForgeError:
    """A failure for a script that only wants to start."""
    return ForgeError.of([failure(topic, found, fix)])


def failures(topic: str, error: ForgeError) -> list[Finding]:
    """The problems of an error as findings; those that are findings stay what they are."""
    return [
        p if isinstance(p, Finding) else Finding(**vars(p), level=FAILURE, topic=topic)
        for p in error.problems
    ]


@contextlib.contextmanager
def as_sent_by(peer: str) -> Iterator[None]:
    """Turn a ValueError, while what a peer has sent is read, into a refusal that names it."""
    try:
        yield
    except ValueError as error:
        found = f"{peer} sent what no rank of this program sends ({in_one_line(error)})"
        raise refusal("peers", found, SAME_VERSION_FIX) from error


def problems_of_peer(by: str, sent: Any) -> list[Problem]:
    """The problems that a peer has sent as JSON, marked as its own.

    by: the peer, such as "rank 1 (berta)". Raises ValueError for what no rank of ours sends: what
    comes from peers may come from anyone who reaches the main port.
    """
    if not isinstance(sent, list) or not all(isinstance(one, dict) for one in sent):
        raise ValueError("no list of problems")
    texts = [{key: one.get(key) for key in ("found", "fix", "where")} for one in sent]
    if not all(isinstance(text, str) for one in texts for text in one.values()):
        raise ValueError("a field of a problem is no text")
    return [Problem(**one | {"where": in_one_line(one["where"])}, by=by) for one in texts]


def findings_of_peer(by: str, sent: Any) -> list[Finding]:
    """The findings that a peer has sent as JSON, marked as its own. Raises ValueError as above."""
    found = []
    for problem, one in zip(problems_of_peer(by, sent), sent, strict=True):
        level, topic = str(one.get("level")), in_one_line(one.get("topic"), 20)
        if level not in MARKS or not (problem.fix or level == FINE):
            raise ValueError("a finding without a level or a fix")
        found.append(Finding(**{**vars(problem), "where": by}, level=level, topic=topic))
    return found


def refuse_failures(findings: list[Finding]) -> None:
    """Raise one ForgeError with every failure among the findings, if there is one."""
    if refused := [finding for finding in findings if finding.level == FAILURE]:
        raise ForgeError.of(refused)


@dataclass
class ClusterReport:
    """All findings about a launch, and how fast it will be."""

    findings: list[Finding] = field(default_factory=list)
    rank: int = 0  # of the process that made it
    is_of_one_machine: bool = False  # which has not met the others
    peers: list[str] = field(default_factory=list)  # hosts by rank, once they have met
    latency_s: list[list[float]] = field(default_factory=list)  # [from][to]
    bytes_per_s: list[list[float]] = field(default_factory=list)  # [from][to]
    update_s: list[float] = field(default_factory=list)  # computing of an update, by rank
    forecast: list[str] = field(default_factory=list)  # of the strategies, as a table

    def status(self) -> int:
        """The exit status: 0, 1 (will not work) or 3 (works, with warnings)."""
        levels = {finding.level for finding in self.findings}
        if FAILURE in levels:
            return WILL_NOT_WORK
        return WORKS_WITH_WARNINGS if WARNING in levels else WORKS

    @contextlib.contextmanager
    def failures_as(self, topic: str) -> Iterator[None]:
        """Add the problems of a ForgeError that ends the block, unless they are known already."""
        try:
            yield
        except ForgeError as error:
            known = {finding.found for finding in self.findings}  # what one rank found by itself
            self.findings += [new for new in failures(topic, error) if new.found not in known]

    def shown_by_its_rank(self) -> ClusterReport | None:
        """What its process prints: all on the main one, a peer's own failures elsewhere."""
        if self.rank == 0:
            return self
        own = f"rank {self.rank} (" if self.peers else ""
        found = [f for f in self.findings if f.level == FAILURE and f.where.startswith(own)]
        return ClusterReport(found, rank=self.rank) if found else None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; what was not measured is null.

        Of the findings, a peer's report holds all failures, that of rank 0 everything.
        """
        found = [one for one in self.findings if self.rank == 0 or one.level == FAILURE]
        fields = asdict(replace(self, findings=found))
        text = json.dumps({"status": self.status(), **fields})
        return json.loads(text, parse_constant=lambda _: None)

    def text(self) -> str:
        """The report for people."""
        lines = []
        for where in dict.fromkeys(finding.where for finding in self.findings):
            lines.append(where or "this launch")
            for finding in self.findings:
                lines += _rows(finding) if finding.where == where else []
        if self.bytes_per_s:
            slowest = min(rate for row in self.bytes_per_s for rate in row if not math.isnan(rate))

            def megabits(rate: float) -> str:
                return f"{rate * 8 / 1e6:.1f}" + (" <- slowest" if rate == slowest else "")

            lines += self._matrix("bandwidth in Mbit/s", self.bytes_per_s, megabits)
            lines += self._matrix("latency in ms", self.latency_s, lambda s: f"{s * 1e3:.2f}")
        if self.update_s:
            lines += ["", "computing of one update"]
            for rank, seconds in enumerate(self.update_s):
                lines.append(f"  rank {rank} ({self.peers[rank]}): {seconds:.3f} s")
        if self.forecast:
            lines += ["", *self.forecast]
        status = self.status()
        is_open = self.is_of_one_machine and status != WILL_NOT_WORK
        return "\n".join([*lines, "", UNTIL_THEY_MEET if is_open else VERDICTS[status]])

    def _matrix(
        self, title: str, values: list[list[float]], show: Callable[[float], str]
    ) -> list[str]:
        rows = [["from \\ to", *(f"rank {rank}" for rank in range(len(values)))]]
        for rank, row in enumerate(values):
            cells = ["-" if math.isnan(value) else show(value) for value in row]
            rows.append([f"rank {rank} ({self.peers[rank]})", *cells])
        return ["", title, *(f"  {line}" for line in table(rows))]


def _rows(finding: Finding) -> list[str]:
    found, fix = finding.shown()
    text = found + (f"\nfix: {fix}" if finding.fix else "")
    first, *others = text.splitlines()
    mark = f"  {MARKS[finding.level]:<8} {finding.topic:<10} "
    return [mark + first, *(" " * 22 + line for line in others)]
