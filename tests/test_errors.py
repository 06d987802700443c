"""Messages for users: two fields, all problems at once, status 2 and no traceback."""

from __future__ import annotations

import pytest

from p2p_llm_forge.errors import ForgeError, Problem, Problems, nearest, run_script


def test_an_error_has_what_was_found_and_the_fix():
    error = ForgeError("--a: 3 is no colour", "use --a red: it always works")
    assert error.problems == (Problem("--a: 3 is no colour", "use --a red: it always works"),)
    assert str(error) == "--a: 3 is no colour\n  fix: use --a red: it always works"


def test_several_problems_are_numbered_and_keep_their_fields():
    problems = Problems()
    problems.require(True, "never", "never")
    problems.require(False, "one", "do this")
    problems.add(ForgeError("two\n  in two lines", "do that", where="rank 1 (berta)"))
    with pytest.raises(ForgeError) as raised:
        problems.raise_any()
    assert [problem.fix for problem in raised.value.problems] == ["do this", "do that"]
    assert str(raised.value).splitlines() == [
        "2 problems:",
        "  1. one",
        "       fix: do this",
        "  2. rank 1 (berta): two",
        "       in two lines",
        "       fix: do that",
    ]


def test_without_problems_nothing_is_raised():
    Problems().raise_any()


def test_the_nearest_words_are_offered_and_all_where_none_is_near():
    assert nearest("colur", ["colour", "shape"]) == "did you mean colour?"
    assert nearest("x", ["colour", "shape"]) == "choose from: colour, shape"


class OfThisRank(ForgeError):
    """A failure that only one rank knows of."""

    status, is_of_this_rank = 1, True


@pytest.mark.parametrize(
    ("raised", "local_rank", "status", "printed"),
    [
        (ForgeError("found", "fix it"), 0, 2, "error: found\n  fix: fix it\n"),
        (OfThisRank("found", "fix it"), 1, 1, "error: found\n  fix: fix it\n"),
        (KeyboardInterrupt(), 0, 130, "interrupted\n"),
    ],
)
def test_a_script_ends_with_one_message_and_a_status(raised, local_rank, status, printed, capsys):
    def main() -> int:
        raise raised

    with pytest.raises(SystemExit) as end:
        run_script(main, local_rank)
    assert end.value.code == status
    assert capsys.readouterr().err == printed


def test_what_all_ranks_report_is_printed_by_one(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    def main() -> int:
        raise ForgeError("found", "fix it")

    with pytest.raises(SystemExit) as end:
        run_script(main, local_rank=1)
    assert end.value.code == 2
    assert capsys.readouterr().err == ""
