"""What a checkpoint holds comes back as it was, and nothing of another model does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import write_json
from p2p_llm_forge.sync.base import SyncState
from p2p_llm_forge.training import checkpoint, snapshot
from p2p_llm_forge.training.pruning import is_leftover
from tests.training.saved import state_of


class InLayers(torch.nn.Module):
    """A model with a matrix inside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 16)])
        self.head = torch.nn.Linear(16, 1)

    def forward(self, inputs):
        return self.head(self.layers[0](inputs))


def save(folder, model, optimizer, state):
    from safetensors.torch import save_file

    tensors = snapshot.optimizer_tensors(model, optimizer)
    assert tensors or isinstance(optimizer, torch.optim.SGD)
    save_file(tensors, folder / snapshot.OPTIMIZER)
    write_json(folder / checkpoint.TRAINER_STATE, state)


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd", "adafactor"])
def test_an_optimizer_resumes_from_its_saved_state(tmp_path, kind):
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.model.optimizer import build_optimizer

    def model_and_optimizer():
        torch.manual_seed(0)
        model = InLayers()
        return model, build_optimizer(TrainConfig(optimizer=kind, learning_rate=0.01), model)

    def update(model, optimizer, step):
        torch.manual_seed(step)
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight = model_and_optimizer()
    for step in range(6):
        update(*straight, step)
    first = model_and_optimizer()
    for step in range(3):
        update(*first, step)
    save(tmp_path, *first, state_of(3))
    second = model_and_optimizer()
    second[0].load_state_dict(first[0].state_dict())
    snapshot.load_optimizer(tmp_path, *second)
    assert checkpoint.read_state(tmp_path)["step"] == 3
    for step in range(3, 6):
        update(*second, step)
    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save(tmp_path, model, optimizer, {"step": 1})
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ForgeError, match="another model"):
        snapshot.load_optimizer(tmp_path, other, torch.optim.AdamW(other.parameters()))


def test_optimizer_state_that_lacks_a_parameter_is_refused(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save(tmp_path, model, optimizer, {"step": 1})
    file = tmp_path / snapshot.OPTIMIZER
    kept = {key: one for key, one in load_file(file).items() if not key.startswith("weight.")}
    assert kept
    save_file(kept, file)
    with pytest.raises(ForgeError, match="no optimizer state for weight") as error:
        snapshot.load_optimizer(tmp_path, model, torch.optim.AdamW(model.parameters()))
    assert "--optimizer" in error.value.problems[0].fix


def test_a_rank_file_is_collected_into_the_checkpoint(tmp_path):
    own = {"residual": torch.arange(3.0)}
    name = snapshot.write_rank_file(tmp_path, 2, own)
    assert is_leftover(name), "what a kill leaves of it would stay"
    saved = tmp_path / "saved"
    saved.mkdir()
    snapshot.collect_rank_file(tmp_path, name, 2, saved)
    collected = snapshot.tensors_in(saved / snapshot.rank_file(2))
    assert torch.equal(collected["residual"], own["residual"])
    assert snapshot.tensors_in(saved / snapshot.rank_file(1)) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_rank_file_that_is_not_seen_names_the_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "SEEN_WITHIN_S", 0.05)
    with pytest.raises(ForgeError, match="rank 3 has written gone into --output-dir") as error:
        snapshot.collect_rank_file(tmp_path, "gone", 3, tmp_path)
    assert error.value.problems[0].fix == "give an --output-dir that all machines share"


def test_a_rank_file_that_cannot_be_written_names_the_rank(tmp_path):
    with pytest.raises(ForgeError, match="rank 1 could not write"):
        snapshot.write_rank_file(tmp_path / "no such folder", 1, {"x": torch.zeros(1)})


def test_tied_weights_are_copied_once():
    """Twice, save_pretrained would refuse them as two tensors of one memory."""
    one, two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    tied = torch.nn.ModuleList([one, two])
    taken = snapshot.Snapshot.take(tied, torch.optim.SGD(tied.parameters()), {}, SyncState())
    assert taken.model["0.weight"].data_ptr() == taken.model["1.weight"].data_ptr()
    assert taken.model["0.weight"].data_ptr() != one.weight.data_ptr()
