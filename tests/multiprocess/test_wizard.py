"""The files that the real `accelerate config` writes either work or are refused with the fix."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import termios
from pathlib import Path

import pytest

from p2p_llm_forge.peers.findings import FAILURE
from p2p_llm_forge.peers.launch_files import judge_launch_file, read_launch_file
from tests import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

NO, MULTI_CPU, MULTI_GPU = "0", "1", "4"  # rows of the menu "Which type of machine"
MACHINE = "Which type of machine"
TWO_NODES = {
    "How many different machines": "2",
    "What is the rank of this machine": "1",
    "What is the IP address": "10.0.0.1",
    "What is the port": "29500",
}
FIX = "write `distributed_type: MULTI_GPU` (with `use_cpu: true` for CPUs)"
COUNT_PROCESSES = ROOT / "tests" / "multiprocess" / "count_processes.py"


def ask_the_wizard(zygote, answers, file):
    """Run `accelerate config` on a pseudo-terminal; what `answers` does not know gets Enter."""
    ours, theirs = pty.openpty()
    # Menus read Enter as CR, questions as LF: neither may become the other on its way.
    settings = termios.tcgetattr(theirs)
    settings[0] &= ~termios.ICRNL
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    terminal = os.ttyname(theirs)
    pid = zygote.start(
        ["--config_file", str(file)],
        Path(terminal),
        script="accelerate.commands.config.config",
        terminal=terminal,
    )
    left, shown = dict(answers), ""
    is_question = re.compile(r"(\]:? ?|\? ?|selecting with enter\s.*)$", re.DOTALL)

    def answer_what_it_asks() -> bool:
        nonlocal shown
        if select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 1 << 16).decode(errors="replace")
        elif is_question.search(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)):
            known = next((question for question in left if question in shown), None)
            answer = left.pop(known) if known else ""
            enter = "\r" if "selecting with enter" in shown else "\n"
            shown = ""
            os.write(ours, (answer + enter).encode())
        return zygote.has_ended(pid)

    wait_until(answer_what_it_asks)
    os.close(ours)
    os.close(theirs)
    assert zygote.wait(pid) == 0, shown
    assert not left, f"the wizard did not ask {left}"
    return read_launch_file(str(file))


@pytest.mark.parametrize(
    ("answers", "processes"),
    [
        ({MACHINE: NO, "CPU only": "yes"}, 1),
        ({MACHINE: MULTI_GPU, "How many GPU": "2"}, 2),
        ({MACHINE: MULTI_CPU, "should be used for distributed": "2"}, None),
        ({MACHINE: MULTI_CPU, **TWO_NODES, "should be used for distributed": "2"}, None),
        ({MACHINE: MULTI_GPU, **TWO_NODES, "How many GPU": "4"}, 2),
    ],
    ids=["cpu", "2 gpus", "2 cpu processes", "2 cpu nodes", "2 gpu nodes"],
)
def test_a_file_of_the_wizard_works_or_is_refused(zygote, run, tmp_path, answers, processes):
    file = ask_the_wizard(zygote, answers, tmp_path / "wizard.yaml")
    failures = [found for found in judge_launch_file(file, gpus=2) if found.level == FAILURE]
    if processes is None:
        assert [finding.fix for finding in failures] == [FIX]
        assert "knows nothing of the others" in failures[0].found
        return
    assert failures == []
    assert file.processes_here == processes
    if file.machines == 1 and processes > 1:  # a plain process needs no proof
        accelerate = Path(sys.executable).parent / "accelerate"
        status, output = run(
            *(accelerate, "launch", "--config_file", file.path, "--main_process_port", "0"),
            *(COUNT_PROCESSES, f"{tmp_path}/rank-"),
        )
        assert status == 0, output
        started = sorted(tmp_path.glob("rank-*"))
        assert len(started) == processes
        assert {made.read_text() for made in started} == {str(processes)}
