"""The notebook, executed as a reader would: two processes train, and its figures lie on disk."""

from __future__ import annotations

import json

import pytest

from tests import ROOT

NOTEBOOK = ROOT / "notebooks" / "train_in_a_notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_trains_with_two_processes(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("FORGE_NOTEBOOK_OUTPUT", str(tmp_path / "output"))
    # Kernels that the user has installed may belong to another Python.
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    results = json.loads((tmp_path / "output" / "run" / "all_results.json").read_text())
    assert results["processes"] == 2 and results["steps"] == 60
    assert 0 < results["eval_loss"] < 6.5, "a guess among 1,024 tokens costs 6.9 nats"
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "2 process(es) on cpu" in said
    last = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert last.startswith(("'The ferry", '"The ferry'))


def test_the_notebook_is_stored_without_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
