"""A model as files on this machine, in a folder or in the cache of huggingface_hub, and a place for
one that comes from another machine.

parent/tmp-fetched-NAME/lock          which launch works here
parent/tmp-fetched-NAME/files/        what has come so far; it becomes parent/NAME, or goes into it
models--a--b/tmp-fetched-COMMIT/      the same in the cache, for snapshots/COMMIT; then refs/main
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2p_llm_forge.config.lora import CONFIG as ADAPTERS
from p2p_llm_forge.config.lora import WEIGHTS as ADAPTER_WEIGHTS
from p2p_llm_forge.config.sharing import is_name_on_hub
from p2p_llm_forge.files import erase, fsync, read_json, sha256_of, write_file
from p2p_llm_forge.shapes import is_path_inside

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
# Of a model: how it is built, its tokenizer, its card. Nothing that is executed, no pickle.
TRAVELS = (".json", ".txt", ".model", ".spm", ".codes", ".jinja", ".tiktoken", ".md")
OF_RUNS = ("run.json", "trainer_state.json", "manifest.json")  # and of no model
COMMIT = re.compile(r"[0-9a-f]{40}")
TMP, LOCK = "tmp-fetched-", "lock"

Kind = Literal["nothing", "folder", "cache", "other"]


@dataclass(frozen=True)
class Stored:
    """Where a model lies on this machine. commit: of the Hub, in its cache.

    kind: other is what a fetch does not touch: a file, a folder that holds something else.
    """

    kind: Kind
    folder: str = ""
    commit: str = ""


def hub_cache() -> Path:
    """The cache of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_path(name: str) -> bool:
    """Whether --model-name can be nothing but a folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or not is_name_on_hub(name)


def find(name: str) -> Stored:
    """Where transformers finds the model when it does not ask the Hub; changes nothing."""
    folder = Path(name)
    if not name:
        return Stored("nothing")
    if folder.is_dir():
        is_empty = not any(folder.iterdir())
        kind: Kind = "folder" if is_whole(folder) else "nothing" if is_empty else "other"
        return Stored(kind, str(folder))
    if os.path.lexists(folder):
        return Stored("other", str(folder))
    if not is_path(name):
        snapshots, commit = snapshots_of(name), cached_commit(name)
        if commit and is_whole(snapshots / commit):
            return Stored("cache", str(snapshots / commit), commit)
    return Stored("nothing", str(folder))


def snapshots_of(name: str) -> Path:
    """Where the cache has the versions of a model of the Hub."""
    return hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"


def cached_commit(name: str) -> str | None:
    """The version that the cache has for the newest."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (snapshots_of(name).parent / "refs" / "main").read_text().strip()
        return commit if COMMIT.fullmatch(commit) else None
    return None


def is_whole(folder: Path) -> bool:
    """Whether a model, or adapters, lie there with all their weights."""
    if any((folder / name).is_file() for name in PICKLED):
        return True  # it is loaded, but does not travel
    weights = weights_in(folder)
    return weights is not None and all((folder / name).is_file() for name in weights)


def weights_in(folder: Path) -> list[str] | None:
    """The files of weights that a model has, there or not; None where it is no model, or none that
    travels."""
    if (folder / ADAPTERS).is_file():
        return [ADAPTER_WEIGHTS]
    if not (folder / CONFIG).is_file():
        return None
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        names = set(read_json(folder / INDEX, {"weight_map": {str: str}})["weight_map"].values())
    except (OSError, ValueError):
        return None
    return (
        sorted(names) if all(is_path_inside(name) and "/" not in name for name in names) else None
    )


def names_in(folder: Path, with_code: bool = False) -> list[str]:
    """The files of a model that travel; none where its weights are pickled. with_code: also the
    Python files of its author."""
    weights = weights_in(folder)
    if weights is None or not all((folder / name).is_file() for name in weights):
        return []
    others = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".safetensors" and may_travel(path.name, with_code)
    ]
    others = [name for name in others if name not in (*OF_RUNS, *PICKLED)]
    return sorted({*others, *weights})


def may_travel(name: str, with_code: bool = False) -> bool:
    """Whether a file of a model that comes may be called so. with_code: also Python's."""
    return is_data(name, with_code) and "/" not in name


def is_data(name: str, with_code: bool = False) -> bool:
    """Whether a file in a folder or below it is no pickle, and nothing that is executed.

    with_code: also Python's."""
    suffixes = (*TRAVELS, ".safetensors", *((".py",) if with_code else ()))
    is_pickled = Path(name).name in PICKLED
    return is_path_inside(name) and Path(name).suffix in suffixes and not is_pickled


def hashes_of(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 by name. In the cache large files are called by it: it is as they were uploaded."""
    found = {}
    for name in names:
        blob = (folder / name).resolve().name
        is_named = (folder / name).is_symlink() and re.fullmatch("[0-9a-f]{64}", blob)
        found[name] = blob if is_named else sha256_of(folder / name)
    return found


@dataclass(frozen=True)
class Landing:
    """Where a model that comes is put. commit: in the cache; empty: into a folder.

    has_others: the folder holds other files, which stay there.
    """

    target: Path
    commit: str = ""
    has_others: bool = False

    @classmethod
    def of(cls, name: str, source: Stored, has_others: bool = False) -> Landing:
        """As --model-name says here; where that may be either, as it is at the source."""
        if source.kind == "cache" and not is_path(name):
            return cls(snapshots_of(name) / source.commit, source.commit)
        return cls(Path(name), has_others=has_others)

    @property
    def aside(self) -> Path:
        """Where the lock lies, and what has come."""
        parent = self.target.parent.parent if self.commit else self.target.parent
        return parent / f"{TMP}{self.target.name}"

    @property
    def coming(self) -> Path:
        return self.aside / "files"

    def is_here(self, name: str, size: int) -> bool:
        """Whether a file is in its place already, which it can be in the cache."""
        path = self.target / name
        return bool(self.commit) and path.is_file() and path.stat().st_size == size

    def begin(self, names: Collection[str]) -> None:
        """Make room for these files, by all names that they have meanwhile; others are removed."""
        self.coming.mkdir(parents=True, exist_ok=True)
        for path in self.coming.iterdir():
            if path.name not in names:
                path.unlink()

    def publish(self) -> None:
        """Put what has come, which is whole, in its place."""
        for path in self.coming.iterdir():
            fsync(path)
        if (self.commit or self.has_others) and self.target.is_dir():
            makes_it_a_model = CONFIG, ADAPTERS  # and comes last
            for path in sorted(self.coming.iterdir(), key=lambda it: it.name in makes_it_a_model):
                path.replace(self.target / path.name)
            fsync(self.target)
        else:
            with contextlib.suppress(FileNotFoundError):
                self.target.rmdir()  # it was empty
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.coming.rename(self.target)
        if self.commit:
            main = self.target.parent.parent / "refs" / "main"
            main.parent.mkdir(parents=True, exist_ok=True)
            write_file(main, self.commit)
        fsync(self.target.parent)
        erase(self.aside, ())
