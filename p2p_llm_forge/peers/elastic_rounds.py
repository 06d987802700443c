"""Who takes part in which round of an elastic launch. Decided by the main machine alone.

A round is one start of the workers on all machines. When a machine is lost, or a new one has come,
all stop their workers, say that they are idle, and the next round begins with those that are there.
No sockets, processes or clocks here: events come in with their time, messages go out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from p2p_llm_forge.peers.rank_failure import NOT_MET
from p2p_llm_forge.peers.signed_stream import Gone

# How long workers may take to end by themselves, by why they are asked to. Seconds.
TO_SAVE_S = 600.0  # a machine has come: all save first; an update may take minutes
TO_EXPLAIN_S = 10.0  # a worker or launcher has ended: the others see it, say so, and end
TO_END_S = 2.0  # a machine is silent: the others could not even save together

GATHERING, RUNNING, STOPPING, ENDED = "gathering", "running", "stopping", "ended"
USERS_MISTAKE = 2  # exit status of train.py
STOPPED = (130, 143)  # exit status of train.py that has saved because of a signal
LONG_S = 600.0  # a round that lasted so long is no start that failed


@dataclass(eq=False)
class Member:
    """One machine (one launcher) of the launch. send: takes a message for it."""

    address: str
    processes: int
    is_main: bool
    send: Callable[[dict[str, Any]], None]
    port: int | None = None  # free on it, for rank 0; None while its workers run
    is_done: bool = False  # its workers have ended well
    is_leaving: bool = False  # it was asked to stop
    is_proven: bool = False  # its workers have trained, so its settings go with the others'

    @property
    def is_idle(self) -> bool:
        return self.port is not None


@dataclass(kw_only=True)
class Rounds:
    """The course of one launch. Every method takes the time at which it is called, in seconds.

    say: takes a sentence about the course for whoever watches the main machine.
    """

    token: str  # names this launch and no other
    min_peers: int
    max_peers: int | None
    last_call_s: float  # since the last machine came
    join_timeout_s: float
    max_restarts: int  # after failures, in a row
    say: Callable[[str], None]
    members: list[Member] = field(default_factory=list)  # in the order in which they came
    phase: str = GATHERING
    status: int = 0  # of the launch, once ended
    number: int = 0  # of the round
    taking_part: list[Member] = field(default_factory=list)  # in the round, by rank
    failures: int = 0  # in a row
    _has_failed: bool = False  # the round, by itself
    _has_lost: bool = False  # the round, a machine
    _last_came_at: float = 0.0
    _since: float = 0.0  # the phase

    # --- what happens -----------------------------------------------------------------------------

    def came(self, member: Member, now: float) -> None:
        """A machine has come, and is idle or will say so."""
        self.members.insert(0 if member.is_main else len(self.members), member)
        self._last_came_at = now

    def left(self, member: Member, gone: Gone, now: float) -> None:
        """A machine has gone, or is not heard any more."""
        self.members.remove(member)
        if self.phase == ENDED:
            return
        took_part = member in self.taking_part
        self.taking_part = [one for one in self.taking_part if one is not member]
        if member.is_main or not self.members:
            self._end(1, "the main machine stopped the launch")
        elif took_part and member.is_leaving:
            self.say(f"{member.address} left; the others continue from what was saved")
            self._stop(f"{member.address} left", TO_END_S if gone.is_silent else TO_SAVE_S)
        elif took_part and not member.is_done:
            self.say(f"lost a peer: {member.address}: {gone}; the others continue")
            self._has_lost = True
            patience_s = TO_END_S if gone.is_silent else TO_EXPLAIN_S
            self._stop(f"lost a peer: {member.address}: {gone}", patience_s)
        self.look(now)

    def leaves(self, member: Member, now: float) -> None:
        """A machine was asked to stop: its workers save together with all others."""
        member.is_leaving = True
        self.look(now)

    def idle(self, member: Member, port: int, status: int | None, now: float) -> None:
        """No worker of a machine runs (any more). status: how they ended, None if none has run."""
        was_asked = self.phase == STOPPING
        if status in (0, None) or was_asked:
            member.is_proven |= was_asked and status in (0, *STOPPED)
        else:
            self._fail(member, status)
        member.port, member.is_done = port, status == 0 and not was_asked
        self.look(now)

    # --- what follows -----------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Take the next step if it is time for it. Called after each event and every second."""
        has_called_long = now >= self._last_came_at + self.last_call_s
        if self.phase == RUNNING:
            done = [member.is_done for member in self.taking_part]
            if all(done):
                self._end(0, "")
            elif self._newcomers() and has_called_long and not any(done):
                who = ", ".join(member.address for member in self._newcomers())
                self.say(f"{who} came; all save, then continue together")
                self._stop(f"{who} came", TO_SAVE_S)
        if self.phase == STOPPING and all(member.is_idle for member in self.taking_part):
            lasted_s, self.phase, self._since = now - self._since, GATHERING, now
            for member in self.taking_part:
                member.is_proven |= lasted_s > LONG_S
            self._count_failures(lasted_s)
        if self.phase == GATHERING:
            here = self._available()
            is_full = len(here) == self.max_peers
            if is_full or (len(here) >= self.min_peers and has_called_long):
                self._begin(here, now)
            elif now > max(self._last_came_at, self._since) + self.join_timeout_s:
                reason = f"{len(here)} of --min-peers {self.min_peers} machines were here within"
                self._end(USERS_MISTAKE, f"{reason} {self.join_timeout_s:.0f} s (--join-timeout)")

    def _available(self) -> list[Member]:
        """Who would take part in a round that began now; none while the main machine leaves."""
        idle = [member for member in self.members if member.is_idle and not member.is_leaving]
        has_main = any(member.is_main for member in idle)
        return idle[: self.max_peers] if has_main else []

    def _newcomers(self) -> list[Member]:
        """Idle machines that a further round would have room for."""
        waiting = [
            member
            for member in self.members
            if member.is_idle and not member.is_leaving and member not in self.taking_part
        ]
        room = (self.max_peers or len(self.members)) - len(self.taking_part)
        return waiting[: max(0, room)]

    def _begin(self, members: list[Member], now: float) -> None:
        self.number += 1
        self.phase, self.taking_part, self._since = RUNNING, members, now
        self._has_failed = self._has_lost = False
        world_size, first = sum(member.processes for member in members), 0
        most = self.max_peers and self.max_peers * members[0].processes  # alike on all machines
        for rank, member in enumerate(members):
            member.send(
                {
                    "type": "start",
                    "token": self.token,
                    "round": self.number,
                    "machine": rank,
                    "first_rank": first,
                    "world_size": world_size,
                    "most_processes": most,
                    "main_address": members[0].address,
                    "main_port": members[0].port,
                }
            )
            first += member.processes
        for member in members:
            member.port, member.is_done = None, False
        names = ", ".join(member.address for member in members)
        self.say(f"round {self.number}: {world_size} processes on {len(members)} machines: {names}")

    def _stop(self, reason: str, patience_s: float) -> None:
        if self.phase in (RUNNING, STOPPING):
            self.phase = STOPPING
            for member in self.taking_part:
                member.send({"type": "stop", "reason": reason, "patience_s": patience_s})

    def _fail(self, member: Member, status: int) -> None:
        if member not in self.taking_part:  # it was dismissed in the round before
            return
        if self.phase != RUNNING or any(member.is_leaving for member in self.taking_part):
            return
        is_unproven = not all(one.is_proven for one in self.taking_part)
        if status == USERS_MISTAKE or (status == NOT_MET and is_unproven):
            return self._mistake(member, status)
        self._has_failed = True
        self.say(f"a worker on {member.address} ended with status {status}")
        self._stop(f"a worker on {member.address} ended with status {status}", TO_EXPLAIN_S)

    def _mistake(self, member: Member, status: int) -> None:
        """A worker ended for what a user can fix: of the newcomers, if the others have trained."""
        newcomers = [one for one in self.taking_part if not one.is_proven]
        reason = f"a worker on {member.address} ended with status {status}: see its message"
        if newcomers and len(newcomers) < len(self.taking_part):
            for newcomer in newcomers:
                self._dismiss(newcomer, f"{reason}; the others continue without this machine")
            self.say(f"{reason}; continuing without {', '.join(one.address for one in newcomers)}")
            return self._stop(reason, TO_EXPLAIN_S)
        self._end(USERS_MISTAKE, reason)

    def _dismiss(self, member: Member, reason: str) -> None:
        member.is_leaving = True
        self.taking_part = [one for one in self.taking_part if one is not member]
        member.send({"type": "end", "status": USERS_MISTAKE, "reason": reason})

    def _count_failures(self, lasted_s: float) -> None:
        """End a launch that fails again and again, without any machine having been lost."""
        if not self._has_failed or self._has_lost:
            return
        self.failures = 1 if lasted_s > LONG_S else self.failures + 1
        if self.failures > self.max_restarts:
            starts = f"{self.failures} starts in a row have failed"
            self._end(1, f"{starts} (--max-restarts {self.max_restarts})")

    def _end(self, status: int, reason: str) -> None:
        self.phase, self.status = ENDED, status
        if reason:
            self.say(f"the launch ends: {reason}")
        for member in self.members:
            member.send({"type": "end", "status": status, "reason": reason})
