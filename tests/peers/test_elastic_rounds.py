"""The rounds of an elastic launch: events with their times, no sockets, no clocks."""

from __future__ import annotations

import pytest

from p2p_llm_forge.peers.elastic_rounds import ENDED, GATHERING, RUNNING, Member, Rounds
from p2p_llm_forge.peers.rank_failure import NOT_MET
from p2p_llm_forge.peers.signed_stream import Gone

CUT, SILENT = Gone("it ended"), Gone("no sign of life for 8 s", is_silent=True)


class Course:
    """A launch whose machines report what a test says, and keep what they are sent."""

    def __init__(self, **settings: object) -> None:
        asked = {"min_peers": 1, "max_peers": None, "last_call_s": 5.0, "join_timeout_s": 100.0}
        self.said: list[str] = []
        self.rounds = Rounds(
            token="token", max_restarts=2, say=self.said.append, **{**asked, **settings}
        )
        self.sent: dict[Member, list[dict]] = {}
        self.now = 0.0

    def comes(self, address: str, processes: int = 1) -> Member:
        got: list[dict] = []
        member = Member(address, processes, address == "10.0.0.1", got.append)
        self.sent[member] = got
        self.rounds.came(member, self.now)
        self.ends(member, None)
        return member

    def ends(self, member: Member, status: int | None) -> None:
        """The workers of a machine have ended."""
        self.rounds.idle(member, 29999, status, self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.rounds.look(self.now)

    def takes(self, member: Member) -> list[dict]:
        """What a machine was sent since this was last asked."""
        got = self.sent[member][:]
        self.sent[member].clear()
        return got


@pytest.fixture
def trio():
    """A launch of three machines, the main one not first, whose first round has begun."""
    course = Course()
    second, main, third = (course.comes(f"10.0.0.{number}") for number in (2, 1, 3))
    course.passes(5.0)
    return course, main, second, third


def kinds(messages: list[dict]) -> list[str]:
    return [message["type"] for message in messages]


def test_a_round_begins_after_the_last_call_and_the_main_machine_has_rank_0():
    course = Course()
    second = course.comes("10.0.0.2", processes=2)
    course.passes(60.0)
    assert course.takes(second) == []  # nobody trains without the main machine
    main = course.comes("10.0.0.1", processes=2)
    course.passes(4.9)
    assert course.takes(main) == []
    course.passes(0.1)
    (of_main,), (of_second,) = course.takes(main), course.takes(second)
    assert of_main == {
        **{"type": "start", "token": "token", "round": 1, "machine": 0, "first_rank": 0},
        **{"world_size": 4, "main_address": "10.0.0.1", "main_port": 29999},
        "most_processes": None,
    }
    assert of_second == {**of_main, "machine": 1, "first_rank": 2}


def test_workers_hear_how_many_may_come_to_be():
    course = Course(max_peers=3)
    main = course.comes("10.0.0.1", processes=2)
    course.passes(5.0)
    (start,) = course.takes(main)
    assert (start["world_size"], start["most_processes"]) == (2, 6)


def test_a_full_launch_begins_at_once_and_lets_a_further_machine_wait():
    course = Course(min_peers=2, max_peers=2)
    machines = [course.comes(f"10.0.0.{number}") for number in (1, 2, 3)]
    assert [len(course.takes(machine)) for machine in machines] == [1, 1, 0]
    course.passes(1000.0)
    assert course.rounds.number == 1 and not any(map(course.takes, machines))
    course.rounds.left(machines[1], CUT, course.now)
    course.ends(machines[0], 1)
    assert kinds(course.takes(machines[0])) == ["stop", "start"]
    assert course.takes(machines[2])[0]["first_rank"] == 1


@pytest.mark.parametrize(("gone", "patience_s"), [(CUT, 10.0), (SILENT, 2.0)])
def test_a_lost_machine_stops_the_others_and_the_next_round_begins_without_it(
    trio, gone, patience_s
):
    course, main, second, third = trio
    first = {machine: course.takes(machine)[0]["first_rank"] for machine in (main, second, third)}
    assert first == {main: 0, second: 1, third: 2}
    course.rounds.left(second, gone, course.now)
    reason = f"lost a peer: 10.0.0.2: {gone}"
    stop = {"type": "stop", "reason": reason, "patience_s": patience_s}
    assert course.takes(main) == course.takes(third) == [stop]
    course.ends(main, 1)
    assert course.takes(main) == []
    course.ends(third, -9)
    (start,) = course.takes(third)
    assert (start["round"], start["first_rank"], start["world_size"]) == (2, 1, 2)
    assert course.rounds.failures == 0, "what a lost machine causes is no failure"


def test_a_machine_lost_after_a_worker_reported_it_is_no_failure_either(trio):
    course, main, second, third = trio
    course.ends(main, 1)  # it saw the closed connection before the launcher's was closed
    course.rounds.left(second, CUT, course.now)
    course.ends(third, 1)
    assert course.rounds.number == 2 and course.rounds.failures == 0


def test_a_newcomer_is_taken_in_after_all_have_saved(trio):
    course, main, second, third = trio
    newcomer = course.comes("10.0.0.4")
    course.takes(main)
    course.passes(4.0)
    assert course.takes(main) == [] and course.takes(newcomer) == []
    course.passes(1.0)
    (stop,) = course.takes(main)
    assert stop["type"] == "stop" and stop["patience_s"] == 600.0
    for machine in (main, second, third):
        course.ends(machine, 143)
    assert course.takes(newcomer)[0]["world_size"] == 4


def test_a_machine_that_was_asked_to_stop_leaves_after_all_have_saved(trio):
    course, main, second, third = trio
    course.rounds.leaves(third, course.now)
    for machine in (main, second, third):
        course.takes(machine)
        course.ends(machine, 143)
    assert course.rounds.failures == 0 and course.takes(main) == []
    course.rounds.left(third, CUT, course.now)
    assert kinds(course.takes(main)) == ["stop", "start"]
    assert course.rounds.number == 2 and len(course.rounds.taking_part) == 2


def test_the_launch_ends_when_all_are_done(trio):
    course, main, second, third = trio
    course.ends(second, 0)
    newcomer = course.comes("10.0.0.4")
    course.passes(50.0)
    assert course.rounds.number == 1, "a newcomer does not interrupt a run that is ending"
    course.ends(main, 0)
    assert course.rounds.phase != ENDED
    course.ends(third, 0)
    assert course.rounds.phase == ENDED and course.rounds.status == 0
    for machine in (main, second, third, newcomer):
        assert course.takes(machine)[-1] == {"type": "end", "status": 0, "reason": ""}


def test_the_launch_ends_when_the_main_machine_stops(trio):
    course, main, second, third = trio
    course.rounds.leaves(main, course.now)
    for machine in (main, second, third):
        course.ends(machine, 130)
    course.rounds.left(main, CUT, course.now)
    assert course.takes(second)[-1]["type"] == "end" and course.rounds.status == 1


def test_a_users_mistake_ends_the_launch_with_its_status(trio):
    course, main, second, third = trio
    course.ends(second, 2)
    assert course.rounds.phase == ENDED and course.rounds.status == 2
    assert "10.0.0.2 ended with status 2" in course.takes(third)[-1]["reason"]


def test_a_newcomers_mistake_does_not_end_the_launch_of_those_that_have_trained(trio):
    course, main, second, third = trio
    newcomer = course.comes("10.0.0.4")
    course.passes(5.0)
    for machine in (main, second, third):
        course.ends(machine, 143)
        course.takes(machine)
    course.ends(third, 2)  # all ranks refuse settings that differ; any may be the first to end
    (start, end) = course.takes(newcomer)
    assert start["round"] == 2 and (end["type"], end["status"]) == ("end", 2)
    for machine in (main, second):
        course.ends(machine, 2)
    assert course.takes(main)[-1]["world_size"] == 3 and course.rounds.status == 0
    course.ends(newcomer, 2)
    course.rounds.left(newcomer, CUT, course.now)
    assert course.rounds.number == 3


@pytest.fixture
def veterans(trio):
    """The trio after a long round, in its second one."""
    course, main, second, third = trio
    course.passes(601.0)
    for machine in (second, main, third):
        course.ends(machine, 1)
    return trio


def test_machines_that_have_trained_and_do_not_meet_are_started_again(veterans):
    course, main, second, third = veterans
    for machine in (third, main, second):
        course.ends(machine, NOT_MET)
    assert course.rounds.number == 3 and course.rounds.status == 0
    for machine in (main, second, third):
        course.ends(machine, NOT_MET)
    assert course.rounds.phase == ENDED and "--max-restarts 2" in course.takes(main)[-1]["reason"]


def test_machines_that_have_not_trained_and_do_not_meet_end_the_launch(trio):
    course, main, second, third = trio
    course.ends(second, NOT_MET)
    assert course.rounds.phase == ENDED and course.rounds.status == 2


def test_a_newcomer_that_the_others_do_not_meet_is_dismissed(trio):
    course, main, second, third = trio
    newcomer = course.comes("10.0.0.4")
    course.passes(5.0)
    for machine in (main, second, third):
        course.ends(machine, 143)
    course.ends(main, NOT_MET)
    assert course.takes(newcomer)[-1]["type"] == "end" and course.rounds.status == 0


def test_a_mistake_of_machines_that_have_trained_ends_the_launch(veterans):
    course, main, second, third = veterans
    course.ends(second, 2)
    assert course.rounds.phase == ENDED and course.rounds.status == 2


def test_who_was_dismissed_does_not_end_the_next_round(trio):
    course, main, second, third = trio
    newcomers = [course.comes("10.0.0.4"), course.comes("10.0.0.5")]
    course.passes(5.0)
    for machine in (main, second, third):
        course.ends(machine, 143)
    course.ends(newcomers[0], 2)
    for machine in (main, second, third):
        course.ends(machine, 143)
    assert course.rounds.number == 3
    course.ends(newcomers[1], 2)
    assert course.rounds.phase == RUNNING and course.rounds.number == 3


def test_failures_in_a_row_end_the_launch(trio):
    course, main, second, third = trio
    for _ in range(2):
        course.ends(second, 1)
        for machine in (main, third):
            course.ends(machine, 1)
    assert course.rounds.number == 3
    course.passes(601.0)  # this one is not a start that fails
    for machine in (second, main, third):
        course.ends(machine, 1)
    assert course.rounds.number == 4 and course.rounds.failures == 1
    for _ in range(2):
        for machine in (second, main, third):
            course.ends(machine, -11)
    assert course.rounds.phase == ENDED and course.rounds.status == 1
    assert "--max-restarts 2" in course.takes(third)[-1]["reason"]


def test_too_few_machines_end_the_launch_after_the_join_timeout():
    course = Course(min_peers=3)
    main, second, third = (course.comes(f"10.0.0.{number}") for number in (1, 2, 3))
    course.passes(5.0)
    course.passes(5000.0)
    course.rounds.left(third, CUT, course.now)
    for machine in (main, second):
        course.ends(machine, 1)
    course.passes(99.0)
    assert course.rounds.phase == GATHERING
    course.passes(2.0)
    assert course.rounds.phase == ENDED and course.rounds.status == 2
    assert "2 of --min-peers 3 machines were here" in course.takes(second)[-1]["reason"]


def test_the_loss_of_a_waiting_machine_changes_nothing(trio):
    course, main, second, third = trio
    newcomer = course.comes("10.0.0.4")
    course.takes(main)
    course.rounds.left(newcomer, SILENT, course.now)
    course.passes(60.0)
    assert course.takes(main) == [] and course.rounds.number == 1
