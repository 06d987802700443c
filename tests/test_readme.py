"""What the READMEs and docs/ say is so: flags, files, links. Run as a module, it makes the tables.

That every block runs is shown by test_documents_run.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import subprocess

import pytest

from p2p_llm_forge.config import (
    CheckConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
    flags_table,
    name_first,
    parse,
)
from tests import ROOT
from tests.documents import (
    DOCS,
    OTHERS,
    PAGES,
    READMES,
    Line,
    anchor,
    blocks,
    commands,
    headings,
    lines_of,
    text_of,
    tracked,
)

FLAGS = "docs/flags.md"
SCRIPTS = {
    "train.py": TrainConfig,
    "prepare_data.py": PrepareConfig,
    "check_cluster.py": CheckConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
}
MADE_BY_A_RUN = ("artifacts/", "data/prepared/")
TABLE = r"(<!-- flags of {} -->\n)(.*?)(<!-- end -->)"
LAUNCHERS = ("python", "accelerate", "launch/ssh.sh", "sbatch", "torchrun")
OTHER_PROGRAMS = ("cp", "pip", "python3", ".", "tensorboard", "(umask", "hf")
MOST_LINES = 350  # of a README


def with_tables(text: str) -> str:
    """The text with the table of each script made again."""
    for script, config_class in SCRIPTS.items():
        rows = f"\n{flags_table(config_class)}\n"
        pattern = re.compile(TABLE.format(re.escape(script)), re.DOTALL)
        text, replaced = pattern.subn(lambda found, rows=rows: found[1] + rows + found[3], text)
        assert replaced == 1, f"the markers of {script}'s table are missing"
    return text


def file_tree(readme: str) -> list[str]:
    """The paths in the README's last text block: a name a line, two spaces deeper in a folder."""
    paths, folders = [], []
    for line in blocks(text_of(readme), "text")[-1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def test_the_tables_of_flags_are_what_the_scripts_parse():
    assert with_tables(text_of(FLAGS)) == text_of(FLAGS), "the tables are old: run `make readme`"


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_read_in_a_sitting(readme):
    assert len(text_of(readme).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """To a file of the project, and where it names a place in it, to a heading of that page."""
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for target in (one for one in targets if not re.match(r"https?:|mailto:", one)):
        path, _, place = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        assert file.exists() and file.is_relative_to(ROOT), f"{page}: no {target}"
        if place:
            known = {anchor(one) for one in headings(file.read_text(encoding="utf-8"))}
            assert place in known, f"{page}: no place {target}; there are {sorted(known)}"


def test_every_page_of_docs_is_named_in_both_readmes():
    assert {"docs/data.md", "docs/security.md", "docs/elastic.md"} <= set(DOCS)
    for page in DOCS:
        assert all(f"]({page})" in text_of(readme) for readme in READMES), page
    assert all((ROOT / page).is_file() for page in OTHERS)


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
    assert len(wings) == 7 and wings <= set(file_tree("README.md"))


def test_both_readmes_give_the_same_commands():
    """So what runs of the one runs of the other: lines, their order, and on which machine."""
    english, turkish = ([*map(machines_and_lines, bash)] for bash in bash_blocks())
    assert english == turkish
    assert len(commands("README.md")) > 10


def bash_blocks() -> list[list[str]]:
    return [blocks(text_of(readme), "bash") for readme in READMES]


def machines_and_lines(block: str) -> list[Line]:
    return [*lines_of(block)]


def test_both_readmes_have_the_same_chapters_and_examples():
    shapes = [re.findall(r"^(#+) ", text_of(readme), re.MULTILINE) for readme in READMES]
    assert shapes[0] == shapes[1]
    assert blocks(text_of("README.md"), "python") == blocks(text_of("README.tr.md"), "python")
    assert file_tree("README.md") == file_tree("README.tr.md")


def test_what_is_secret_is_made_for_its_owner_alone(tmp_path):
    """Each line is run as it stands; where WireGuard is not installed, `wg` is `cat`."""
    text = text_of("docs/security.md")
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


def test_the_firewall_lets_its_user_in_and_is_switched_on():
    rules = re.findall(r"`sudo ufw ([^`]+)`", text_of("docs/security.md"))
    assert rules[0] == "allow OpenSSH" and rules[-1] == "enable"
    assert "allow 51820/udp" in rules and "allow in on wg0" in rules


def test_the_two_ends_of_the_tunnel_fit_together():
    """Only one listens; the other, behind a router, keeps the way open; both have one MTU."""
    ends = blocks(text_of("docs/security.md"), "ini")
    first, second = (dict(re.findall(r"^(\w+) = (.*)$", end, re.MULTILINE)) for end in ends)
    assert first["ListenPort"] == "51820" and second["Endpoint"].endswith(":51820")
    assert first["MTU"] == second["MTU"] == "1280" and second["PersistentKeepalive"] == "25"
    for one, other in ((first, second), (second, first)):
        assert one["AllowedIPs"] == other["Address"].replace("/24", "/32")


@pytest.mark.parametrize(
    "line", sorted({line for page in ["README.md", *DOCS] for line in commands(page)})
)
def test_a_command_is_accepted(line):
    """Launchers and scripts know every word of it, and the files it names are there."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):  # the environment of the command
        words = words[1:]
    for word in words:
        for path in word.split("="):
            ours = path.split("/")[0] in ("accelerate_configs", "recipes", "data", "launch")
            if ours and not path.startswith(MADE_BY_A_RUN):
                assert (ROOT / path.partition(":")[0]).exists(), f"{path} is not there"
    if words[0] == "make":
        for target in words[1:]:
            makefile = text_of("Makefile")
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
        return
    if words[0] == "p2p-llm-forge":
        words[:1] = ["python", "train.py"]
    if words[0] in LAUNCHERS:
        script, flags = through_launcher(words)
        if script in ("generate.py", "export.py"):
            flags = name_first(flags)
        if script in SCRIPTS:
            parse(SCRIPTS[script], flags, script)
    else:
        assert words[0] in OTHER_PROGRAMS, f"no reader of the documents knows {words[0]}"


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
    else:
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
    return launch.training_script, launch.training_script_args


if __name__ == "__main__":
    (ROOT / FLAGS).write_text(with_tables(text_of(FLAGS)), encoding="utf-8")
