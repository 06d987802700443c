"""Imports all that runs import, wherever in their code: done once, before runs are forked."""

import ast
import contextlib

# What the libraries import only when they are used.
import accelerate.commands.config.config  # noqa: F401
from transformers import GPT2LMHeadModel  # noqa: F401

from tests import ROOT

for file in [*ROOT.glob("*.py"), *ROOT.glob("p2p_llm_forge/**/*.py")]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            with contextlib.suppress(ImportError):  # of what is optional
                exec(compile(ast.Module([node], []), str(file), "exec"))
