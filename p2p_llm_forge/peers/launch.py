"""The only place that reads the environment that a launcher makes. Imports no heavy library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.errors import ForgeError

if TYPE_CHECKING:
    from p2p_llm_forge.config import TrainConfig

DEFAULT_PORT = 29500
# What torch and Accelerate read, each a field of Launch.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The number of this process on its machine; 0 without a launcher."""
    text = environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0  # what is no number is refused by `read_launch`


def rank_and_world_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The number of this process and that of all; (0, 1) without a launcher.

    For work that is divided without any exchange; whatever talks to peers uses `read_launch`.
    """
    return _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)


def has_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` or torchrun waits for this process and judges its status."""
    return "TORCHELASTIC_RUN_ID" in environ


def launcher_pid(environ: Mapping[str, str] = os.environ) -> int | None:
    """The process that started this one as a worker and is to outlive it; None without a launcher.

    0: there is one, which does not say its number (`accelerate launch`, torchrun).
    """
    if "P2P_LLM_FORGE_LAUNCHER" in environ:
        return _number(environ, "P2P_LLM_FORGE_LAUNCHER", 0)
    return 0 if has_launcher(environ) or "ACCELERATE_MIXED_PRECISION" in environ else None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process in the launch: what its launcher, or the user by hand, has promised and asked."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    is_elastic: bool = False  # torchrun starts it again, perhaps with other peers, when it fails
    run_id: str | None = None  # the same for all starts of one elastic launch, on all machines
    serves_store: bool = False  # the launcher, and not rank 0, at the main port
    by_torchrun: bool = False  # is elastic by torchrun, which runs what strangers send
    precision: str = "auto"  # `mixed_precision` of Accelerate's config
    wants_cpu: bool = False  # `use_cpu` of Accelerate's config
    threads: int | None = None  # that the user asked for by OMP_NUM_THREADS
    gloo_interface: str | None = None  # that the user chose
    nccl_interface: str | None = None

    @property
    def machines(self) -> int:
        """How many machines take part."""
        return -(-self.world_size // self.local_world_size)

    def environ(self) -> dict[str, str]:
        """The launch as torch and Accelerate expect to find it; nothing for a process alone."""
        if self.world_size == 1:
            return {}
        return {name: str(getattr(self, name.lower())) for name in VARIABLES}


def read_launch(config: TrainConfig, environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch as `accelerate launch`, torchrun, notebook_launcher or the four flags describe it.

    Raises ForgeError where flags and environment disagree, where they are incomplete, and for
    launches that would start processes that know nothing of each other.
    """
    by_hand = {
        "--rank": config.rank,
        "--world-size": config.world_size,
        "--master-addr": config.master_addr,
        "--master-port": config.master_port,
    }
    processes: dict[str, Any] = {}
    if config.world_size == 1:
        pass  # alone on purpose, whatever the environment says
    elif any(value is not None for value in by_hand.values()):
        _refuse_wrong_flags(config, by_hand, environ)
        processes = {name[2:].replace("-", "_"): value for name, value in by_hand.items()}
    elif "RANK" in environ:
        processes = _from_launcher(environ)
    else:
        _refuse_strangers(environ)
    # Launchers export OMP_NUM_THREADS=1 for their own caution, so a 1 is taken as theirs; whoever
    # wants one thread writes `--cpu-threads 1`.
    threads = environ.get("OMP_NUM_THREADS", "1")
    return Launch(
        **processes,
        serves_store=_serves_store(environ),
        precision=environ.get("ACCELERATE_MIXED_PRECISION", "auto"),
        wants_cpu=environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"),
        threads=int(threads) if threads.isdigit() and int(threads) > 1 else None,
        gloo_interface=environ.get("GLOO_SOCKET_IFNAME"),
        nccl_interface=environ.get("NCCL_SOCKET_IFNAME"),
    )


def choose_threads(config: TrainConfig, launch: Launch) -> int:
    """CPU threads for this process: its part of the machine's cores unless the user chose."""
    return config.cpu_threads or launch.threads or max(1, cores() // launch.local_world_size)


def cores() -> int:
    """The cores of this machine that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise ForgeError(
            f"{name} is '{text}' in the environment, which is no number",
            f"unset {name}, or start the script with torchrun or `accelerate launch`",
        )
    return int(text)


def _serves_store(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _from_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    read = {name.lower(): environ[name] for name in VARIABLES if environ.get(name)}
    processes = {
        name: text if name == "master_addr" else _number(environ, name.upper(), 0)
        for name, text in read.items()
    }
    if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return processes
    if _serves_store(environ):
        # Seen with torch 2.13: after a restart peers read the dead ones' addresses from it.
        raise ForgeError(
            "torchrun with --max-restarts keeps one store over all restarts, in which peers would"
            " find the addresses of those that are gone",
            "use `python launch/elastic.py --main ADDRESS train.py ...` instead, or, on one machine"
            " alone, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment",
        )
    by_torchrun = "P2P_LLM_FORGE_LAUNCHER" not in environ
    elastic = {"is_elastic": True, "run_id": environ.get("TORCHELASTIC_RUN_ID")}
    return {**processes, **elastic, "by_torchrun": by_torchrun}


def _refuse_wrong_flags(
    config: TrainConfig, by_hand: dict[str, Any], environ: Mapping[str, str]
) -> None:
    if "RANK" in environ and environ.get("WORLD_SIZE") != str(config.world_size):
        raise ForgeError(
            f"--world-size {config.world_size} was given, but a launcher has started"
            f" {environ.get('WORLD_SIZE')} processes",
            f"leave out {', '.join(by_hand)}, or start the script without the launcher",
        )


def _refuse_strangers(environ: Mapping[str, str]) -> None:
    """Refuse launches that look distributed and are not.

    For `distributed_type: MULTI_CPU` without MPI, Accelerate (1.15) starts one plain process on
    each machine, with MASTER_ADDR but no RANK.
    """
    if any(name in environ for name in MPI_WORLD_SIZES):
        raise ForgeError(
            "this launch comes from MPI, which is not supported",
            "start it with torchrun, with `accelerate launch --multi_gpu`, or by hand with --rank,"
            " --world-size, --master-addr and --master-port",
        )
    if environ.get("WORLD_SIZE", "1") != "1" and not environ.get("MASTER_ADDR"):
        raise ForgeError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} in the environment, but RANK is not set",
            "unset WORLD_SIZE, or start the script with a launcher",
        )
    if environ.get("MASTER_ADDR"):
        raise ForgeError(
            f"MASTER_ADDR is set ({environ['MASTER_ADDR']}) but RANK is not: every process of this"
            " launch would train alone and overwrite the others (`distributed_type: MULTI_CPU` in"
            " an Accelerate config does this)",
            "in the YAML, write `distributed_type: MULTI_GPU` and `use_cpu: true`, which starts"
            " real processes on CPUs too (accelerate_configs/cpu_2_processes.yaml is an example),"
            " or add --multi_gpu to `accelerate launch`; to train alone on purpose, add"
            " --world-size 1",
        )
