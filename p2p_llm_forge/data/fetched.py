"""A prepared dataset that comes from another machine: what lies in its place, how it gets there.

output-dir/unfinished/lock          which launch works here, as for a preparation
output-dir/unfinished/fetched-…/    what has come so far; its manifest first
output-dir/unfinished/dataset-…/    the same, when all has come, while it is published
output-dir/fetched.json             of which manifest this is true: the dataset there was fetched
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from p2p_llm_forge.data.dataset import (
    COMING,
    DATASET_DICT,
    FETCHED,
    MANIFEST,
    REPLACED,
    TOKENIZER,
    UNFINISHED,
    Manifest,
    files_of_others,
    own_files,
    publish,
)
from p2p_llm_forge.data.splits import TRAIN, VALIDATION
from p2p_llm_forge.data.unfinished import LOCK, is_unfinished_folder
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import erase, fsync, read_json, write_json
from p2p_llm_forge.shapes import is_path_inside

COMPLETE = "dataset-"  # and, as after COMING, the first digits of the manifest's hash
FOLDERS = (TRAIN, VALIDATION, TOKENIZER)  # in which the files of a dataset lie
NOBODYS = (".DS_Store", ".gitkeep", ".gitignore", "lost+found")  # in new folders

Kind = Literal["nothing", "file", "dataset", "other"]


@dataclass(frozen=True)
class Found:
    """What lies where a dataset is asked for; a fetch may put one in the place of nothing.

    manifest: the SHA-256 of its file, of which there may be several for one fingerprint. bytes: of
    all files. is_fetched: another may take its place. made_of: the names of its texts.
    """

    kind: Kind
    where: str = ""
    fingerprint: str = ""
    manifest: str = ""
    manifest_bytes: int = 0
    bytes: int = 0
    is_fetched: bool = False
    made_of: tuple[str, ...] = ()


def look(folder: Path) -> Found:
    """See what lies there; changes nothing."""
    where = str(folder)
    if folder.is_file():
        return Found("file", where)
    if not os.path.lexists(folder):
        return Found("nothing", where)
    if not (folder / MANIFEST).is_file():
        return Found("nothing" if _is_free(folder) else "other", where)
    text = (folder / MANIFEST).read_bytes()
    sha256 = hashlib.sha256(text).hexdigest()
    is_fetched = sha256 == _fetched_manifest(folder)
    try:
        manifest = Manifest.load(folder)
    except ForgeError:  # of another version, or damaged
        return Found("nothing" if is_fetched else "other", where)
    if missing_in(folder, manifest):
        return Found("nothing" if is_fetched else "other", where)
    paths = manifest.arguments.get("dataset_path")
    return Found(
        *("dataset", where, manifest.fingerprint, sha256),
        manifest_bytes=len(text),
        bytes=len(text) + sum(facts["bytes"] for facts in manifest.files.values()),
        is_fetched=is_fetched,
        made_of=tuple(map(str, paths)) if isinstance(paths, list) else (),
    )


def missing_in(folder: Path, manifest: Manifest) -> list[str]:
    """The files that a manifest names and that are not there in their size."""

    def is_there(name: str) -> bool:
        path = folder / name
        return path.is_file() and path.stat().st_size == manifest.files[name]["bytes"]

    return [name for name in sorted(manifest.files) if not is_there(name)]


def in_words(folder: Path) -> str:
    """What lies there in the place of a dataset."""
    if folder.is_symlink() and not folder.exists():
        return f"{folder} is a link to nothing"
    try:
        manifest = Manifest.load(folder)
    except ForgeError as error:
        return error.problems[0].found
    missing = missing_in(folder, manifest)
    names = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
    return f"{folder} is a dataset that is not whole: it lacks {names}"


def _fetched_manifest(folder: Path) -> str | None:
    """The hash of the manifest that a fetch has put there."""
    try:
        return str(read_json(folder / FETCHED, {"manifest": str})["manifest"])
    except (OSError, ValueError):
        return None


def _is_free(folder: Path) -> bool:
    """Whether nothing lies in a folder without a manifest, or what a fetch has left there."""
    try:
        names = {path.name for path in folder.iterdir()} - {*NOBODYS}
        if not names:
            return True
        unfinished = folder / UNFINISHED
        ours = {UNFINISHED, FETCHED, DATASET_DICT, *FOLDERS}
        if not names <= ours or (UNFINISHED not in names and FETCHED not in names):
            return False
        works = {path.name for path in unfinished.iterdir()} if UNFINISHED in names else set()
        is_fetch = all(one.startswith((COMING, COMPLETE, REPLACED, LOCK, "tmp-")) for one in works)
        is_ours = not works or is_unfinished_folder(unfinished)
        return is_fetch and is_ours and not files_of_others(folder)
    except OSError:
        return False


def place_for(folder: Path, manifest: str) -> Path:
    """Where the files of a dataset gather, with what earlier fetches have left of it.

    manifest: the hash of its file. To be called by who holds the lock in the unfinished folder.
    What has come of other datasets is removed.
    """
    unfinished = folder / UNFINISHED
    place, complete = (unfinished / f"{kind}{manifest[:20]}" for kind in (COMING, COMPLETE))
    if complete.is_dir() and not place.exists():
        _take_back(folder, complete)
        complete.rename(place)
    if not (folder / MANIFEST).exists():
        erase(folder, own_files(unfinished, REPLACED) or ())  # the rest of what it was to replace
        unfinished.mkdir(parents=True, exist_ok=True)
    for path in list(unfinished.iterdir()):
        if path.name.startswith((COMING, COMPLETE)) and path != place:
            if path.name.startswith(COMPLETE) and not (folder / MANIFEST).exists():
                erase(folder, own_files(path) or ())  # its parts that were in place at a kill
            shutil.rmtree(path, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _take_back(folder: Path, complete: Path) -> None:
    """Undo a publishing that was killed: parts whose place is empty had left it."""
    if (folder / MANIFEST).exists():
        return
    parts = {name.split("/")[0] for name in own_files(complete) or ()}
    for part in sorted(parts):
        if not (complete / part).exists() and (folder / part).exists():
            (folder / part).rename(complete / part)


def files_coming(place: Path, promised: Found) -> dict[str, dict[str, Any]]:
    """By name, bytes and sha256 of the files that the manifest names which has come.

    Raises ForgeError where it is not the one that was promised, or not such as we write.
    """
    manifest = Manifest.load(place)
    size = promised.manifest_bytes + sum(facts["bytes"] for facts in manifest.files.values())
    for name in manifest.files:
        if not is_path_inside(name) or name.split("/")[0] not in (DATASET_DICT, *FOLDERS):
            raise ForgeError(
                f"the dataset that is to come names {ascii(name)[:80]}, which is no file of one",
                "prepare it again on the machine that has it: prepare_data.py --overwrite",
            )
    if manifest.fingerprint != promised.fingerprint or size != promised.bytes:
        raise ForgeError(
            "the dataset that is to come is another one than its machine has said",
            "start this again",
        )
    return manifest.files


def put_in_place(place: Path, folder: Path, manifest: str) -> None:
    """Publish a dataset that has come whole; one that was fetched there before is replaced."""
    write_json(place / FETCHED, {"manifest": manifest})
    complete = place.with_name(f"{COMPLETE}{manifest[:20]}")
    place.rename(complete)
    fsync(place.parent)
    publish(complete, folder)
    shutil.rmtree(complete, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / UNFINISHED / REPLACED).unlink()
