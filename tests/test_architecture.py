"""The wings know little of each other: who may import whom, as CONTRIBUTING.md draws it."""

from __future__ import annotations

import ast
import graphlib

from tests import ROOT

BASE = {"errors", "files", "limits", "memory", "polling", "shapes", "tables"}
ARROWS = {
    **dict.fromkeys(("errors", "memory", "polling", "shapes", "tables"), set()),
    "limits": {"memory"},
    "files": {"errors", "polling", "shapes"},
    **{wing: BASE | {"config"} for wing in ("config", "data", "model", "peers")},
    "sync": BASE | {"config", "peers"},
    "training": BASE | {"config", "data", "model", "peers", "sync"},
    "using": BASE | {"config", "model"},
}


def imports_by_module() -> dict[str, set[str]]:
    """What each module imports of the package and of the scripts, also inside functions."""
    paths = [*ROOT.glob("p2p_llm_forge/**/*.py"), *ROOT.glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    found: dict[str, set[str]] = {name.removesuffix(".__init__"): set() for name in names}
    for name, path in zip(found, paths, strict=True):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {one.name for one in node.names} & found.keys()
            if isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{one.name}" for one in node.names}
                found[name] |= (inner & found.keys()) or ({node.module} & found.keys())
    assert sum(map(len, found.values())) > 100
    return found


def test_wings_import_only_what_lies_below_them():
    for module, targets in imports_by_module().items():
        wing = (module.split(".") + [""])[1]
        for target in targets if wing in ARROWS else ():
            package, _, inside = target.partition(".")
            assert package == "p2p_llm_forge", f"{module} imports the script {target}"
            allowed = ARROWS[wing] | {wing, ""}
            assert inside.partition(".")[0] in allowed, f"{module} imports {target}"


def test_there_is_no_cycle_and_no_script_imports_another():
    imports = imports_by_module()
    tuple(graphlib.TopologicalSorter(imports).static_order())
    scripts = {"train", "prepare_data", "check_cluster", "generate", "export"}
    assert not [name for name in scripts if imports[name] & scripts]
