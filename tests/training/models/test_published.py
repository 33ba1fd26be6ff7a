"""The networks of the papers: their numbers of parameters and the shapes of their outputs.

Everything large happens on the meta device, where nothing is computed.
"""

import pytest
import torch

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.training.models.shapes import layers_of

# name, options, input of a sample -> parameters as published
PUBLISHED = {
    "lenet1989": ("lenet1989", {}, (1, 16, 16), 9_760),
    # 60,000, and the linear output in place of fixed pictures: 84 x 10 + 10
    "lenet5": ("lenet5", {}, (1, 32, 32), 60_850),
    "lenet": ("lenet", {}, (1, 28, 28), 431_080),
    "alexnet": ("alexnet", {}, (3, 224, 224), 60_965_224),
    "nin": ("nin", {}, (3, 224, 224), 7_595_176),
    "googlenet": ("googlenet", {}, (3, 224, 224), 13_378_280),
    "googlenet without heads": ("googlenet", {"heads": False}, (3, 224, 224), 6_998_552),
    "vgg16": ("vgg", {}, (3, 224, 224), 138_357_544),
    "vgg19": ("vgg", {"depth": 19}, (3, 224, 224), 143_667_240),
    "squeezenet": ("squeezenet", {}, (3, 227, 227), 1_248_424),
    "resnet18": ("resnet", {}, (3, 224, 224), 11_689_512),
    "resnet50": ("resnet", {"depth": 50}, (3, 224, 224), 25_557_032),
}  # fmt: skip
# Output pixels of convolutions as published, by layer.
POSITIONS = {
    "alexnet": [55**2, 27**2, 13**2, 13**2, 13**2, 1, 1, 1],
    "nin": [54**2] * 3 + [27**2] * 3 + [13**2] * 3 + [6**2] * 3,
}
# Multiply-adds of a sample that are widely quoted, in millions.
MULTIPLY_ADDS = {"alexnet": 724, "vgg16": 15_470, "resnet18": 1_814, "resnet50": 4_089}


def on_meta(case: str):
    name, options, sample, _ = PUBLISHED[case]
    with torch.device("meta"):
        return plugins.load("model", name)(**options), sample


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters_and_outputs_are_those_of_the_publication(case: str):
    network, sample = on_meta(case)
    assert sum(each.numel() for each in network.parameters()) == PUBLISHED[case][-1]
    classes = 10 if case.startswith("lenet") else 1000
    assert network.eval()(torch.zeros(2, *sample, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("case", {*POSITIONS, *MULTIPLY_ADDS})
def test_layers_compute_as_much_as_those_of_the_publication(case: str):
    layers = layers_of(*on_meta(case))
    if case in POSITIONS:
        assert [layer.positions for layer in layers] == POSITIONS[case]
    if case in MULTIPLY_ADDS:
        millions = sum(layer.multiply_adds for layer in layers) / 1e6
        assert millions == pytest.approx(MULTIPLY_ADDS[case], rel=0.01)


def test_gpt_is_that_of_gpt2_and_sees_no_token_to_come():
    with torch.device("meta"):
        gpt2 = plugins.load("model", "gpt")(
            kinds=50257, length=1024, width=768, layers=12, heads=12
        )
    assert sum(each.numel() for each in gpt2.parameters()) == 124_439_808
    network = plugins.load("model", "gpt")(length=8)
    tokens = torch.randint(97, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 97
    before, after = network(tokens), network(changed)
    assert before.shape == (2, 97, 8)
    assert torch.equal(before[..., :5], after[..., :5])
    assert (before[..., 5:] != after[..., 5:]).any(dim=1).all()
    with pytest.raises(UserError, match="a multiple of 4"):
        plugins.load("model", "gpt")(width=10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet", {"size": 16}),
        ("nin", {}),
        ("googlenet", {}),
        ("squeezenet", {}),
        ("resnet", {}),
        ("resnet", {"depth": 50}),
        ("vgg", {"size": 32}),
    ],
)
def test_a_narrow_network_for_small_images_trains_all_its_weights(name: str, options: dict):
    torch.manual_seed(0)
    if name != "vgg":
        options = {**options, "small": True}
    network = plugins.load("model", name)(classes=7, channels=1, width=0.125, **options)
    images = torch.randn(3, 1, options.get("size", 16), options.get("size", 16))
    outputs = network(images)
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(each.shape == (3, 7) for each in every)
    torch.stack([each.square().sum() for each in every]).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in network.parameters())


@pytest.mark.parametrize("name", ["nin", "squeezenet"])
def test_a_small_network_does_not_end_its_maps_at_zero(name: str):
    """Bug it catches: a ReLU behind the last layer, which kills few and narrow maps for good."""
    torch.manual_seed(0)
    network = plugins.load("model", name)(classes=7, channels=1, width=0.125, small=True)
    assert (network(torch.randn(30, 1, 16, 16)) < 0).any()
