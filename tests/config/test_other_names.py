"""Words of other programs become words of ours, or an answer, whatever stands around them."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config.other_names import (
    Meaning,
    answer,
    only,
    renamed,
    switch,
    translated,
    typed_in,
    unless_off,
    unless_on,
    values,
)

NAMES = {
    "lr": renamed("--rate"),
    "use_it": renamed("--it", is_switch=True),
    "bf16": switch("--precision bf16"),
    "optim": values({"adamw_torch": "--optimizer adamw"}, "fix: use --optimizer NAME"),
    "gone": answer("use --other {value}"),
    "off": unless_off("leave it out"),
    "on": unless_on("leave it out"),
    "beta": only(0.9, "it is 0.9, not {value}"),
    "pair": Meaning(lambda typed: ["--both"] if typed.has("lr") else ["--one"]),
}


def read(line: str) -> tuple[str, list[tuple[str, str]]]:
    answers: list[tuple[str, str]] = []
    words = line.split()
    found = translated(words, NAMES, typed_in(words), lambda *one: answers.append(one))
    return " ".join(found), answers


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--lr 3 --ours 4", "--rate 3 --ours 4"),
        ("--ours 4 --lr=3", "--ours 4 --rate 3"),
        ("--lr -1", "--rate -1"),
        ("--lr", "--rate"),
        ("--lr --ours", "--rate --ours"),
        ("--use-it --ours", "--it --ours"),
        ("--use_it False", "--it False"),
        ("--bf16 folder", "--precision bf16 folder"),
        ("--bf16 True folder", "--precision bf16 folder"),
        ("--bf16=False", ""),
        ("--optim adamw_torch", "--optimizer adamw"),
        ("--off False --on --on=True", ""),
        ("--beta 0.90", ""),
        ("--pair", "--one"),
        ("--pair --lr 1", "--both --rate 1"),
        ("words without flags", "words without flags"),
    ],
)
def test_names_become_ours(typed, ours):
    assert read(typed) == (ours, [])


@pytest.mark.parametrize(
    ("typed", "flag", "fix"),
    [
        ("--gone 7", "--gone", "use --other 7"),
        ("--gone=7", "--gone", "use --other 7"),
        ("--optim lion", "--optim", "use --optimizer NAME"),
        ("--off", "--off", "leave it out"),
        ("--on=no", "--on", "leave it out"),
        ("--beta 0.8", "--beta", "it is 0.9, not 0.8"),
        ("--beta much", "--beta", "it is 0.9, not much"),
    ],
)
def test_what_has_only_an_answer_gets_it_and_nothing_else_is_lost(typed, flag, fix):
    assert read(f"--ours 1 {typed} --lr 2") == ("--ours 1 --rate 2", [(flag, fix)])


def test_the_last_value_of_a_flag_counts():
    assert typed_in(["a", "--x", "1", "--y", "--x=2", "--z-z"]) == {
        **{"x": "2", "y": "true"},
        "z_z": "true",
    }
