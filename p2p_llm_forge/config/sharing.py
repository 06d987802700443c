"""What train.py can be asked to upload to the Hub of Hugging Face."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from p2p_llm_forge.config.fields import Options, flag
from p2p_llm_forge.errors import Problems

# The Hub's rules for OWNER/NAME and NAME, as huggingface_hub (2.4) checks them.
PART = r"\w(?:[\w.-]{0,94}\w)?"
CACHED = re.compile(r"models--([^/]+)/snapshots/[0-9a-f]{40}/?$")  # in huggingface_hub's cache
NAME = re.compile(rf"(?:{PART}/)?{PART}", re.ASCII)


def is_name_on_hub(name: str) -> bool:
    """Whether the Hub can have a model of this name."""
    return bool(NAME.fullmatch(name)) and not re.search(r"--|\.\.|\.git$", name)


def hub_name(model_name: str | None) -> str | None:
    """The name on the Hub of a model that was loaded; None for a folder of this machine.

    A folder of huggingface_hub's cache has the name of what was downloaded into it.
    """
    if not model_name:
        return None
    if found := CACHED.search(model_name):
        return found[1].replace("--", "/", 1)
    return model_name if is_name_on_hub(model_name) and not Path(model_name).exists() else None


@dataclass
class SharingOptions(Options):
    """Whether the model is uploaded to the Hub, where to and when."""

    heading = "sharing"
    PER_RANK = ["push_to_hub", "private", "push_checkpoints"]  # only rank 0 uploads
    COMMON = ["push_to_hub"]

    push_to_hub: str | None = flag(
        None,
        "upload model and card to this model of the Hub at the end; pictures and figures, too."
        " Without --dataset-path: those of the finished run in --output-dir",
        "--hub_model_id",
        metavar="NAME",
    )
    private: bool = flag(
        False, "with --push-to-hub: nobody else sees the model", "--hub_private_repo"
    )
    push_checkpoints: bool = flag(
        False, "with --push-to-hub: upload at checkpoints as well, while training continues"
    )

    def check(self, problems: Problems) -> None:
        name = self.push_to_hub
        problems.require(
            name is None or is_name_on_hub(name),
            f"--push-to-hub {name!r} is no name that the Hub allows",
            "give NAME or OWNER/NAME of letters without accents, digits and single - _ . between"
            " them, at most 96 in each",
        )
        given = ("--private", self.private), ("--push-checkpoints", self.push_checkpoints)
        for flag_given, is_given in given:
            problems.require(
                not is_given or name is not None,
                f"{flag_given} is for an upload, and none was asked for",
                "add --push-to-hub NAME, or leave it out",
            )
        # Options of other groups, with which this one is built into a whole.
        asked = {key: getattr(self, key, None) for key in ("eval_only", "dry_run", "dataset_path")}
        problems.require(
            name is None
            or not (asked["eval_only"] or (asked["dry_run"] and not asked["dataset_path"])),
            "--push-to-hub uploads a run, and --eval-only and --dry-run make none",
            "leave --push-to-hub out, or the other one",
        )
