"""The wings know little of each other: who imports whom, as CONTRIBUTING.md shows it."""

from __future__ import annotations

import ast
import graphlib

from tests import ROOT

BASE = {"errors", "files", "polling", "tables"}
ARROWS = {
    **{"errors": set(), "polling": set(), "tables": set(), "files": {"errors", "polling"}},
    **{"config": BASE, "data": BASE | {"config"}, "model": BASE | {"config"}},
    **{"peers": BASE | {"config"}, "sync": BASE | {"config", "peers"}},
    "training": BASE | {"config", "data", "model", "peers", "sync"},
}


def imports_by_module() -> dict[str, set[str]]:
    """What each module of the package imports of it, also inside functions; without the package."""
    package, found = ROOT / "p2p_llm_forge", {}
    names = {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    for name, path in names.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package.name):
                module = (node.module or "").removeprefix(package.name).lstrip(".")
                whole = {f"{module}.{one.name}".lstrip(".") for one in node.names}
                targets |= (whole & set(names)) or ({module} if module else set())
            if isinstance(node, ast.Import):
                targets |= {one.name.partition(".")[2] for one in node.names
                            if one.name.startswith(package.name + ".")}  # fmt: skip
        found[name.removesuffix(".__init__")] = targets
    assert len(found) > 50
    return found


def test_wings_import_only_what_lies_below_them():
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports_by_module().items()
        if module.partition(".")[0] in ARROWS
        for target in targets
        if target.partition(".")[0] not in ARROWS[module.partition(".")[0]]
        and target.partition(".")[0] != module.partition(".")[0]
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    tuple(graphlib.TopologicalSorter(imports_by_module()).static_order())


def test_only_scripts_tests_and_benchmarks_import_scripts():
    scripts = {"train", "prepare_data", "check_cluster"}
    for path in [*ROOT.glob("p2p_llm_forge/**/*.py"), *(ROOT / f"{name}.py" for name in scripts)]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if path.name != "__main__.py" and isinstance(node, ast.ImportFrom):
                assert node.module not in scripts, f"{path} imports {node.module}"
