"""Tests of training/optimizers/lamb.py against steps that are worked out by hand."""

import math

import torch
from torch import nn

from scaletrain.training.optimizers.lamb import optimizer


def test_two_steps_are_those_of_the_paper():
    weights = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    made = optimizer([weights], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.25)
    weights.grad = torch.tensor([2.0, -1.0], dtype=torch.float64)
    made.step()
    # Corrected for their start, m is g and v is g^2: r = (1, -1) + 0.25 w = (1.75, 0).
    # The norms are 5 and 1.75, so the step is 0.1 * 5 / 1.75 * (1.75, 0) = (0.5, 0).
    torch.testing.assert_close(weights.data, torch.tensor([2.5, 4.0], dtype=torch.float64))
    weights.grad = torch.tensor([0.0, 1.0], dtype=torch.float64)
    made.step()
    # m = (0.5, 0.25) / 0.75; v = (0.75, 0.4375) / 0.4375, by 1 - beta^2.
    first = (0.5 / 0.75) / math.sqrt(0.75 / 0.4375) + 0.25 * 2.5
    second = (0.25 / 0.75) / math.sqrt(0.4375 / 0.4375) + 0.25 * 4.0
    ratio = math.hypot(2.5, 4.0) / math.hypot(first, second)
    expected = [2.5 - 0.1 * ratio * first, 4.0 - 0.1 * ratio * second]
    torch.testing.assert_close(weights.data, torch.tensor(expected, dtype=torch.float64))


def test_zeros_move_and_a_layer_that_is_not_adaptive_is_adamws():
    zeros = nn.Parameter(torch.zeros(2))
    plain = nn.Parameter(torch.tensor([1.0, 2.0]))
    groups = [{"params": [zeros]}, {"params": [plain], "adaptive": False}]
    made = optimizer(groups, lr=0.05, weight_decay=0.1)
    reference = nn.Parameter(plain.detach().clone())
    adamw = torch.optim.AdamW([reference], lr=0.05, eps=1e-6, weight_decay=0.1)
    for step in range(4):
        zeros.grad = torch.tensor([1.0, -1.0])
        plain.grad = torch.tensor([1.0, -0.5]) * (step + 1)
        reference.grad = plain.grad.clone()
        made.step()
        adamw.step()
    assert zeros.isfinite().all() and (zeros != 0).all()
    torch.testing.assert_close(plain, reference)
