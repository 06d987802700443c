"""The only place that reads the environment that a launcher makes. Imports no heavy library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.limits import cores

if TYPE_CHECKING:
    from p2p_llm_forge.config import TrainConfig

DEFAULT_PORT = 29500
# What torch and Accelerate read, each a field of Launch.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BOUNDS = {
    **{"RANK": (0, 10**5), "WORLD_SIZE": (1, 10**5), "MASTER_PORT": (1, 65535)},
    **{"LOCAL_RANK": (0, 10**5), "LOCAL_WORLD_SIZE": (1, 10**5)},
}
# What `accelerate launch` (1.15) exports for ways to train that this program does not know.
WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
PARALLEL = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "sharded data parallelism",
}
PLAIN_FIX = (
    "in the launch file write `distributed_type: MULTI_GPU` (or 'NO' for one process) and take the"
    " settings of the other way out; `accelerate_configs/` has examples"
)
PRECISIONS = ("auto", "no", "bf16", "fp16")
COMPILERS = ("inductor", "eager", "aot_eager", "cudagraphs")  # of Accelerate's, those torch has
COMPILER_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Settings of Accelerate that this program does by itself, and what decides here.
IGNORED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--batch-size and --micro-batch-size decide",
    "ACCELERATE_GRADIENT_CLIPPING": "--max-grad-norm decides",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "the whole base model is compiled",
    "ACCELERATE_DEBUG_MODE": "it checks exchanges of Accelerate's own, of which there are none",
}
# What Accelerate would do of itself, beside what this program does: accumulated losses divided
# twice, the loss compiled with the model.
NEUTRAL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DEBUG_MODE": "false",
}
ROOM = 16  # processes that an elastic launch may come to, where it does not say
MPI_WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The number of this process on its machine; 0 without a launcher."""
    text = environ.get("LOCAL_RANK", "0")
    return int(text) if text.isdecimal() else 0  # what is no number is refused by `read_launch`


