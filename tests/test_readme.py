"""What the READMEs say is so: flags, commands, files. Run as a module, this rewrites the tables."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from p2p_llm_forge.config import CheckConfig, PrepareConfig, TrainConfig, flags_table, parse
from tests import ROOT
from tests.ports import free_port

READMES = ["README.md", "README.tr.md"]
SCRIPTS = {
    "train.py": TrainConfig,
    "prepare_data.py": PrepareConfig,
    "check_cluster.py": CheckConfig,
}
MADE_BY_A_RUN = ("artifacts/", "data/prepared/")
TABLE = r"(<!-- flags of {} -->\n)(.*?)(<!-- end -->)"


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def with_tables(text: str) -> str:
    """The text with the table of each script made again."""
    for script, config_class in SCRIPTS.items():
        rows = f"\n{flags_table(config_class)}\n"
        pattern = re.compile(TABLE.format(re.escape(script)), re.DOTALL)
        text, replaced = pattern.subn(lambda found, rows=rows: found[1] + rows + found[3], text)
        assert replaced == 1, f"the markers of {script}'s table are missing"
    return text


def blocks(text: str, language: str) -> list[str]:
    """The contents of all code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(readme: str) -> list[str]:
    """The command lines in the README's bash blocks, in order, without comments."""
    lines = [line for block in blocks(text_of(readme), "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def tracked() -> list[str]:
    """The files that git keeps."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs a git checkout: clone the project to run this")
    return listed.stdout.splitlines()


def file_tree(readme: str) -> list[str]:
    """The paths in the README's last text block: a name a line, two spaces deeper in a folder."""
    paths, folders = [], []
    for line in blocks(text_of(readme), "text")[-1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


@pytest.mark.parametrize("readme", READMES)
def test_the_tables_of_flags_are_what_the_scripts_parse(readme):
    assert with_tables(text_of(readme)) == text_of(readme), "the tables are old: run `make readme`"


def test_a_table_has_a_row_for_every_flag_with_its_default_and_help():
    rows = flags_table(TrainConfig).splitlines()[2:]
    flags = [row for row in rows if row.startswith("| `--")]
    assert len(flags) == len(dataclasses.fields(TrainConfig))
    headings = [row for row in rows if row.startswith("| **")]
    assert len(headings) == len(TrainConfig.GROUPS) and len(flags) + len(headings) == len(rows)
    assert (
        "| `--save-every`<br>`--checkpointing_steps` | `500` | updates between checkpoints; the"
        " last update is always saved |" in rows
    )
    assert (
        "| `--encoding-errors` | `strict` | bytes that are not UTF-8: refuse them, or replace each"
        " by U+FFFD (`strict`, `replace`) |" in flags_table(PrepareConfig).splitlines()
    )


@pytest.mark.parametrize("readme", READMES)
def test_every_file_in_the_tree_exists(readme):
    paths = file_tree(readme)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


@pytest.mark.parametrize("readme", READMES)
def test_everything_at_the_top_is_in_the_tree(readme):
    top = {path.split("/")[0] + "/" * ("/" in path) for path in tracked()}
    in_tree = set(file_tree(readme))
    assert "train.py" in top and "tests/" in top
    assert top <= in_tree, f"not in the file tree of {readme}: {sorted(top - in_tree)}"


def test_every_wing_is_in_the_tree():
    package = ROOT / "p2p_llm_forge"
    wings = {f"p2p_llm_forge/{found.parent.name}/" for found in package.glob("*/__init__.py")}
    assert len(wings) == 6 and wings <= set(file_tree("README.md"))


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README.tr.md")
    assert len(commands("README.md")) > 10


def test_both_readmes_have_the_same_chapters_and_examples():
    shapes = [re.findall(r"^(#+) ", text_of(readme), re.MULTILINE) for readme in READMES]
    assert shapes[0] == shapes[1]
    assert blocks(text_of("README.md"), "python") == blocks(text_of("README.tr.md"), "python")
    assert file_tree("README.md") == file_tree("README.tr.md")


@pytest.mark.parametrize("readme", READMES)
def test_what_is_secret_is_made_for_its_owner_alone(readme, tmp_path):
    """Each line is run as it stands; where WireGuard is not installed, `wg` is `cat`."""
    text = text_of(readme)
    lines = re.findall(r"`(\(umask 077; [^`]+\)|wg [^`]+)`", text)
    assert len(lines) >= 3 and "wg genkey |" not in text
    (tmp_path / "wg").write_text("#!/bin/sh\nexec cat\n")
    (tmp_path / "wg").chmod(0o755)
    environ = {"PATH": f"{os.environ['PATH']}:{tmp_path}"}
    for line in lines:
        before = set(tmp_path.iterdir())
        subprocess.run(
            ["sh", "-c", f"umask 022; {line}"],
            cwd=tmp_path, env=environ, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        (made,) = set(tmp_path.iterdir()) - before
        assert made.stat().st_mode & 0o077 == 0 or made.name == "public.key"


@pytest.mark.parametrize("readme", READMES)
def test_the_firewall_lets_its_user_in_and_is_switched_on(readme):
    rules = re.findall(r"`sudo ufw ([^`]+)`", text_of(readme))
    assert rules[0] == "allow OpenSSH" and rules[-1] == "enable"
    assert "allow 51820/udp" in rules and "allow in on wg0" in rules


@pytest.mark.parametrize("readme", READMES)
def test_the_two_ends_of_the_tunnel_fit_together(readme):
    """Only one listens; the other, behind a router, keeps the way open; both have one MTU."""
    ends = re.findall(r"^   ```ini\n(.*?)^   ```$", text_of(readme), re.DOTALL | re.MULTILINE)
    first, second = (dict(re.findall(r"^   (\w+) = (.*)$", end, re.MULTILINE)) for end in ends)
    assert first["ListenPort"] == "51820" and second["Endpoint"].endswith(":51820")
    assert first["MTU"] == second["MTU"] == "1280" and second["PersistentKeepalive"] == "25"
    for one, other in ((first, second), (second, first)):
        assert one["AllowedIPs"] == other["Address"].replace("/24", "/32")


@pytest.mark.parametrize("line", commands("README.md"))
def test_a_command_is_accepted(line):
    """Targets, launchers and scripts know every word of it, and the files it names are there."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):  # the environment of the command
        words = words[1:]
    if words[0] == "make":
        makefile = text_of("Makefile")
        for target in words[1:]:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
        return
    if words[0] == "p2p-llm-forge":
        words[:1] = ["python", "train.py"]
    for word in words:
        for path in word.split("="):
            ours = path.split("/")[0] in ("accelerate_configs", "recipes", "data", "launch")
            if ours and not path.startswith(MADE_BY_A_RUN):
                assert (ROOT / path).exists(), f"{path} is not there"
    if words[0] == "cp":
        return
    if words[0] == "pip":
        assert words[1:] in (["install", "-e", "."], ["install", "-r", "requirements.txt"])
        return
    script, flags = through_launcher(words)
    parse(SCRIPTS[script], flags, script)


def chapter(readme: str, title: str) -> list[str]:
    """The command lines of one chapter."""
    text = text_of(readme).split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.slow
def test_the_first_commands_work_on_the_sample_text_as_they_are_typed(tmp_path):
    """All of the chapters on one machine and on data, but installing, recipes, a second machine
    and ten minutes.

    The first training goes to its end, further ones take one step.
    """
    lines = chapter("README.md", "On one machine") + chapter("README.md", "Preparing data")
    left_out = ("pip ", "p2p-llm-forge", "two_machines/", "--config recipes/", "--minutes")
    lines = [line for line in lines if not any(word in line for word in left_out)]
    assert len(lines) >= 9 and lines[0] == "cp data/sample_corpus.txt corpus.txt"
    for name in tracked():
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ["PET_MASTER_PORT"] = str(free_port())  # torchrun's is the same one for everybody
    trainings = [line for line in lines if " train.py " in line]
    assert "accelerate launch" in trainings[0] and len(trainings) > 3
    for line in lines:
        less = " --max-steps 1" if line in trainings[1:] else ""
        done = subprocess.run(
            ["sh", "-c", line + less],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    for made in ("artifacts/x", "artifacts/one", "artifacts/two", "artifacts/text"):
        assert (tmp_path / made / "model.safetensors").exists()
    for made in ("x", "text", "mixture"):
        assert (tmp_path / "data" / "prepared" / made / "manifest.json").exists()


def through_launcher(words: list[str]) -> tuple[str, list[str]]:
    """The script and its flags, after the launcher's own parser has read the launcher's part."""
    if words[:2] == ["python", "launch/elastic.py"]:
        parser = runpy.run_path(str(ROOT / words[1]))["make_parser"]()
        script, *flags = parser.parse_args(words[2:]).script
        return script, flags
    if words[0] == "python":
        return words[1], words[2:]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
    elif words[0] == "launch/ssh.sh":
        return "train.py", words[2:]  # after the hosts
    elif words[0] == "sbatch":
        return "train.py", words[2:]  # after the job's script
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
    else:
        raise AssertionError(f"no reader of the README knows {words[0]}")
    return launch.training_script, launch.training_script_args


if __name__ == "__main__":
    for name in READMES:
        (ROOT / name).write_text(with_tables(text_of(name)), encoding="utf-8")
