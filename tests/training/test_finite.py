"""What one cannot compute with is found, whichever tensor of whichever kind holds it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from p2p_llm_forge.training.finite import bad_tensor, bad_tensor_in, bad_weight

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_value_anywhere_is_found_and_named(dtype, bad):
    good = torch.linspace(-2, 2, 1001, dtype=dtype)
    assert bad_tensor([("a", good)]) is None
    for place in (0, 500, 1000):
        spoiled = good.clone()
        spoiled[place] = bad
        found = bad_tensor([("a", good), ("b.weight", spoiled), ("c", spoiled)])
        assert found == "NaN or infinite values in b.weight"


def test_weights_whose_squares_overflow_are_bad_and_such_moments_are_not():
    """An update with a rate of 1e38 leaves finite weights, and an infinite loss."""
    ruined = [("weight", torch.tensor([1.0, -1e38]))]
    assert bad_weight(ruined) == "values of 1.0e+38 in weight, too large to compute with"
    assert bad_tensor(ruined) is None and bad_weight([("weight", torch.tensor([1e18]))]) is None


def test_whole_numbers_and_empty_tensors_are_never_bad():
    others = [torch.arange(9), torch.tensor([True]), torch.empty(0), torch.tensor(2**62)]
    assert bad_weight(("x", tensor) for tensor in others) is None


def test_a_file_is_read_tensor_by_tensor(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.tensor([1.0, 1e38])}
    for name, expected in (("model.safetensors", "too large"), ("optimizer.safetensors", None)):
        save_file(tensors, tmp_path / name)
        found = bad_tensor_in(tmp_path / name)
        assert found is None if expected is None else expected in found
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError):
        bad_tensor_in(tmp_path / "model.safetensors")
    with pytest.raises(OSError):
        bad_tensor_in(tmp_path / "none.safetensors")
