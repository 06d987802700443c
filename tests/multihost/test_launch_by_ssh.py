"""launch/ssh.sh between hosts with real ssh servers; launch/slurm.sbatch as far as it goes here."""

from __future__ import annotations

import ast
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.multihost.hosts import hosts, why_not
from tests.multihost.ssh import SSHD, serve_ssh
from tests.runs import flags
from tests.waiting import wait_until

needs_ssh = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(
        not (shutil.which("ssh") and Path(SSHD).exists()), reason="needs package openssh-server"
    ),
]


def with_ssh(test):
    """Mark a test that needs hosts and ssh servers on them."""
    for mark in needs_ssh:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two hosts with an ssh server each, and the ssh command that gets into them."""
    with hosts(2) as made:
        yield made, serve_ssh(made, tmp_path_factory.mktemp("ssh"))


def command(machines, *flags):
    """What starts launch/ssh.sh on the first host for both."""
    made, _ = machines
    script = str(ROOT / "launch" / "ssh.sh")
    addresses = ",".join(host.address for host in made)
    return ["ip", "netns", "exec", made[0].name, script, addresses, *map(str, flags)]


def environment(machines, script):
    ssh = {"SSH": machines[1], "PYTHON": sys.executable, "SCRIPT": str(script)}
    return {**os.environ, "HF_HUB_OFFLINE": "1", **ssh}


def launch(machines, *flags, script, **environ):
    """Start launch/ssh.sh on the first host for both."""
    return subprocess.Popen(
        command(machines, *flags),
        env=environment(machines, script) | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def script(tmp_path):
    """A stand-in for a training."""
    return shutil.copy(ROOT / "tests" / "multihost" / "stand_in.py", tmp_path)


def arguments(output, host):
    """What the script on the host was given."""
    (printed,) = re.findall(rf"^\[{host.address}\] running (.*)$", output, re.MULTILINE)
    return ast.literal_eval(printed)


ENDS = {"success": 0, "failure": 5, "signal": 130}


@with_ssh
@pytest.mark.parametrize("cause", ENDS)
def test_all_hosts_start_and_stop_when_one_fails_or_the_user_says_so(machines, script, cause):
    process = launch(machines, "it's", f"--{cause}", script=script)
    seen = ""
    while seen.count("running") < 2:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    for rank, host in enumerate(machines[0]):
        assert arguments(seen, host)[:4] == ["--rank", str(rank), "--world-size", "2"]
        assert arguments(seen, host)[-2:] == ["it's", f"--{cause}"]
    if cause == "signal":
        process.send_signal(signal.SIGTERM)
    output = seen + process.communicate()[0]
    assert process.returncode == ENDS[cause], output
    assert ("rank 0 saved" in output) == (cause != "success")
    assert "Terminated" not in output, output
    if cause == "failure":
        assert "a machine ended with status 5: stopping the others" in output
    # The last shell there ends at about the moment at which ssh here does.
    still_running = ["pgrep", "-f", str(script)]
    wait_until(lambda: subprocess.run(still_running, capture_output=True).stdout == b"")


@with_ssh
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_flags_arrive_byte_by_byte(machines, script, locale):
    odd = ["two\nlines\n", "ü", "日本 語", os.fsdecode(b"\xff\xfe"), "it's", '"', "", " ", "a\tb"]
    odd += ["$HOME", "`id`", "$(id)", "\\", "\\n", "!!", "*", "~", "#", "&;|<>(){}[]?", "-e"]
    process = launch(machines, "--success", *odd, script=script, LC_ALL=locale)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    for host in machines[0]:
        assert arguments(output, host)[8:] == ["--success", *odd], output


@with_ssh
def test_ctrl_c_on_a_terminal_shows_what_the_ranks_say_last(machines, script):
    pid, terminal = pty.fork()
    if pid == 0:
        # As in a terminal: shells let what they start in the background ignore it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvpe("ip", command(machines, "--signal"), environment(machines, script))
    seen = ""
    while seen.count("running") < 2:
        seen += read(terminal)
    os.write(terminal, b"\x03")
    while more := read(terminal):
        seen += more
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 130, seen
    for rank, host in enumerate(machines[0]):
        for said in (f"rank {rank} writes file 199", f"rank {rank} saved"):
            assert f"[{host.address}] {said}" in seen, seen
    assert "Killed" not in seen and "Terminated" not in seen, seen


def read(terminal):
    """What a terminal shows next; nothing once all that wrote there have ended."""
    assert select.select([terminal], [], [], 60)[0], "nothing for a minute"
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:
        return ""


@with_ssh
def test_every_machine_shows_that_it_trains(machines, prepared, tmp_path):
    first, second = machines[0]
    words = flags(prepared, tmp_path / "run")
    process = launch(machines, *words, script=ROOT / "train.py")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    main, who = f"rank 0 at {first.address}", f"[{second.address}] rank 1 of 2"
    assert [line for line in output.splitlines() if line.startswith(who)] == [
        f"{who} trains with {main}, where the progress is shown (3 updates)",
        f"{who} took part in 3 updates; figures and model are with {main}",
    ], output
    assert f"[{first.address}] peers     2 process(es)" in output


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs `shellcheck`")
def test_the_scripts_of_the_shell_are_clean():
    scripts = [file for file in (ROOT / "launch").iterdir() if file.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 2
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_job_starts_a_launcher_with_its_number_on_every_node(tmp_path):
    """With stand-ins for Slurm's commands: every node is this one."""
    for name, text in {
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "python": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "20017",
    }
    job = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--sample-prompt", "two words"]
    done = subprocess.run(job, env=environ, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"-m torch.distributed.run --node-rank {node} --nnodes 2 --nproc-per-node 1 --master-addr"
        " node-a --master-port 20017 train.py --resume auto --sample-prompt two words"
        for node in (0, 1)
    ], done.stderr
