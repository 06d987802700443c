"""Take a trained model along: write it as one GGUF file, for llama.cpp, ollama and LM Studio.

python export.py artifacts/demo
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from p2p_llm_forge.config import ExportConfig, name_first, parse
from p2p_llm_forge.errors import ForgeError, run_script

INSTALL = "python -m pip install 'gguf>=0.17,<0.20'"


def export(config: ExportConfig) -> Path:
    """Write the file that is asked for; returns its path.

    Raises ForgeError where there is no whole model, where the format cannot express it, or where
    something lies in its place.
    """
    config.problems().raise_any()
    file = file_of(config)
    if importlib.util.find_spec("gguf") is None:
        raise ForgeError("the export needs the package gguf, which is not installed", INSTALL)
    if file.suffix != ".gguf" or file.is_dir():
        found = f"--output-file {file} is not the name of a .gguf file"
        raise ForgeError(found, "give a name that ends in .gguf, such as model.gguf")
    if not file.parent.is_dir() or (file.exists() and not config.overwrite):
        wrong = "is there already" if file.exists() else "is in a folder that does not exist"
        fix = "add --overwrite, or give another --output-file"
        raise ForgeError(f"{file} {wrong}", fix if file.exists() else f"mkdir -p {file.parent}")
    import torch

    from p2p_llm_forge.training.newest import newest_model
    from p2p_llm_forge.using.gguf_file import write_gguf
    from p2p_llm_forge.using.loading import load

    name = config.model_name
    if Path(name).is_dir():
        name = str(newest_model(Path(name)))
    model = load(name, torch.device("cpu"), torch.float32)
    partial = file.with_name(f"tmp-{file.name}.{os.getpid()}")
    try:
        write_gguf(model, partial, file.stem, config.dtype == "f16")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def file_of(config: ExportConfig) -> Path:
    """Where the file goes: as asked, or named after the model, in its folder if it has one."""
    folder = Path(config.model_name)
    if config.output_file:
        return Path(config.output_file)
    name = f"{folder.resolve().name if folder.is_dir() else folder.name}.gguf"
    return folder / name if folder.is_dir() else Path(name)


def main() -> int:
    """The command line."""
    config = parse(ExportConfig, name_first(sys.argv[1:]), "export.py")
    file = export(config)
    from p2p_llm_forge.training.newest import was_trained_to_chat

    run = f'llama-completion -m {file} -no-cnv -p "The ferry"'
    if was_trained_to_chat(Path(config.model_name)):
        run = f"llama-cli -m {file}"  # a conversation, by the template in the file
    print(
        f"written {file} ({file.stat().st_size / 1e6:,.1f} MB); to run it:\n"
        f"  {run}\n"
        f"  echo FROM {file.resolve()} > Modelfile && ollama create {file.stem} -f Modelfile"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
