"""Every rank of a rendezvous is taken once: who comes twice, too late, or to another launch.

A process claims its rank in the launch's store before it says anything else there. Whoever finds
the number taken is refused without a trace in the run: it only leaves a note, which those who wait
for a missing rank add to what they report.
"""

from __future__ import annotations

import functools
import json
import platform
import secrets
import time
from dataclasses import dataclass, field

from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers.findings import Finding, findings_of_peer, refusal
from p2p_llm_forge.peers.store import Store
from p2p_llm_forge.polling import wait_for

BEAT_S = 0.3
SILENCE_S = 5.0  # after which a claim is that of a process that has ended
ALL_CAME = "forge/rendezvous/all-came"
SIZE = "forge/rendezvous/size"
REFUSED = "forge/rendezvous/refused"


@dataclass
class Claim:
    """This process's claim to a rank of the launch that meets at `main` (address and port)."""

    store: Store
    rank: int
    world_size: int
    main: str
    token: str = ""  # of this process; tests give their own
    _beats: int = field(default=0, init=False)
    _beaten_at: float = field(default=0.0, init=False)

    def take(self) -> None:
        """Take the rank. Raises ForgeError where it is taken, too high, or the run is on."""
        check_rank(self.rank, self.world_size)
        self.token = self.token or _token_of_this_process()
        if (size := self._set_once(SIZE, str(self.world_size))) != str(self.world_size):
            raise self._refused(self._too_late() or self._other_size(size))
        taken = self._set_once(self._key("claim"), self._text())
        if taken == self._text():
            return self.beat()
        beat = self._read("beat")
        wait_for(lambda: self._is_on() or self._read("beat") != beat, SILENCE_S)
        if self._is_on() or self._read("beat") != beat:
            raise self._refused(self._too_late() or self._twice(taken))
        # Whoever had it has ended, before all came: this one takes its place.
        if self._set_once(self._key("claim"), self._text(), instead_of=taken) != self._text():
            raise self._refused(self._twice(self._read("claim")))
        self.beat()

    def beat(self) -> None:
        """Show those who want the same rank that this process waits. Raises ForgeError if one
        has taken it meanwhile."""
        if self._beaten_at and time.monotonic() < self._beaten_at + BEAT_S:
            return
        if (taken := self._read("claim")) != self._text():
            raise self._refused(self._twice(taken))
        self._beats += 1
        self._beaten_at = time.monotonic()
        self.store.set(self._key("beat"), str(self._beats))

    def all_came(self) -> None:
        """Note that the launch is complete: whoever comes now comes too late."""
        self.store.set(ALL_CAME, "")

    def refused(self) -> list[Finding]:
        """Why somebody was refused at last, for those who wait in vain for a rank."""
        if not self.store.check(REFUSED):
            return []
        try:
            sent = parse_json(self.store.get(REFUSED, self.rank))
            return findings_of_peer("another process", [sent])
        except ValueError:
            return []  # anyone who reaches the port can write there

    def _key(self, subject: str) -> str:
        return f"forge/rendezvous/{subject}/{self.rank}"

    def _text(self) -> str:
        return json.dumps({"host": platform.node(), "process": self.token})

    def _read(self, subject: str) -> str:
        key = self._key(subject)
        return self.store.get(key, self.rank) if self.store.check(key) else ""

    def _set_once(self, key: str, value: str, instead_of: str = "") -> str:
        """What stands at the key afterwards: `value`, unless another was there before."""
        return self.store.set_once(key, value, instead_of)

    def _is_on(self) -> bool:
        return self.store.check(ALL_CAME)

    def _refused(self, error: ForgeError) -> ForgeError:
        if not self._is_on():
            self.store.set(REFUSED, json.dumps(vars(error.problems[0])))
        return error

    def _too_late(self) -> ForgeError | None:
        if not self._is_on():
            return None
        taken = self._read("claim")
        here = f", with rank {self.rank} on {_host_of(taken)}" if taken else ""
        return refusal(
            "rendezvous",
            f"a run is on already at {self.main}{here}: rank {self.rank} ({platform.node()}) comes"
            " too late",
            "wait for its end, or stop it, then start all machines again (--resume auto continues"
            " it); for peers that join while a run lasts see docs/elastic.md",
        )

    def _other_size(self, size: str) -> ForgeError:
        own = f"rank {self.rank} ({platform.node()}) was started as one of {self.world_size}"
        return refusal(
            "rendezvous",
            f"{own} processes, the first that came to {self.main} as one of {size}",
            "write the same number for all machines (num_machines and num_processes, --world-size)",
        )

    def _twice(self, taken: str) -> ForgeError:
        return refusal(
            "rendezvous",
            f"rank {self.rank} came to {self.main} twice: {_host_of(taken)} has it, and"
            f" {platform.node()} was started with the same number",
            "give every machine a number of its own (machine_rank, --node-rank, --rank; here"
            f" {_numbers(self.world_size)} processes), and start this one again",
        )


def check_rank(rank: int, world_size: int) -> None:
    """Raises ForgeError for a rank that a launch of so many processes does not have."""
    if not 0 <= rank < world_size:
        raise refusal(
            "rendezvous",
            f"this is rank {rank} of a launch of {world_size} processes: they are numbered"
            f" {_numbers(world_size)}",
            "correct the number of this machine (machine_rank, --node-rank, --rank), or the number"
            " of all (num_machines and num_processes, --nnodes, --world-size) on all machines",
        )


def _numbers(count: int) -> str:
    return f"0 to {count - 1}"


@functools.cache
def _token_of_this_process() -> str:
    """The same for all runs of one process, which may follow each other at one store."""
    return secrets.token_hex(16)


def _host_of(claim: str) -> str:
    try:
        return in_one_line(parse_json(claim)["host"])
    except (ValueError, TypeError, KeyError):
        return "another process"
