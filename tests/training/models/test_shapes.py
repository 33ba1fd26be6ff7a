"""Tests of training/models/shapes.py.

The shapes are those of the published networks: exact totals.
"""

import pytest
import torch

from scaletrain.training.models.shapes import PRESETS, model

PARAMETERS = {  # as published; float32 MB: 1.7, 5.0, 53.5, 28.0, 30.4, 243.9, 553, 575
    "lenet": 431_080, "squeezenet": 1_248_424, "googlenet": 13_378_280, "googlenet_inference": 6_998_552,
    "nin": 7_595_176, "alexnet": 60_965_224, "vgg16": 138_357_544, "vgg19": 143_667_240,
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_publication(preset):
    with torch.device("meta"):
        made = model(preset=preset)
    assert sum(p.numel() for p in made.parameters()) == PARAMETERS[preset]


def test_multiply_adds_of_alexnet():
    """AlexNet's forward pass takes 724 million multiply-adds (a widely quoted count: 0.72 G)."""
    with torch.device("meta"):
        made = model(preset="alexnet")
    assert sum(layer.multiply_adds for layer in made.layers.values()) == pytest.approx(
        724e6, rel=0.01
    )


def test_every_weight_has_a_gradient():
    made = model(preset="lenet")
    output = made(torch.zeros(3, 1))
    assert output.shape == (3, 10)
    torch.nn.functional.cross_entropy(output, torch.tensor([0, 1, 2])).backward()
    assert all((p.grad != 0).all() for p in made.parameters())
