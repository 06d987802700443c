"""How an option is declared, and what a value of the wrong type comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from p2p_llm_forge.config.fields import Options, flag, multiples_near, option
from p2p_llm_forge.errors import Problems


@dataclass
class Group(Options):
    """A group with a field of each kind."""

    size: int = flag(3, "a size", "--the_size")
    rate: float | None = flag(None, "a rate")
    kind: Literal["a", "b"] = flag("a", "a kind")
    paths: list[str] = flag([], "paths")
    is_on: bool = flag(False, "a switch")


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ({"size": 2.5}, "give a whole number"),
        ({"size": True}, "give a whole number"),
        ({"rate": "1e-3"}, "give a number"),
        ({"kind": "c"}, "choose from: a, b"),
        ({"paths": 3}, "give a list of texts"),
        ({"is_on": 1}, "give true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_what_to_give(asked, fix):
    (problem,) = Group(**asked).problems().found
    assert problem.fix == fix and repr(*asked.values()) in problem.found


def test_values_of_the_right_type_are_no_problem_and_a_whole_number_is_a_number():
    assert not Group(size=1, rate=2, kind="b", paths=["x"], is_on=True).problems().found


def test_two_configs_share_no_list():
    one, other = Group(), Group()
    one.paths.append("x")
    assert other.paths == []


def test_a_group_checks_only_values_of_the_right_type():
    class Strict(Group):
        def check(self, problems: Problems) -> None:
            problems.require(self.size > 5, f"{self.size} is small", "use 6")

    Strict.GROUPS = [Strict]
    assert [one.fix for one in Strict(size="x").problems().found] == [
        "give a whole number",
        "use 6",
    ]


def test_flags_are_written_with_dashes():
    assert option("save_every") == "--save-every"
    assert Group.__dataclass_fields__["size"].metadata["aliases"] == ["--the_size", "--the-size"]


def test_multiples_near_a_number_leave_out_zero():
    assert multiples_near(100, 30) == "90 or 120"
    assert multiples_near(10, 30) == "30"
