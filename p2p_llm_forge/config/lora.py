"""What train.py can be asked about LoRA: small matrices trained in place of all weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag, option, require_between
from p2p_llm_forge.config.other_names import Meaning, all_of, answer, renamed, unless_off
from p2p_llm_forge.errors import Problems

# Files of adapters, as peft calls them; and of what they were trained beside.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.json"
INSTALL = "python -m pip install 'peft>=0.20,<0.22'"
HIGHEST_RANK = 4096
QUANTISED = (
    "leave it out: no GPU has shown bitsandbytes working here; --base-dtype bfloat16 halves the"
    " base's memory"
)
OTHER_NAMES: dict[str, Meaning] = {
    **all_of("lora_r lora_n r", renamed("--lora-rank")),
    "lora_target_modules": renamed("--lora-targets"),
    "lora_target_linear": Meaning(
        lambda typed: ["--lora-targets", "all-linear"] if typed.is_on() else [],
        is_switch=True,
        stands_for="--lora-targets",
    ),
    **all_of("use_peft use_lora lora", unless_off("use --lora-rank N, such as --lora-rank 16")),
    **all_of("load_in_4bit load_in_8bit use_4bit qlora use_qlora", unless_off(QUANTISED)),
    **all_of(
        "quantize quantization bnb_4bit_quant_type bnb_4bit_compute_dtype quantization_config",
        answer(QUANTISED),
    ),
    **all_of("use_rslora use_dora", unless_off("leave it out: plain LoRA is what there is")),
    **all_of(
        "lora_task_type lora_modules_to_save lora_target_parameters",
        answer("leave it out: a causal language model is adapted, in --lora-targets alone"),
    ),
}


@dataclass
class LoraOptions(Options):
    """Whether adapters are trained in place of the model's own weights, and which."""

    heading = "LoRA"
    shown_with = "model"
    COMMON = ["lora_rank"]
    OTHER_NAMES = OTHER_NAMES

    lora_rank: int | None = flag(
        None,
        "LoRA: train adapters of this rank beside the model's weights, which stay; such as 16",
    )
    lora_alpha: int | None = flag(
        None, "what adapters add is multiplied by this / rank; default: twice the rank"
    )
    lora_dropout: float = flag(0.0, "of what adapters read, in training")
    lora_targets: list[str] = flag(
        ["auto"],
        "layers that get adapters, by the ends of their names; auto, all-linear: all but the head",
        metavar="NAME",
    )
    base_dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "of the weights that stay; auto: bfloat16 where that is what is computed in"
        " (--mixed-precision), as it takes half the memory",
    )
    merge_lora: bool = flag(
        False, "publish the whole model, adapters added to its weights, not adapters alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lora_targets, str):
            self.lora_targets = [self.lora_targets]
        if isinstance(self.lora_targets, list) and all(
            isinstance(one, str) for one in self.lora_targets
        ):
            # One word with commas, as in a YAML file or by litgpt's habits.
            words = [word.strip() for one in self.lora_targets for word in one.split(",")]
            self.lora_targets = [word for word in words if word]

    @property
    def scaling(self) -> int | None:
        """What --lora-alpha has come to; None without LoRA."""
        return self.lora_alpha or (2 * self.lora_rank if self.lora_rank else None)

    def check(self, problems: Problems) -> None:
        require_between((1, HIGHEST_RANK), self, problems, "lora_rank")
        require_between((1, 2**20), self, problems, "lora_alpha")
        problems.require(
            0 <= self.lora_dropout < 1,
            f"--lora-dropout {self.lora_dropout} is not a share",
            "give 0 or more and less than 1, such as 0.05",
        )
        problems.require(
            bool(self.lora_targets),
            "--lora-targets names no layer",
            "give auto, all-linear or names of layers, such as q_proj v_proj",
        )
        whole = {"auto", "all-linear"} & {*self.lora_targets}
        problems.require(
            not whole or len(self.lora_targets) == 1,
            f"--lora-targets {' '.join(self.lora_targets)} names layers beside"
            f" {' and '.join(sorted(whole))}",
            f"leave out {' and '.join(sorted(whole))}, or the others",
        )
        if self.lora_rank is None:
            self._refuse_without_rank(problems)
            return
        problems.require(
            importlib.util.find_spec("peft") is not None,
            "--lora-rank needs the package peft, which is not installed",
            INSTALL,
        )
        # Options of other groups, with which this one is built into a whole.
        is_of_old = getattr(self, "eval_only", None) or getattr(self, "push_to_hub", None)
        problems.require(
            bool(getattr(self, "model_name", None) or is_of_old),
            "--lora-rank adapts a model that was trained before, and none is given",
            "add --model-name MODEL, or leave --lora-rank out",
        )

    def _refuse_without_rank(self, problems: Problems) -> None:
        """Note options of LoRA where it is not asked for."""
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "base_dtype", "merge_lora"):
            value, usual = getattr(self, name), getattr(LoraOptions(), name)
            problems.require(
                value == usual,
                f"{option(name)} is for LoRA, which is not asked for",
                f"add --lora-rank 16, or leave {option(name)} out",
            )
