"""export.py writes one file beside the model, or says what keeps it from that."""

from __future__ import annotations

import json
import re

import pytest

from tests import ROOT
from tests.folders import tree
from tests.using.models import save_model


@pytest.fixture
def exported(zygote, tmp_path):
    """The status and what is printed."""

    def run(*words: object, **environ: str) -> tuple[int, str]:
        log = tmp_path / "export.log"
        log.unlink(missing_ok=True)
        how = {"HF_HUB_OFFLINE": "1", **environ}
        pid = zygote.start([str(word) for word in words], log, how, script="export")
        return zygote.wait(pid), log.read_text()

    return run


def test_a_model_becomes_one_file_and_nothing_is_lost(exported, tmp_path):
    folder = save_model(tmp_path / "demo", "qwen3")
    before = tree(folder)
    status, text = exported(folder)
    file = folder / "demo.gguf"
    assert status == 0 and f"written {file} " in text
    first = file.read_bytes()
    assert first[:4] == b"GGUF" and tree(folder) == {**before, "demo.gguf": first}
    refused = exported(folder)
    assert refused == (
        2,
        f"error: {file} is there already\n  fix: add --overwrite, or give another --output-file\n",
    )
    assert exported(folder, "--overwrite", "--dtype=f32")[0] == 0 and file.read_bytes() != first
    other = tmp_path / "other.gguf"
    assert exported(folder, "--output-file", other)[0] == 0 and other.read_bytes()[:4] == b"GGUF"


def test_what_was_trained_to_chat_is_run_so(exported, tmp_path):
    folder = save_model(tmp_path / "talks", "llama")
    identity = {"format_version": 1, "identity": {"conversations": True}}
    (folder / "run.json").write_text(json.dumps(identity))
    status, text = exported(folder)
    assert status == 0 and f"  llama-cli -m {folder}/talks.gguf\n" in text
    (folder / "run.json").unlink()
    assert "-no-cnv" in exported(folder, "--overwrite")[1]


def test_what_cannot_be_exported_leaves_no_file(exported, tmp_path):
    folder = save_model(tmp_path / "model", "gpt2", activation_function="relu")
    before = tree(folder)
    status, text = exported(folder)
    assert status == 2 and "the gpt2 has activation_function=relu\n  fix: convert it by" in text
    assert "Traceback" not in text and tree(folder) == before
    status, text = exported(tmp_path)
    assert status == 2 and "holds no model" in text
    for taken in (folder / "model.safetensors", tmp_path):
        status, text = exported(folder, "--overwrite", "--output-file", taken)
        assert status == 2 and "not the name of a .gguf file" in text and tree(folder) == before
    status, text = exported(folder, "--output-file", tmp_path / "no" / "x.gguf")
    assert status == 2 and f"fix: mkdir -p {tmp_path / 'no'}" in text


def test_without_the_package_it_says_the_line_to_install_it(monkeypatch, tmp_path):
    from export import INSTALL, export
    from p2p_llm_forge.config import ExportConfig
    from p2p_llm_forge.errors import ForgeError

    folder = save_model(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ForgeError, match="needs the package gguf, which is not installed") as no:
        export(ExportConfig(model_name=str(folder)))
    assert no.value.problems[0].fix == INSTALL


def test_the_line_to_install_it_names_the_extra_that_is_tested():
    from export import INSTALL

    written = (ROOT / "pyproject.toml").read_text("utf-8")
    (package,) = re.findall(r"'(.*)'", INSTALL)
    assert f'gguf = ["{package}"]' in written and written.count(f'"{package}"') == 2
