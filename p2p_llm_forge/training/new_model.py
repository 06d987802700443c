"""The model that a run begins with, made for its data."""

from __future__ import annotations

from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.peers.cluster import Cluster


def new_model(config: TrainConfig, cluster: Cluster, data: PreparedDataset) -> Any:
    """The causal LM that the run begins with, in float32, on the CPU. Raises ForgeError."""
    return build_model(config, text_spec_of(data), cluster.launch.local_world_size)


def text_spec_of(data: PreparedDataset) -> TextSpec:
    """What a model must know of the text in `data`."""
    manifest = data.manifest
    return TextSpec(
        vocab_size=manifest.vocab_size,
        eos_token_id=manifest.eos_token_id,
        sequence_length=manifest.sequence_length,
        tokenizer_dir=data.tokenizer_dir,
    )
