"""How peers agree on weights: options of train.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag, option, require_above_0, require_at_least
from p2p_llm_forge.errors import Problems

ROUND_LENGTH = 50  # updates, by default
OF_DILOCO = (
    *("sync_every", "outer_lr", "outer_momentum", "outer_warmup_rounds"),
    *("fragments", "overlap_steps", "ddp_warmup_steps"),
)


@dataclass
class SyncOptions(Options):
    """How peers agree on weights."""

    heading = "agreeing on weights"
    COMMON = ["sync", "compress"]

    sync: Literal["ddp", "diloco", "auto"] = flag(
        "ddp",
        "ddp: gradients in every update; diloco: in rounds, for slow links; auto: what the measured"
        " link allows",
    )
    compress: Literal["none", "bf16", "int8", "int4", "powersgd"] = flag(
        "none",
        "none, bf16, int8, int4 or powersgd: how gradients (ddp), or pseudo-gradients (diloco),"
        " travel",
    )
    powersgd_rank: int | None = flag(
        None, "rank of the matrices that --compress powersgd sends; default: 4"
    )
    sync_every: int | None = flag(
        None,
        f"diloco: updates in a round; default: {ROUND_LENGTH}, with --minutes at most a tenth of"
        " all",
    )
    # Among the best of a sweep on small models (benchmarks/diloco_sweep.py; its figures and those
    # of real runs: benchmarks/README.md). They take a little less than a round's own change (0.5 x
    # 1.8 of it) and let momentum make up the distance. The published 0.7 and 0.9 (arXiv 2311.08105)
    # were the worst there. More processes bear a higher rate: see `outer.settings_of_rounds`.
    outer_lr: float | None = flag(
        None,
        "diloco: learning rate of the outer step, on the average of all pseudo-gradients; default:"
        " 0.5 of two processes, 0.7 of four (with Muon 0.6 and 0.75), 1 of eight or more, and"
        " nearer to 1 in rounds of fewer than 20 updates; 1 with --outer-momentum 0 is plain"
        " averaging",
    )
    outer_momentum: float | None = flag(
        None,
        "diloco: Nesterov momentum of the outer step; default: 0.8 (with Muon 0.6 of two"
        " processes, 0.65 of four), less of shorter rounds",
    )
    outer_warmup_rounds: int = flag(
        20, "diloco: rounds in which the outer step goes from plain averaging to these settings"
    )
    fragments: int = flag(1, "diloco: parts of the layers that are synchronised one at a time")
    overlap_steps: int = flag(
        0, "diloco: updates that are taken while an exchange is under way; its result comes after"
    )
    ddp_warmup_steps: int = flag(0, "diloco: updates as by ddp before the first round")
    balance: Literal["none", "auto"] = flag(
        "none", "auto: faster processes get more blocks of an update, slower ones fewer"
    )

    def round_length(self) -> int:
        """Updates in a round of DiLoCo."""
        return self.sync_every or ROUND_LENGTH

    def is_streaming(self) -> bool:
        """Whether there is no moment, but the end, at which all ranks hold the same weights."""
        return self.sync == "diloco" and (self.fragments > 1 or self.overlap_steps > 0)

    def keeps_own_state(self) -> bool:
        """Whether ranks hold what others do not, so that checkpoints take a file of each."""
        return self.sync == "diloco" or self.compress != "none"

    def check(self, problems: Problems) -> None:
        require_at_least(1, self, problems, "sync_every", "fragments", "powersgd_rank")
        require_at_least(
            0, self, problems, "outer_warmup_rounds", "overlap_steps", "ddp_warmup_steps"
        )
        require_above_0(self, problems, "outer_lr")
        problems.require(
            self.outer_momentum is None or 0 <= self.outer_momentum < 1,
            f"--outer-momentum is {self.outer_momentum}",
            "use a number from 0 to below 1",
        )
        problems.require(
            self.sync != "auto" or self.compress == "none",
            f"--sync auto chooses the compression too, but --compress {self.compress} was given",
            "leave out --compress, or choose --sync ddp or diloco",
        )
        problems.require(
            self.powersgd_rank is None or self.compress == "powersgd",
            f"--powersgd-rank belongs to --compress powersgd, this run has {self.compress}",
            "add --compress powersgd, or leave the rank out",
        )
        if self.sync == "diloco":
            self._check_rounds(problems)
        else:
            self._refuse_options_of_rounds(problems)

    def _refuse_options_of_rounds(self, problems: Problems) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [option(name) for name in OF_DILOCO if getattr(self, name) != defaults[name]]
        problems.require(
            not given,
            f"{', '.join(given)} belong{'s' if len(given) == 1 else ''} to --sync diloco, this run"
            f" is --sync {self.sync}",
            "add --sync diloco, or leave them out",
        )

    def _check_rounds(self, problems: Problems) -> None:
        every = self.round_length()
        problems.require(
            self.compress != "powersgd",
            "--compress powersgd approximates gradients and goes with --sync ddp, not diloco",
            "use --compress int8 or int4",
        )
        problems.require(
            self.fragments <= every,
            f"--fragments {self.fragments} cannot be synchronised at different moments of"
            f" --sync-every {every} updates",
            f"use {every} fragments or fewer",
        )
        problems.require(
            self.overlap_steps < every,
            f"--overlap-steps {self.overlap_steps} is not below --sync-every {every}: an exchange"
            " must end before the next begins",
            f"use {every - 1} or fewer",
        )
