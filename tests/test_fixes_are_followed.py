"""Every fix that check_cluster.py can print is followed in a test, and names only what is there."""

from __future__ import annotations

import ast
import re

import pytest

from p2p_llm_forge.config import CheckConfig, PrepareConfig, TrainConfig, flags_table
from tests import ROOT
from tests.fixes import FOLLOWED
from tests.test_architecture import imports_by_module

PACKAGE = "p2p_llm_forge."
# Of what check_cluster.py imports: flags and files, the launch and its peers, the model and its
# batches. What is wrong with prepared data, or with a checkpoint to resume from, is tested there.
LOOKED_AT = re.compile(
    r"check_cluster|p2p_llm_forge\.(peers\..*|model\..*|training\.(job|plan|texts|fetch\w+)"
    r"|config\.(check|evaluation|launch|lora|fields|names_of_train|other_names|parser|sync|train"
    r"|yaml_file))"
)
BUILDERS = {
    *("warning", "failure", "refusal", "ForgeError", "RankFailure", "LostPeer"),
    *("Finding", "Problem", "require"),
}
# Flags of other programs that a fix may name.
OF_OTHERS = {
    *("--help", "--help-all"),
    *("--revision", "--local-dir"),  # hf download
    *("--add-port", "--zone", "--add-source"),  # firewall-cmd
    *("--multi_gpu", "--config_file", "--num_cpu_threads_per_process"),  # accelerate launch
    *("--node-rank", "--nnodes", "--max-restarts"),  # torchrun
    *("--main", "--secret-file", "--min-peers"),  # launch/elastic.py
}


def modules() -> dict[str, ast.Module]:
    """What check_cluster.py can come to, as far as it is looked at."""
    imports, found, left = imports_by_module(), set[str](), ["check_cluster"]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += imports[name]
    found = {name for name in found if LOOKED_AT.fullmatch(name)}
    assert len(found) > 20
    return {
        name: ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text("utf-8"))
        for name in found
        if (ROOT / (name.replace(".", "/") + ".py")).is_file()
    }


def is_built(node: ast.AST) -> bool:
    """Whether a problem is built here, or a judgement is given of which one is built."""
    made = node.func if isinstance(node, ast.Call) else None
    if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
        made = node.value.elts[0]
    return getattr(made, "id", getattr(made, "attr", None)) in BUILDERS


def places(tree: ast.AST) -> dict[str, list[int]]:
    """The lines at which problems are built, by the name of the outermost function."""
    found: dict[str, list[int]] = {}

    def look(node: ast.AST, function: str) -> None:
        for inner in ast.iter_child_nodes(node):
            is_function = isinstance(inner, ast.FunctionDef) and not function
            if is_built(inner):
                found.setdefault(function, []).append(inner.lineno)
            look(inner, inner.name if is_function else function)

    look(tree, "")
    return found


def test_every_place_that_builds_a_fix_has_a_test_that_follows_it():
    found = {
        f"{name.removeprefix(PACKAGE)}:{function}": lines
        for name, tree in modules().items()
        for function, lines in places(tree).items()
    }
    assert len(found) > 60
    for place in sorted({*found, *FOLLOWED}):
        lines, tests = found.get(place, []), FOLLOWED.get(place, ())
        assert len(lines) == len(tests), (
            f"{place} builds {len(lines)} problems (lines {lines}), tests/fixes.py names"
            f" {len(tests)} tests: follow each fix in a test, literally, and name it there"
        )


def test_the_tests_that_are_named_exist():
    named = {test for tests in FOLLOWED.values() for test in tests if not test.startswith("(")}
    assert len(named) > 40
    for test in named:
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, test
    reasons = [test for tests in FOLLOWED.values() for test in tests if test not in named]
    assert len([one for one in reasons if "carries" not in one]) <= 2, "follow it"


def texts() -> list[str]:
    """The sentences that the modules may print; what is filled in is left out."""
    found = []
    for tree in modules().values():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "...") for part in node.values]
                found.append("".join(part if isinstance(part, str) else "..." for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text for text in found if " " in text]


def test_flags_that_fixes_name_exist():
    known = OF_OTHERS | {
        flag
        for config in (CheckConfig, TrainConfig, PrepareConfig)
        for flag in re.findall(r"--[a-z][\w-]*", flags_table(config))
    }
    named = {flag for text in texts() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)}
    assert len(named) > 25 and named <= known, named - known


def test_files_and_pages_that_fixes_name_exist():
    everything = "\n".join(texts())
    files = set(re.findall(r"(?<![\w/.<])((?:[a-z_]+/)*[a-z_]+\.(?:py|yaml))", everything))
    made_by_the_user = {"my_node.yaml"}
    assert {"train.py", "launch/elastic.py", "prepare_data.py"} <= files
    assert [file for file in files - made_by_the_user if not (ROOT / file).is_file()] == []
    pages = set(re.findall(r"(?<![\w/.<])docs/[\w-]+\.md", everything))
    assert {"docs/security.md", "docs/elastic.md"} <= pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    assert "README, " not in everything


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    raise ForgeError('a', 'b')",
        "class A:\n    def f(self):\n        def inner():\n            yield failure, 'a', 'b'",
        "def f(problems):\n    problems.require(False, 'a', 'b')",
    ],
)
def test_the_inventory_finds_each_way_to_build_a_problem(code):
    assert list(places(ast.parse(code))) == ["f"]
