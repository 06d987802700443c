"""A YAML file is read as it is written, or refused before it costs time or memory."""

from __future__ import annotations

import pytest
import yaml

from p2p_llm_forge.config.yaml_file import MOST_BYTES, read_yaml
from p2p_llm_forge.errors import ForgeError
from tests import ROOT

FILES = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("accelerate_configs/**/*.yaml")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_projects_own_files_are_read_as_yaml_reads_them(file):
    assert read_yaml("--config", str(file), "") == yaml.safe_load(file.read_text("utf-8"))


def test_a_few_aliases_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x {b: 1}\nc: *x\nd:\n  <<: *x\n")
    assert read_yaml("--config", str(tmp_path / "a.yaml"), "") == {
        **{"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}
    }
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml("--config", str(tmp_path / "empty.yaml"), "") == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &a [x]\n" + "b: [" + "*a, " * 20 + "*a]\n", "too many aliases"),
        ("a: " + "[" * 50_000, "too many lists in lists"),
        ("a: " + "{b: " * 25 + "}" * 25, "too many lists in lists"),
        ("a: " + "x" * MOST_BYTES, "is longer than"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: 2020-13-45", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("- a", "holds a list"),
    ],
    ids=range(9),
)
def test_what_would_grow_or_is_no_mapping_is_refused(text, found, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ForgeError, match=found):
        read_yaml("--config", str(tmp_path / "a.yaml"), "")
