"""Tests of training/recompute.py.

Bugs it catches: other dropout masks in backward, running statistics that count a batch twice, names
of parameters that change, a copy of the model that computes with the original's weights.
"""

import copy

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.training.recompute import recompute


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return inputs


def network() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(Counted(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(6, 6), block, nn.Tanh(), nn.Linear(6, 2))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return model.state_dict()


def test_training_is_the_same_to_the_bit():
    expected = trained(network())
    model = network()
    assert recompute(model, ["1"]) == ["1"]
    found = trained(model)
    assert model[1][0].calls == 6, "three forward passes, and three in backward"
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_evaluation_runs_once():
    model = network().eval()
    recompute(model, ["1"])
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert model[1][0].calls == 1


def test_modules_inside_a_chosen_one_belong_to_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert recompute(model, ["*"]) == ["0", "1"]
    assert recompute(nn.Sequential(model), ["0.?.0"]) == ["0.0.0"]


def test_a_copy_computes_with_its_own_weights():
    model = network()
    recompute(model, ["1"])
    twin = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    plain = network().eval()
    assert torch.equal(twin(torch.ones(2, 6)), plain(torch.ones(2, 6)))
    assert twin[1][0].calls == 1 and model[1][0].calls == 0


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(UserError, match="recompute: 'layers' matches no module of the model"):
        recompute(network(), ["1", "layers"])
