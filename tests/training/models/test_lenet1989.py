"""LeNet of 1989 against its figures in the paper: units and connections of each layer."""

import torch

from scaletrain.training.models import lenet5, lenet1989


def test_each_layer_has_the_units_and_free_parameters_of_the_paper():
    network = lenet1989.model()
    size = {name: each.numel() for name, each in network.named_parameters()}
    assert size["h1.weight"] + size["h1_bias"] == 1068  # 768 biases and 25 times 12 weights
    assert sum(size[f"h2.{third}.weight"] for third in range(3)) + size["h2_bias"] == 2592
    assert size["h3.weight"] + size["h3.bias"] == 5790
    assert size["output.weight"] + size["output.bias"] == 310


def test_every_map_of_the_second_layer_sees_eight_maps_and_every_map_is_seen():
    network = lenet1989.model()
    seen = torch.zeros(12, 12, dtype=torch.bool)
    for source in range(12):
        # A map that is large where all others are 0 changes those that see it.
        maps = torch.zeros(1, 12, 8, 8)
        maps[:, source] = 1.0
        ring = lenet1989._padded(torch.cat([maps, maps], dim=1))
        zero = lenet1989._padded(torch.zeros_like(torch.cat([maps, maps], dim=1)))
        thirds = [
            (layer(ring[:, 4 * t : 4 * t + 8]) - layer(zero[:, 4 * t : 4 * t + 8])).abs().amax((0, 2, 3))
            for t, layer in enumerate(network.h2)
        ]  # fmt: skip
        seen[:, source] = torch.cat(thirds) > 1e-6
    assert (seen.sum(1) == 8).all() and (seen.sum(0) == 8).all()


def test_lenet5_has_sixty_thousand_parameters_before_its_output():
    network = lenet5.model()
    parameters = {name: each.numel() for name, each in network.named_parameters()}
    assert sum(n for name, n in parameters.items() if not name.startswith("output")) == 60_000
    assert sum(n for name, n in parameters.items() if name.startswith("c3")) == 1516  # table I
