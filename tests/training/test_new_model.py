"""A run begins with a model that fits its data."""

from __future__ import annotations

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training.new_model import new_model, text_spec_of
from tests.runs import TINY_MODEL


def test_a_run_begins_with_a_model_that_fits_its_data(prepared, tmp_path):
    data = open_prepared(prepared)
    config = TrainConfig(output_dir=str(tmp_path), config_overrides=TINY_MODEL)
    with join(config) as cluster:
        lm = new_model(config, cluster, data)
    assert lm.config.vocab_size == data.manifest.vocab_size
    assert lm.config.n_positions == data.manifest.sequence_length
    assert lm.config.eos_token_id == data.manifest.eos_token_id
    assert text_spec_of(data).tokenizer_dir == prepared / "tokenizer"
