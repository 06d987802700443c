"""What `accelerate launch` was asked for: its words and its file, of which it hands on only a part.

For several processes Accelerate (1.15) exports nothing of `use_cpu`, so a file for GPUs and one for
CPUs look alike from inside; and settings of another `distributed_type` than the file's own vanish.
The launcher is this process's parent, whose command line the system shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launch import (
    PARALLEL,
    PLAIN_FIX,
    Launch,
    is_first_start,
    launcher_pid,
)
from p2p_llm_forge.peers.launch_files import STARTS_PROCESSES, LaunchFile, read_launch_file

NAMES = ("accelerate", "accelerate-launch", "accelerate.exe", "accelerate-launch.exe")
MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")
TORCHRUN = re.compile(r"(.*/)?torchrun(\.exe)?|(.*/)?torch[./]distributed[./](run|launch)(\.py)?")
ANCESTORS = 3  # a launcher may start its workers through a shell or a profiler
# Settings that count for one `distributed_type` only.
OF_TYPE = {
    "deepspeed_config": "DEEPSPEED",
    "fsdp_config": "FSDP",
    "megatron_lm_config": "MEGATRON_LM",
    "fp8_config": "fp8",
}


def as_asked(launch: Launch) -> tuple[Launch, LaunchFile | None]:
    """The launch with what its launcher does not hand on, and the launcher's file if it has one.

    Raises ForgeError for a file that asks for what this program does not do.
    """
    words = words_of_launcher()
    file = file_of(words) if words is not None else None
    if file is not None:
        refuse_parallelism(file)
        launch = replace(launch, ignored=(*launch.ignored, *ignored_of(file)))
        # Of several processes Accelerate (1.15) forgets the key: they would train on GPUs.
        launch = replace(launch, wants_cpu=launch.wants_cpu or bool(file.keys.get("use_cpu")))
    threads = value_of("num_cpu_threads_per_process", words or [])
    if threads and threads.isdecimal() and int(threads):
        launch = replace(launch, threads=int(threads))  # also a 1, which is the user's own then
    return launch, file


def refuse_gpu_file(config: TrainConfig, launch: Launch, file: LaunchFile | None) -> None:
    """Raise ForgeError for a file for GPUs, to be called where there are none to be used."""
    if file is None or config.cpu or launch.wants_cpu or not is_for_gpus(file):
        return
    raise ForgeError(
        f"{file.path} is for GPUs, and this machine has"
        f" {'none' if launch.local_world_size == 1 else 'not one for each process'} that torch can"
        " use",
        f"write `use_cpu: true` into {file.path}, or add --cpu, to train on the CPU; for a GPU,"
        " install its driver and torch's build for it",
    )


def is_for_gpus(file: LaunchFile) -> bool:
    """Whether the file says that it is for GPUs."""
    keys = file.keys
    says_so = keys.get("use_cpu") is False or keys.get("gpu_ids") is not None
    return not keys.get("use_cpu") and (says_so or keys.get("distributed_type") in STARTS_PROCESSES)


def refuse_parallelism(file: LaunchFile) -> None:
    """Raise ForgeError for sizes in `parallelism_config`, which do not reach one process alone."""
    given = file.keys.get("parallelism_config")
    sizes = given if isinstance(given, dict) else {}
    asked = [way for name, way in PARALLEL.items() if sizes.get(name.lower()) not in (1, None)]
    if asked:
        found = f"{file.path} asks for {' and '.join(asked)}, which train.py does not do"
        raise ForgeError(found, PLAIN_FIX)


def ignored_of(file: LaunchFile) -> list[str]:
    """The settings of the file that are for another way to train than the file's."""
    return [
        f"{key} of {file.path} is ignored: it is for {way}"
        for key, way in OF_TYPE.items()
        if file.keys.get(key)
    ]


def words_of_launcher(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """What was typed after `accelerate launch`, but for the script and its words; None without."""
    if "ACCELERATE_MIXED_PRECISION" not in environ:
        return None
    with contextlib.suppress(psutil.Error):
        for ancestor in psutil.Process().parents()[:ANCESTORS]:
            words = launch_words(ancestor.cmdline(), len(sys.argv) - 1)
            if words is not None:
                return words
    return None


def launch_words(cmdline: Sequence[str], of_script: int) -> list[str] | None:
    """The launcher's own words in its command line; None if it is no `accelerate launch`.

    of_script: how many words at its end are the script's.
    """
    for number, word in enumerate(cmdline[:4]):
        is_launch = Path(word).name in NAMES or word in MODULES
        if is_launch or word.endswith(("commands/launch.py", "commands/accelerate_cli.py")):
            return list(cmdline[number + 1 : len(cmdline) - of_script])
    return None


def first_started(environ: Mapping[str, str] = os.environ) -> float:
    """When this process was started, by `time.time`: if that is its launcher's first start of
    workers, when the launcher was, which has imported for seconds before."""
    process, is_first = psutil.Process(), is_first_start(environ)
    began = process.create_time()
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        if is_first and parent and is_launcher(parent.pid, parent.cmdline(), environ):
            began = min(began, parent.create_time())
    return began


def is_launcher(pid: int, cmdline: Sequence[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a parent has been started to launch this process, and says how often it has.

    Shells, notebooks and job managers have not, even if they have inherited what a launcher
    exports. torchrun for a changing number of machines (`--nnodes 1:4`) does not say: it restarts
    workers for a newcomer without counting that (torch 2.13).
    """
    if "P2P_LLM_FORGE_LAUNCHER" in environ:
        return launcher_pid(environ) == pid
    if launcher_pid(environ) is None:
        return False
    if any(TORCHRUN.fullmatch(word) for word in cmdline[:4]):
        return ":" not in (value_of("nnodes", cmdline) or environ.get("PET_NNODES") or "")
    return launch_words(cmdline, 0) is not None


def value_of(name: str, words: Sequence[str]) -> str | None:
    """The last value that is given to a flag, which is written with dashes or underscores."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, is_joined, joined = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = joined if is_joined else following
    return value


def file_of(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> LaunchFile | None:
    """The file that Accelerate has read: the one that is named, or its default one."""
    named = value_of("config_file", words)
    home = Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser()
    folder = Path(environ.get("HF_HOME") or home).expanduser() / "accelerate"
    names = [named] if named else [folder / f"default_config.{kind}" for kind in ("yaml", "json")]
    for name in map(str, names):
        with contextlib.suppress(ForgeError):  # Accelerate has read it, so it is another one by now
            return read_launch_file(name)
    return None
