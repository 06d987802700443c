"""The help: one screen of common flags in a second, all flags on request, tables."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from p2p_llm_forge.config import (
    CheckConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
    flags_table,
)
from p2p_llm_forge.config.help import in_short
from tests import ROOT

CONFIGS = {
    "train.py": TrainConfig,
    "prepare_data.py": PrepareConfig,
    "check_cluster.py": CheckConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
}
SCRIPTS = [*CONFIGS, "launch/elastic.py"]


def printed(script: str, flag: str) -> list[str]:
    """What a script prints, and at last that it imported no heavy library."""
    words = [sys.executable, "-m", "tests.config.help_imports", script, flag]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "imported: []"
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_one_screen_of_flags_each_on_its_line(script):
    lines = printed(script, "--help")
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert any("--help-all" in line for line in lines)
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(flags) == len({*flags}) >= 4
    if script in CONFIGS:
        ours = {f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(CONFIGS[script])}
        assert {*flags} <= ours
        assert all(len(line.split("  ")[-1].split()) > 2 for line in lines if "  --" in line)


@pytest.mark.parametrize("script", CONFIGS)
def test_help_all_shows_each_flag_once_under_headings(script):
    shown, _, others = "\n".join(printed(script, "--help-all")).partition("\nOther names")
    assert "--num_train_epochs for --epochs" in others or script != "train.py"
    config_class = CONFIGS[script]
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    names = [field.name for field in dataclasses.fields(config_class)]
    assert sorted(flag.rstrip(",") for flag in flags) == sorted(
        f"--{name.replace('_', '-')}" for name in names
    )
    for group in config_class.GROUPS:
        assert f"\n{group.heading}:\n" in shown
    assert "(default: )" not in shown and "(default: None)" not in shown


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_what_is_called_common_exists(config_class):
    names = {field.name for field in dataclasses.fields(config_class)}
    for holder in (config_class, *config_class.GROUPS):
        assert {*holder.COMMON} <= names


def test_a_text_is_cut_where_a_clause_ends():
    text = "a folder (or a file); with more, and more; and still more words"
    assert in_short(text, 100) == text
    assert in_short(text, 50) == "a folder (or a file); with more, and more"
    assert in_short(text, 30) == "a folder (or a file)"
    assert in_short(text, 12) == "a folder"
    assert in_short("one, two, three words", 12) == "one, two"
    assert in_short("words and more words", 14) == "words and ..."


def test_the_table_of_a_config_that_extends_another_has_only_what_it_adds():
    rows = [row for row in flags_table(CheckConfig).splitlines() if row.startswith("| `--")]
    added = len(dataclasses.fields(CheckConfig)) - len(dataclasses.fields(TrainConfig))
    assert len(rows) == added == 6
