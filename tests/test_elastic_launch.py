"""The command line of launch/elastic.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.errors import ForgeError
from tests import ROOT

LAUNCHER = ROOT / "launch/elastic.py"


@pytest.fixture(scope="module")
def launcher():
    """launch/elastic.py as a module; `launch` is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("elastic_launcher", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_stands_after_the_script_is_the_scripts(launcher):
    words = ["--main", "10.0.0.1", "--port", "29601", "train.py", "--port", "1", "--seed=3"]
    launch = launcher.parse(words)
    assert (launch.main, launch.port) == ("10.0.0.1", 29601)
    assert launch.script == ["train.py", "--port", "1", "--seed=3"]


@pytest.mark.parametrize(
    "script",
    [
        ["train.py", "--cluster-secret-file", "x"],
        ["train.py", "--cluster_secret_file=x"],
        ["train.py"],
    ],
)
def test_launcher_and_script_have_one_secret(launcher, script):
    before = [] if len(script) > 1 else ["--secret-file", "x"]
    launch = launcher.parse(["--main", "10.0.0.1", *before, *script])
    assert launch.secret_file == "x"
    read = parse(TrainConfig, [*launch.script[1:], "--dataset-path=d", "--output-dir=o"], "train")
    assert read.cluster_secret_file == "x"


def test_a_public_address_is_allowed_to_both(launcher):
    before = launcher.parse(["--main=1.2.3.4", "--allow-public-address", "train.py"])
    after = launcher.parse(["--main=1.2.3.4", "train.py", "--allow_public_address"])
    assert before.allow_public_address and before.script[1:] == ["--allow-public-address"]
    assert after.allow_public_address and after.script[1:] == ["--allow_public_address"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "no script"),
        (["train.py"], "--main is missing"),
        (["--main", "10.0.0.1", "trian.py"], "trian.py: no such file"),
        (["--mian", "10.0.0.1", "train.py"], "--mian"),
        (["--main", "10.0.0.1", "--port", "x", "train.py"], "--port"),
        (["--main", "10.0.0.1", "--port", "70000", "train.py"], "--port is 70000"),
        (["--main", "10.0.0.1", "--processes", "0", "train.py"], "--processes is 0"),
        (["--main", "10.0.0.1", "--lost-after", "nan", "train.py"], "--lost-after is nan"),
        (["--main", "10.0.0.1", "--min-peers=3", "--max-peers=2", "train.py"], "--max-peers 2"),
    ],
)
def test_mistakes_are_named(launcher, words, found):
    with pytest.raises(ForgeError, match=found):
        launcher.parse(words)


SECRET = ["--secret-file", "x"]


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--main 10.0.0.1 --min_peers 2", "--main 10.0.0.1 --min-peers 2"),
        ("--main=10.0.0.1 --nnodes 1:4", "--main 10.0.0.1 --min-peers 1 --max-peers 4"),
        ("--main 10.0.0.1 --nnodes=2", "--main 10.0.0.1 --min-peers 2 --max-peers 2"),
        ("--rdzv_endpoint 10.0.0.1:29700", "--main 10.0.0.1 --port 29700"),
        ("--rdzv-endpoint=10.0.0.1", "--main 10.0.0.1"),
        (
            "--master_addr 10.0.0.1 --master_port 29700 --nproc_per_node 2",
            "--main 10.0.0.1 --port 29700 --processes 2",
        ),
        ("--main 10.0.0.1 --allow_public_address", "--main 10.0.0.1 --allow-public-address"),
    ],
)
def test_torchruns_names_make_the_same_launch(launcher, typed, ours):
    script = ["train.py", "--min_peers", "1", "--nnodes", "3"]
    words = [*SECRET, *typed.split(), *script]
    assert launcher.parse(words) == launcher.parse([*SECRET, *ours.split(), *script])


@pytest.mark.parametrize(
    ("typed", "found", "fix"),
    [
        ("--node_rank 1", "launch/elastic.py has no --node_rank", "leave it out: --main"),
        ("--num_processes=4", "launch/elastic.py has no --num_processes", "use --processes N"),
        ("--max-restarst=3", "unknown argument --max-restarst", "did you mean --max-restarts"),
        ("--xyzzy", "unknown argument --xyzzy", "see launch/elastic.py --help"),
    ],
)
def test_other_flags_are_answered_by_the_nearest_few(launcher, typed, found, fix):
    with pytest.raises(ForgeError) as error:
        launcher.parse([*SECRET, "--main", "10.0.0.1", *typed.split(), "train.py"])
    (problem,) = error.value.problems
    assert problem.found == found and problem.fix.startswith(fix) and problem.fix.count("--") <= 4


def test_a_mistake_is_one_message_and_status_2_and_nothing_heavy_is_imported():
    words = [sys.executable, "-X", "importtime", LAUNCHER, "--main", "nowhere.invalid", "train.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    printed = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and printed[0].startswith("error: the main address nowhere.invalid")
    assert printed[1].startswith("  fix: ") and len(printed) == 2
    assert "asyncio" in done.stderr and "torch" not in done.stderr


def test_of_a_flag_given_twice_the_last_value_counts_as_for_the_script(launcher):
    words = ["train.py", "--cluster-secret-file", "a", "--cluster_secret_file=b"]
    launch = launcher.parse(["--main", "10.0.0.1", *words])
    assert (launch.secret_file, launch.script) == ("b", words)


def test_the_launcher_does_not_wait_for_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules)"
    run = [sys.executable, "-c", code, str(LAUNCHER)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"
