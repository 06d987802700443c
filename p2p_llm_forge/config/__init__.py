"""What can be asked of the scripts: groups of options, read from flags and recipes, and checked."""

from p2p_llm_forge.config.check import CheckConfig
from p2p_llm_forge.config.export import ExportConfig
from p2p_llm_forge.config.fields import as_dict, multiples_near, option
from p2p_llm_forge.config.generate import GenerateConfig, name_first
from p2p_llm_forge.config.help import flags_table
from p2p_llm_forge.config.parser import parse
from p2p_llm_forge.config.prepare import PrepareConfig
from p2p_llm_forge.config.sync import OF_DILOCO
from p2p_llm_forge.config.train import TrainConfig

__all__ = [
    "OF_DILOCO",
    "CheckConfig",
    "ExportConfig",
    "GenerateConfig",
    "PrepareConfig",
    "TrainConfig",
    "as_dict",
    "flags_table",
    "multiples_near",
    "name_first",
    "option",
    "parse",
]
