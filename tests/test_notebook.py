"""The notebook, executed as a reader would: two processes train, continue, and a model writes.

python -m tests.test_notebook executes it and stores its outputs.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest

from tests import ROOT

NOTEBOOK = ROOT / "notebooks" / "train_in_a_notebook.ipynb"
NOISE = re.compile(r".*(\[Gloo\]|\[W\d+|it/s\]).*\n?")  # of torch, on every machine another


def execute() -> Any:
    """The notebook with its outputs, as a kernel of this Python makes them."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    return notebook


def printed(notebook: Any) -> str:
    """All that the cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook: Any) -> int:
    """How many pictures the outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_trains_with_two_processes_continues_and_generates(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_NOTEBOOK_OUTPUT", str(tmp_path / "output"))
    # Kernels that the user has installed may belong to another Python.
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    notebook = execute()
    results = json.loads((tmp_path / "output" / "run" / "all_results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == 160
    assert 0 < results["eval_loss"] < 6, "a guess among 1,024 tokens costs 6.9 nats"
    text = printed(notebook)
    assert text.count("2 process(es) on cpu") == 2, "once, and once more when it is continued"
    assert "checkpoint-60" in text, "what it is continued from"
    assert pictures(notebook) == 2
    assert "> Mara" in text
    *_, generated, _, tuned = notebook.cells
    written = [one.text for one in generated.outputs if one.get("name") == "stdout"]
    assert "".join(written).startswith("The ferry")
    assert "tuning    by LoRA of rank 8" in "".join(one.get("text", "") for one in tuned.outputs)
    adapters = {path.name for path in (tmp_path / "output" / "chat").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= adapters


def test_the_notebook_is_stored_with_its_outputs_and_nothing_of_the_machine():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    text = printed(notebook)
    assert pictures(notebook) == 2 and "2 process(es) on cpu" in text and "> Mara" in text
    for sign in (str(ROOT), "/home/", "/Users/", "/root", "/tmp/", "site-packages", "Traceback"):
        assert sign not in text, sign
    assert NOTEBOOK.stat().st_size < 200_000


def without_noise(notebook: Any) -> Any:
    """The notebook as it is stored: of what was printed, the lines that say something."""
    for cell in notebook.cells:
        cell.metadata, outputs = {}, []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue  # progress bars, and warnings of libraries
            if output.output_type == "stream":
                lines = NOISE.sub("", output.text).replace("\r", "\n").split("\n")
                output.text = "".join(f"{line}\n" for line in lines if line.strip())
            if output.output_type == "stream" and outputs and "text" in outputs[-1]:
                outputs[-1].text += output.text
            elif output.get("text") != "":
                outputs.append(output)
        if "outputs" in cell:
            cell.outputs = outputs
    return notebook


if __name__ == "__main__":
    import nbformat

    shutil.rmtree(ROOT / "artifacts" / "notebook", ignore_errors=True)
    nbformat.write(without_noise(execute()), NOTEBOOK)
