"""CheckConfig: what check_cluster.py can be asked, beside the launch of a training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from p2p_llm_forge.config.fields import Options, flag, require_at_least
from p2p_llm_forge.config.train import TrainConfig
from p2p_llm_forge.errors import Problems


@dataclass
class CheckOptions(Options):
    """Which launch is looked at, and how the report is printed."""

    heading = "the check"
    PER_RANK = [
        "config_file",
        "meet",
        "json",
        "write_configs",
        "hosts",
        "gpus_per_host",
    ]

    config_file: list[str] = flag(
        [], "this machine's file for `accelerate launch`, or the files of several", metavar="FILE"
    )
    meet: bool = flag(
        False,
        "with --config-file, on every machine: meet the others without a launcher, one process on"
        " each",
    )
    json: bool = flag(False, "print the report as JSON")
    write_configs: str | None = flag(
        None, "write a commented launch file for each of --hosts, and stop", metavar="FOLDER"
    )
    hosts: list[str] = flag([], "addresses of all machines, the main one first")
    gpus_per_host: int | None = flag(
        None, "with --write-configs: GPUs of each machine; without it one process on the CPU"
    )

    def check(self, problems: Problems) -> None:
        problems.require(
            bool(self.write_configs) == bool(self.hosts),
            "--write-configs and --hosts belong together, one of them is missing",
            "give both: --write-configs FOLDER --hosts ADDRESS ADDRESS ...",
        )
        require_at_least(1, self, problems, "gpus_per_host")
        problems.require(
            not self.meet or len(self.config_file) == 1,
            "--meet needs the file of this machine",
            "add --config-file my_node.yaml",
        )


@dataclass
class CheckConfig(CheckOptions, TrainConfig):
    """One look at a launch before it is made: takes the flags of train.py beside its own."""

    GROUPS = [*TrainConfig.GROUPS, CheckOptions]
    COMMON = [
        *("dataset_path", "model_name", "model_type", "depth", "batch_size", "micro_batch_size"),
        *("sync", "compress", "backend", "peer_timeout", "cluster_secret_file", "cpu", "rank"),
        *("world_size", "master_addr", "master_port", "config", "config_file", "meet", "json"),
        *("write_configs", "hosts"),
    ]

    def problems(self) -> Problems:
        """As of a training, which may still lack its data and its folder."""
        data, output = self.dataset_path or "not chosen", self.output_dir or "not chosen"
        return super(
            CheckConfig, dataclasses.replace(self, dataset_path=data, output_dir=output)
        ).problems()

    def check_together(self, problems: Problems) -> None:
        TrainConfig.check_together(self, problems)
        problems.require(
            not (self.gpus_per_host is not None and self.cpu),
            "--gpus-per-host and --cpu contradict each other",
            "give one of them",
        )
