"""launch/ssh.sh between hosts with real ssh servers; launch/slurm.sbatch as far as it goes here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.multihost.hosts import hosts, why_not
from tests.waiting import wait_until

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_ssh = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(
        not (shutil.which("ssh") and Path(SSHD).exists()), reason="needs package openssh-server"
    ),
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two hosts with an ssh server each, and the ssh command that gets into them."""
    folder = tmp_path_factory.mktemp("ssh")
    for key in ("host", "user"):
        keygen = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        subprocess.run(keygen, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and only the system's service makes it
    settings = (
        *(f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/user.pub", "StrictModes=no"),
        *("UsePAM=no", "PermitRootLogin=yes", "PidFile=none"),
    )
    options = [word for setting in settings for word in ("-o", setting)]
    with hosts(2) as made:
        for host in made:
            host.start(SSHD, "-D", "-e", "-f", "/dev/null", *options, log=folder / "sshd.log")
        for host in made:
            wait_until(lambda host=host: host.run("ss", "-ltnH", "sport = :22"))
        yield (
            made,
            (
                f"ssh -i {folder}/user -o StrictHostKeyChecking=no -o LogLevel=ERROR"
                f" -o UserKnownHostsFile={folder}/known"
            ),
        )


def launch(machines, *flags, script):
    """Start launch/ssh.sh on the first host for both."""
    made, ssh = machines
    return subprocess.Popen(
        [
            *("ip", "netns", "exec", made[0].name, str(ROOT / "launch" / "ssh.sh")),
            ",".join(host.address for host in made),
            *map(str, flags),
        ],
        env={**os.environ, "SSH": ssh, "PYTHON": sys.executable, "SCRIPT": str(script)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


ENDS = {"success": 0, "failure": 5, "signal": 130}


@pytest.mark.parametrize("cause", [pytest.param(cause, marks=needs_ssh) for cause in ENDS])
def test_all_hosts_start_and_stop_when_one_fails_or_the_user_says_so(machines, tmp_path, cause):
    script = shutil.copy(ROOT / "tests" / "multihost" / "stand_in.py", tmp_path)
    process = launch(machines, "it's", f"--{cause}", script=script)
    seen = ""
    while seen.count("running") < 2:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    assert "--rank 1 --world-size 2" in seen and "it's" in seen
    if cause == "signal":
        process.send_signal(signal.SIGTERM)
    output = seen + process.communicate()[0]
    assert process.returncode == ENDS[cause], output
    assert ("rank 0 saved" in output) == (cause != "success")
    for host in machines[0]:
        assert f"[{host.address}] running" in output
    if cause == "failure":
        assert "a machine ended with status 5: stopping the others" in output
    # The last shell there ends at about the moment at which ssh here does.
    still_running = ["pgrep", "-f", str(script)]
    wait_until(lambda: subprocess.run(still_running, capture_output=True).stdout == b"")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs `shellcheck`")
def test_the_scripts_of_the_shell_are_clean():
    scripts = sorted((ROOT / "launch").iterdir())
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
