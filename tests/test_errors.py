"""Messages for users: two fields, all problems at once, status 2 and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from p2p_llm_forge.errors import (
    ForgeError,
    Problem,
    Problems,
    counted,
    nearest,
    plain,
    quoted,
    run_script,
)
from tests import ROOT


def test_an_error_has_what_was_found_and_the_fix():
    error = ForgeError("--a: 3 is no colour", "use --a red: it always works")
    assert error.problems == (Problem("--a: 3 is no colour", "use --a red: it always works"),)
    assert str(error) == "--a: 3 is no colour\n  fix: use --a red: it always works"


STRANGE = {
    "\x1b[31mred\x1b[0m": "red",
    "\x1b]0;title\x07text": "text",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x9b2Jcleared": "cleared",
    "over\rwritten\x08\x00\x7f": "overwritten",
    "gnp\u202e.exe\u2066": "gnp.exe",
    "half \ud83d a letter": "half \ufffd a letter",
    "\u2028a\x85b\ufeff\U000e0041": " ab",
    "kept:\tü 模型 👩🏽\u200d🚀\n": "kept:\tü 模型 👩🏽\u200d🚀\n",
}


@pytest.mark.parametrize("text", STRANGE, ids=ascii)
def test_what_a_terminal_would_obey_is_not_printed(text):
    problem = Problem(text, text, text, by=text)
    assert {problem.found, problem.fix, problem.where, problem.by} == {STRANGE[text]}


def test_texts_of_others_are_bounded_and_on_one_line():
    assert plain("ab" * 10**6).startswith("abab") and len(plain("ab" * 10**6)) < 8100
    assert quoted('x"\nerror: y') == '"x\' error: y"'
    assert len(quoted("x\n" * 10**6)) < 900


def test_a_peers_problem_is_named_and_quoted():
    assert str(Problem("it\nfails", "try", by="rank 1 (berta)")) == (
        'rank 1 (berta) says: "it fails"\n  fix: "try"'
    )
    named = Problem("it fails", "try", where="rank 1 (berta): a.yaml", by="rank 1 (berta)")
    assert str(named) == 'rank 1 (berta): a.yaml: "it fails"\n  fix: "try"'


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
    problems = Problems()
    problems.require(True, "never", "never")
    assert problems.raise_any() is None and problems.found == []


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


@pytest.mark.skipif(os.name == "nt", reason="needs pipes as Unix has them")
def test_a_reader_that_has_enough_is_no_error():
    """`python train.py --help | head`: what it closes is found out at the latest at the end."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "train.py", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    ended = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_the_machine_refuses_is_one_message(capsys):
    for raised, found in (
        (OSError(28, "No space left on device", "/x"), "No space left on device: '/x'"),
        (MemoryError(), "out of memory"),
    ):

        def main(error: BaseException = raised) -> int:
            raise error

        with pytest.raises(SystemExit) as end:
            run_script(main)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and found in printed and "fix: " in printed


def test_what_all_ranks_report_is_printed_by_one(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    def main() -> int:
        raise ForgeError("found", "fix it")

    with pytest.raises(SystemExit) as end:
        run_script(main, local_rank=1)
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_one_is_no_plural():
    assert [counted(n, "file") for n in (0, 1, 2, 1200)] == [
        "0 files",
        "1 file",
        "2 files",
        "1,200 files",
    ]


LOSES_ITS_STORE = """
import datetime
from p2p_llm_forge.errors import run_script

def main():
    import torch.distributed as dist
    options = {"wait_for_workers": False, "timeout": datetime.timedelta(seconds=5)}
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, **options)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, **options)
    del server
    try:
        client.get("key")
    except dist.DistError:
        print("lost")

run_script(main)
"""


@pytest.mark.parametrize("asked", [None, "WARNING"])
def test_torchs_frames_are_printed_only_where_they_are_asked_for(asked):
    environ = {name: one for name, one in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    environ |= {"TORCH_CPP_LOG_LEVEL": asked} if asked else {}
    command = [sys.executable, "-c", LOSES_ITS_STORE]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "lost\n")
    assert ("frame #" in ended.stderr) == bool(asked), ended.stderr
