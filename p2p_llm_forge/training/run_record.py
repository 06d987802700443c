"""run.json: which run a folder belongs to, and what that run has written beside it.

What neither this record nor the manifest of a checkpoint names is somebody else's: it is never
overwritten and never removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import read_json, write_json
from p2p_llm_forge.shapes import is_count, is_path_inside

RUN = "run.json"
FORMAT_VERSION = 1
METRICS, RUNS = "metrics.jsonl", "runs"
SAMPLES, LOSS, PEERS = "samples.jsonl", "loss.png", "peers.png"
CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]*)", re.ASCII)
TOKEN = re.compile("[0-9a-f]{32}", re.ASCII)
Resumed = tuple[tuple[str, int], ...]  # tokens and steps

# What earlier versions, which kept no such record, have put beside their checkpoints.
UNRECORDED = (
    *(METRICS, "all_results.json", "README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
)


def is_name(value: Any) -> bool:
    """Whether a JSON value names something in a run's folder, or a file below its runs/."""
    return is_path_inside(value) and ("/" not in value or value.startswith(f"{RUNS}/"))


def is_token(value: Any) -> bool:
    """Whether a JSON value names a start of a run."""
    return isinstance(value, str) and bool(TOKEN.fullmatch(value))


SHAPE = {
    **{"format_version": is_count, "identity": dict, "wrote": (None, [is_name])},
    **{"started": (None, is_token), "resumed": (None, [{"token": is_token, "step": is_count}])},
}


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds. wrote: names in the run's folder, and runs/PATH of trackers.

    started: a token that was made when the run began, the same in the folders of all machines; None
    of older versions. resumed: every time that it resumed since, a token of that time and the
    checkpoint's step, the last at the end.
    """

    identity: dict[str, Any]
    wrote: frozenset[str] = field(default_factory=frozenset)
    started: str | None = None
    resumed: Resumed = ()

    @staticmethod
    def read(output_dir: Path) -> RunRecord | None:
        """The record in a folder; None without one. Raises ForgeError for one that is not ours."""
        path = output_dir / RUN
        try:
            content = read_json(path, SHAPE)
            version = content["format_version"]
            if version > FORMAT_VERSION:
                raise ValueError(f"it has format version {version}, this program reads up to 1")
            wrote = content.get("wrote")
            wrote = frozenset(UNRECORDED if wrote is None else wrote)
            resumed = tuple((one["token"], one["step"]) for one in content.get("resumed") or ())
            return RunRecord(content["identity"], wrote, content.get("started"), resumed)
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink():
                raise _unreadable(path, "it is a link to nowhere") from None
            return None
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    def write(self, output_dir: Path) -> None:
        """Put the record into the folder. Raises OSError."""
        content = {"format_version": FORMAT_VERSION, "identity": self.identity}
        if self.started:
            content["started"] = self.started
        if self.resumed:
            content["resumed"] = [{"token": token, "step": step} for token, step in self.resumed]
        write_json(output_dir / RUN, {**content, "wrote": sorted(self.wrote)})

    def naming(self, output_dir: Path, names: Iterable[str]) -> RunRecord:
        """The record with more names, and without checkpoints that are gone."""
        kept = (
            name
            for name in self.wrote
            if not CHECKPOINT.fullmatch(name) or os.path.lexists(output_dir / name)
        )
        return replace(self, wrote=frozenset([*kept, *names]))


def _unreadable(path: Path, reason: object) -> ForgeError:
    return ForgeError(
        f"{path} cannot be read ({reason}), so nobody knows what else there is of a run",
        "give another --output-dir; there --resume FOLDER continues from a checkpoint of this one",
    )


def put_on_record(output_dir: Path, names: Iterable[str]) -> frozenset[str]:
    """Name what is about to be written into the folder of a run; returns what was named before.

    Raises ForgeError, OSError.
    """
    record = RunRecord.read(output_dir)
    if record is None:
        return frozenset()
    if not record.wrote.issuperset(names := set(names)):
        record.naming(output_dir, names).write(output_dir)
    return record.wrote