def rank_and_world_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The number of this process and that of all; (0, 1) without a launcher.

    For work that is divided without any exchange; whatever talks to peers uses `read_launch`.
    """
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    _require_within(rank, world_size, "RANK", "WORLD_SIZE")
    return rank, world_size


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


def is_first_start(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher, if there is one, has not started this machine's workers before."""
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


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
    most_processes: int | None = None  # that an elastic launch may come to, if it says so
    run_id: str | None = None  # the same for all starts of one elastic launch, on all machines
    serves_store: bool = False  # the launcher, and not rank 0, at the main port
    by_torchrun: bool = False  # is elastic by torchrun, which runs what strangers send
    precision: str = "auto"  # `mixed_precision` of Accelerate's config
    wants_cpu: bool = False  # `use_cpu` of Accelerate's config
    compile: dict[str, Any] | None = None  # `dynamo_config`, as torch.compile takes it
    ignored: tuple[str, ...] = ()  # settings of the launcher's, with what decides instead
    threads: int | None = None  # that the user asked for by OMP_NUM_THREADS
    gloo_interface: str | None = None  # that the user chose
    nccl_interface: str | None = None

    @property
    def machines(self) -> int:
        """How many machines take part."""
        return -(-self.world_size // self.local_world_size)

    @property
    def room(self) -> int:
        """For how many processes a batch that is chosen now has to do."""
        return (self.most_processes or ROOM) if self.is_elastic else self.world_size

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
    _refuse_other_ways(config, environ)
    if config.world_size == 1:
        pass  # alone on purpose, whatever the environment says
    elif any(value is not None for value in by_hand.values()):
        _refuse_wrong_flags(config, by_hand, environ)
        processes = {name[2:].replace("-", "_"): value for name, value in by_hand.items()}
    elif "RANK" in environ:
        processes = _from_launcher(environ)
    else:
        _refuse_strangers(environ)
    return Launch(
        **processes,
        serves_store=_serves_store(environ),
        precision=environ.get("ACCELERATE_MIXED_PRECISION", "auto"),
        wants_cpu=_flag(environ, "ACCELERATE_USE_CPU"),
        compile=_compile(environ),
        ignored=_ignored(environ),
        threads=_threads(environ),
        gloo_interface=environ.get("GLOO_SOCKET_IFNAME"),
        nccl_interface=environ.get("NCCL_SOCKET_IFNAME"),
    )


def choose_threads(config: TrainConfig, launch: Launch) -> int:
    """CPU threads for this process: its part of the machine's cores unless the user chose."""
    return config.cpu_threads or launch.threads or max(1, cores() // launch.local_world_size)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text, (least, most) = environ.get(name) or str(default), BOUNDS.get(name, (0, 10**9))
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        is_number = re.fullmatch("-?[0-9]+", text)
        wrong = f"not {least} to {most}" if is_number else "which is no number"
        raise ForgeError(
            f"{name} is '{in_one_line(text)}' in the environment, {wrong}",
            f"unset {name}, or start the script with torchrun or `accelerate launch`",
        )
    return int(text)


def _require_within(number: int, count: int, name: str, of: str) -> None:
    """Raise ForgeError unless a number, counted from 0, is one of `count`."""
    if number >= count:
        raise ForgeError(
            f"{name} is {number} in the environment, and {of} {count}: they count from 0",
            f"unset {name} and {of}, or correct them on this machine",
        )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable that is true or false is true, in the words that Accelerate takes."""
    text = (environ.get(name) or "false").lower()
    if text not in (
        "1",
        "true",
        "t",
        "yes",
        "y",
        "on",
        "0",
        "false",
        "f",
        "no",
        "n",
        "off",
        "none",
    ):
        raise ForgeError(
            f"{name} is '{in_one_line(text)}' in the environment, which is neither true nor false",
            f"unset {name}, or set it to true or false",
        )
    return text in ("1", "true", "t", "yes", "y", "on")


def _refuse_other_ways(config: TrainConfig, environ: Mapping[str, str]) -> None:
    """Refuse what would otherwise train in silence as if it had not been asked for."""
    asked = [way for name, way in WAYS.items() if _flag(environ, name)]
    if _flag(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked += [way for name, way in PARALLEL.items() if environ.get(name, "1") not in "1"]
    if asked:
        found = f"the launcher's config asks for {' and '.join(asked)}, which train.py does not do:"
        raise ForgeError(f"{found} every process holds the whole model", PLAIN_FIX)
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "auto")
    if config.mixed_precision == "auto" and precision not in PRECISIONS:
        raise ForgeError(
            f"mixed precision {in_one_line(precision)} comes from the launcher's config",
            "write no, bf16 or fp16 there, or add --mixed-precision",
        )


def _compile(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """How torch.compile is asked for; None if it is not."""
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    mode = environ.get("ACCELERATE_DYNAMO_MODE") or "default"
    if backend == "no":
        return None
    for name, value, known in (("BACKEND", backend, COMPILERS), ("MODE", mode, COMPILER_MODES)):
        if value not in known:
            raise ForgeError(
                f"ACCELERATE_DYNAMO_{name} is '{in_one_line(value)}': the launcher's config asks"
                " for a way to compile that this program does not know",
                f"write one of {', '.join(known)} there, or take it out and add --compile",
            )
    whole, dynamic = (
        _flag(environ, f"ACCELERATE_DYNAMO_USE_{name}") for name in ("FULLGRAPH", "DYNAMIC")
    )
    asked = {"backend": backend, "mode": mode, "fullgraph": whole, "dynamic": dynamic or None}
    return asked if backend == "inductor" else {**asked, "mode": None}  # the others have no modes


def _ignored(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The settings that are not taken from the launcher, each with what decides here."""
    steps, clipping, *flags = IGNORED
    is_set = {name: _flag(environ, name) for name in flags}
    is_set[steps] = _number(environ, steps, 1) > 1
    is_set[clipping] = environ.get(clipping, "none").lower() not in ("none", "")
    return tuple(
        f"{name}={in_one_line(environ[name])} of the launcher is ignored: {instead}"
        for name, instead in IGNORED.items()
        if is_set[name]
    )


def _threads(environ: Mapping[str, str]) -> int | None:
    """The threads that the user asked for.

    Launchers export OMP_NUM_THREADS=1 for their own caution, so a 1 is taken as theirs; whoever
    wants one thread writes `--cpu-threads 1`. OpenMP also takes lists, one number for each level.
    """
    text = environ.get("OMP_NUM_THREADS") or "1"
    if not re.fullmatch(r"[0-9]{1,4}( *, *[0-9]{1,4})*", text.strip()):
        raise ForgeError(
            f"OMP_NUM_THREADS is '{in_one_line(text)}' in the environment, which is no number of"
            " threads",
            "unset OMP_NUM_THREADS, or set it to the threads of one process",
        )
    return int(text) if text.strip().isdecimal() and int(text) > 1 else None


def _serves_store(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _from_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    read = {name.lower(): environ[name] for name in VARIABLES if environ.get(name)}
    processes = {
        name: text if name == "master_addr" else _number(environ, name.upper(), 0)
        for name, text in read.items()
    }
    counts = {name: _number(environ, name, 1) for name in BOUNDS}
    here, world_size = counts["LOCAL_WORLD_SIZE"], counts["WORLD_SIZE"]
    _require_within(_number(environ, "LOCAL_RANK", 0), here, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    _require_within(here - 1, world_size, "LOCAL_WORLD_SIZE", "WORLD_SIZE")
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
    most = _number(environ, "P2P_LLM_FORGE_MOST_PROCESSES", 0) or None
    return {**processes, **elastic, "by_torchrun": by_torchrun, "most_processes": most}


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
