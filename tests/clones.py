"""A fresh clone for tests: what a stranger is given, with a short sample text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import ROOT

SAMPLE = Path("data") / "sample_corpus.txt"
BIN = Path(sys.executable).parent
LEFT_BY_TOOLS = (
    *(".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "uv.lock"),
    *("artifacts", "prepared", "build", "dist", "corpus.txt"),
)


def fresh_clone(folder: Path, sample_bytes: int = 12_000) -> Path:
    """The files of the project as they are now, without what runs and tools have left there.

    sample_bytes: about so much of the sample text is kept, so that an epoch takes seconds.
    """
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_BY_TOOLS))
    text = (folder / SAMPLE).read_text(encoding="utf-8")[:sample_bytes]
    (folder / SAMPLE).write_text(text.rpartition("\n\n")[0], encoding="utf-8")
    shutil.copy(folder / SAMPLE, folder / "corpus.txt")
    return folder


def install(clone: Path) -> None:
    """What `uv sync` makes of a clone, without a network: its own .venv, with the packages of ours.

    The packages themselves are those that run this test; the project is installed, editable.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    ours = next(Path(path) for path in sys.path if (Path(path) / "torch").is_dir())
    theirs = next((clone / ".venv" / "lib").glob("python*/site-packages"))
    (theirs / "packages_of_the_tests.pth").write_text(f"{ours}\n")
    offline = ["--no-deps", "--no-build-isolation", "--quiet", "--editable", str(clone)]
    pip = [sys.executable, "-m", "pip", "--python", str(clone / ".venv" / "bin" / "python")]
    subprocess.run([*pip, "install", *offline], check=True, env=typing_in(clone))


def typing_in(clone: Path) -> dict[str, str]:
    """The environment of somebody who types in a clone that is installed."""
    path = os.pathsep.join([str(clone / ".venv" / "bin"), str(BIN), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "UV_NO_SYNC": "1", "UV_OFFLINE": "1"}
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        environ.pop(name, None)
    return environ
