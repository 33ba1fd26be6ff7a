"""Tests of training/optimizers/lars.py against steps that are worked out by hand."""

import torch
from torch import nn

from scaletrain.training.optimizers.lars import optimizer


def test_two_steps_are_those_of_the_paper():
    weights = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))  # norm 5
    made = optimizer([weights], lr=2.0, momentum=0.5, weight_decay=0.1, trust_coefficient=0.01)
    weights.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)  # norm 1
    made.step()
    # local = 0.01 * 5 / (1 + 0.1 * 5) = 1 / 30; v = (0.9, 1.2) / 30 = (0.03, 0.04)
    torch.testing.assert_close(weights.data, torch.tensor([2.94, 3.92], dtype=torch.float64))
    weights.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    made.step()
    # |w| = 4.9; local = 0.049 / (2 + 0.49) = 0.019678715
    # v = (0.015, 0.02) + local * (0.294, 2.392) = (0.0207855422, 0.0670714859)
    expected = torch.tensor([2.94 - 0.0415710843, 3.92 - 0.1341429719], dtype=torch.float64)
    torch.testing.assert_close(weights.data, expected)


def test_zeros_move_and_a_layer_that_is_not_adaptive_is_sgds():
    zeros = nn.Parameter(torch.zeros(2))
    plain = nn.Parameter(torch.tensor([1.0, 2.0]))
    groups = [{"params": [zeros]}, {"params": [plain], "adaptive": False}]
    made = optimizer(groups, lr=0.5, momentum=0.9, weight_decay=0.1)
    reference = nn.Parameter(plain.detach().clone())
    sgd = torch.optim.SGD([reference], lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        zeros.grad = torch.tensor([1.0, -1.0])
        plain.grad, reference.grad = torch.ones(2), torch.ones(2)
        made.step()
        sgd.step()
        if not zeros.isfinite().all():
            raise AssertionError(zeros)
    assert (zeros != 0).all()
    torch.testing.assert_close(plain, reference)


def test_a_parameter_without_gradient_is_left_alone():
    weights = nn.Parameter(torch.ones(2))
    optimizer([weights]).step()
    assert torch.equal(weights.data, torch.ones(2))
