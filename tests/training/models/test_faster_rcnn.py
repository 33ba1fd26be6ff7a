"""Tests of the model faster_rcnn: the paper's rules one by one, and what reaches which weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.errors import UserError
from scaletrain.recipes import recipe
from scaletrain.training import boxes
from scaletrain.training.models import faster_rcnn
from scaletrain.training.models.faster_rcnn import FasterRCNN, Regions, Size, Truth
from tests.training.test_boxes import whole_boxes

SMALL: dict[str, Any] = {
    "classes": 3,
    "channels": 1,
    "depths": (1, 1, 1),
    "widths": (4, 6, 8),
    "scales": (6.0, 12.0),
    "ratios": (1.0, 2.0),
    "hidden": 10,
    "pooled": 3,
    "dropout": 0.0,
    "candidates": 40,
    "proposals": 12,
    "sampled_anchors": 16,
    "sampled_regions": 8,
    "detections": 5,
}
SIZE = Size(32, 40)
OBJECTS = (3, 0, 1, 2)  # of each image


def network(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    made = faster_rcnn.model(**SMALL | options)
    for parameter in made.parameters():  # so that proposals differ from anchors
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    assert isinstance(made, FasterRCNN)
    return made


def batch() -> tuple[Tensor, Truth]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(len(OBJECTS), 1, *SIZE, generator=random)
    most = max(OBJECTS)
    truth = Truth(torch.zeros(4, most, 4), torch.full((4, most), -1), torch.arange(40, 44))
    for index, count in enumerate(OBJECTS):
        corners = 20 * torch.rand(count, 2, generator=random)
        truth.boxes[index, :count] = torch.cat([corners, corners + torch.tensor([6.0, 11.0])], 1)
        truth.labels[index, :count] = torch.randint(3, (count,), generator=random)
    return images, truth


def image(index: int) -> tuple[Tensor, Truth]:
    """Return one image of the batch alone, with no more places than it has objects."""
    images, truth = batch()
    count = max(OBJECTS[index], 1)
    own = slice(index, index + 1)
    return images[own], Truth(truth.boxes[own, :count], truth.labels[own, :count], truth.seeds[own])


def test_the_full_recipe_is_the_papers_network():
    """Every figure is the paper's, or VGG-16's; nothing is computed on the meta device."""
    run = recipe.load("faster_rcnn").run_config("joint", scale="full")
    assert run.workload is not None
    options = run.workload.options["network"]
    with torch.device("meta"):
        full = faster_rcnn.model(**options)
        features = full.features(torch.zeros(2, options["channels"], 608, 1008))
        scores, shifts = full.proposer(features)
        regions = torch.zeros(2, 300, 4)
        classes, of_classes = full.detector(features, regions)
        torch.stack([each.sum() for each in (scores, shifts, classes, of_classes)]).sum().backward()
    assert features.shape == (2, 512, 38, 63)
    anchors = 38 * 63 * 9  # "roughly 20000 (60 x 40 x 9)"
    assert scores.shape == (2, anchors, 2) and shifts.shape == (2, anchors, 4)
    kinds = options["classes"]
    assert classes.shape == (2, 300, kinds + 1) and of_classes.shape == (2, 300, kinds, 4)
    assert all(each.grad is not None for each in full.parameters())
    sizes = {name: each.numel() for name, each in full.named_parameters()}
    outputs = sizes["proposer.scores.weight"] + sizes["proposer.offsets.weight"]
    assert outputs == 512 * (4 + 2) * 9  # 2.8e4
    assert sizes["proposer.slide.weight"] == 3 * 3 * 512 * 512
    of_features = sum(number for name, number in sizes.items() if name.startswith("features"))
    assert of_features == 14_714_688 - 2 * 9 * 64  # VGG-16's convolutions, of a grey image
    of_layers = sum(number for name, number in sizes.items() if name.startswith("detector.layers"))
    assert of_layers == 119_545_856  # its full layers


def test_anchors_are_assigned_by_the_rules_of_the_paper():
    references = torch.cat([whole_boxes(80, 0), whole_boxes(40, 1)])
    are_inside = torch.arange(120) % 7 != 0
    objects = torch.stack([whole_boxes(5, 2), torch.zeros(5, 4), whole_boxes(5, 3)])
    found = faster_rcnn.assigned(references, are_inside, objects)
    for own, are_objects, are_background, match in zip(objects, *found, strict=True):
        overlap = boxes.overlaps(references, own)
        best = [
            max(overlap[index, k].item() for index in range(120) if are_inside[index])
            for k in range(5)
        ]
        for index in range(120):
            most = overlap[index].max().item()
            is_best = any(overlap[index, k] == best[k] > 0 for k in range(5))
            is_object = bool(are_inside[index]) and (most >= 0.7 or is_best)
            assert are_objects[index] == is_object
            assert are_background[index] == (are_inside[index] and most < 0.3 and not is_object)
            if is_object:
                assert overlap[index, match[index]] == most
    assert found[0].any(1).tolist() == [True, False, True]
    assert (found[1] | found[0]).sum() < are_inside.sum() * 3, "some are neither"


def test_samples_are_half_objects_at_most_and_filled_up_with_background():
    chances = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    candidates = torch.zeros(3, 200, dtype=torch.bool)
    candidates[0, :90], candidates[1, :4] = True, True
    picked = faster_rcnn._picked(candidates, chances, 16)
    assert picked.sum(1).tolist() == [16, 4, 0] and not (picked & ~candidates).any()
    rest = faster_rcnn._picked(~candidates, chances, 32 - picked.sum(1, keepdim=True))
    assert rest.sum(1).tolist() == [16, 28, 32] and not (rest & candidates).any()
    # Every candidate is as likely as any other.
    chances = torch.rand(4000, 200, generator=torch.Generator().manual_seed(1))
    shares = faster_rcnn._picked(candidates[:1].expand(4000, -1), chances, 16).float().mean(0)
    torch.testing.assert_close(shares[:90], torch.full((90,), 16 / 90), rtol=0.2, atol=0)


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"proposed_by": "windows"}])
def test_the_losses_of_a_batch_are_those_of_its_images(options: dict[str, Any]):
    """Bug it catches: draws, boxes or padding of one image that change the loss of another."""
    model = network(**options)
    together = model(*batch())
    alone = [model(*image(index)) for index in range(4)]
    assert len(together) == (2 if options.get("proposed_by") else 4)
    for name, total in together.items():
        torch.testing.assert_close(total, torch.stack([each[name] for each in alone]).sum())
        assert total > 0
    for name in together.keys() & {"proposals", "boxes"}:
        assert alone[1][name] == 0 and alone[1][name].requires_grad, "an image without an object"


def test_another_epoch_samples_anew():
    images, truth = batch()
    model = network()
    first, second = (
        model(images, truth._replace(seeds=truth.seeds + shift)) for shift in (0, 1000)
    )
    assert not torch.isclose(first["objectness"], second["objectness"], rtol=1e-4)
    assert not torch.isclose(first["classes"], second["classes"], rtol=1e-4)


def gradients(model: FasterRCNN, names: list[str]) -> set[str]:
    """Return the parts of the model that some losses reach."""
    model.zero_grad()
    losses = model(*batch())
    torch.stack([losses[name] for name in names]).sum().backward()
    reached = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            reached.add(name.split(".")[0])
    return reached


def test_both_trainings_shape_the_features_and_only_those_together():
    shared = network()
    assert gradients(shared, ["objectness", "proposals"]) == {"features", "proposer"}
    # Proposals are constants to the detector (approximate joint training).
    assert gradients(shared, ["classes", "boxes"]) == {"features", "detector"}
    separate = network(shared=False)
    assert gradients(separate, ["objectness", "proposals"]) == {"proposer", "proposer_features"}
    assert gradients(separate, ["classes", "boxes"]) == {"features", "detector"}


def test_every_parameter_has_a_gradient_though_no_image_has_an_object():
    model = network()
    images, truth = image(1)
    losses = model(images, truth)
    torch.stack([*losses.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any() == ("offsets" not in name), name


def test_pooled_features_are_those_at_the_middles_of_cells():
    """Features that are the place in the image itself, in pixels."""
    y = (torch.arange(8) + 0.5) * 4
    x = (torch.arange(10) + 0.5) * 4
    features = torch.stack(torch.meshgrid(x, y, indexing="xy")).repeat(2, 1, 1, 1)
    regions = torch.tensor([[[4.0, 6, 16, 12], [10, 10, 11, 14]], [[2.0, 2, 38, 30], [0, 0, 0, 0]]])
    pooled = faster_rcnn.pooled_regions(features, regions, stride=4, side=2)
    assert pooled.shape == (2, 2, 2, 2, 2)
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([[7.0, 13], [7, 13]]))
    torch.testing.assert_close(pooled[0, 0, 1], torch.tensor([[7.5, 7.5], [10.5, 10.5]]))
    torch.testing.assert_close(pooled[0, 1, 0, 0], torch.tensor([10.25, 10.75]))
    torch.testing.assert_close(pooled[1, 0, 0, 1], torch.tensor([11.0, 29.0]))
    assert (pooled[1, 1] == 2).all(), "beyond the middles of the outermost cells nothing changes"


def test_proposals_are_the_best_boxes_without_repetitions():
    model = network()
    references = boxes.anchors(8, 10, 4, SMALL["scales"], SMALL["ratios"])
    random = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 320, 2, generator=random)
    shifts = 0.3 * torch.randn(2, 320, 4, generator=random)
    shifts[:, ::9, 2] = -9.0  # too narrow to hold anything
    found = model.proposer.propose(scores, shifts, references, SIZE)
    for index in range(2):
        placed = boxes.clipped(boxes.moved(references, shifts[index]), *SIZE)
        order = (scores[index, :, 1] - scores[index, :, 0]).argsort(descending=True).tolist()
        order = [each for each in order if each % 9][: SMALL["candidates"]]
        kept: list[int] = []
        for each in order:
            others = placed[kept].view(-1, 4)
            if not (boxes.overlaps(placed[each : each + 1], others) > 0.7).any():
                kept.append(each)
        used = found.boxes[index][found.are_used[index]]
        assert torch.equal(used, placed[kept[: SMALL["proposals"]]])


def test_detections_are_on_the_image_distinct_and_sorted():
    images, _ = batch()
    model = network().eval()
    seen = model(images)
    assert seen.boxes.shape == (4, 5, 4) and seen.labels.shape == seen.scores.shape == (4, 5)
    assert (seen.scores.diff(dim=1) <= 0).all() and (seen.scores > 0).any()
    assert (seen.boxes == boxes.clipped(seen.boxes, *SIZE)).all()
    for found, scores, labels in zip(seen.boxes, seen.scores, seen.labels, strict=True):
        for label in range(3):
            own = found[(labels == label) & (scores > 0)]
            assert (boxes.overlaps(own, own).fill_diagonal_(0) <= 0.3).all()
    # Nothing is seen in regions that only fill up.
    nowhere = Regions(seen.proposals.boxes, torch.zeros_like(seen.proposals.are_used))
    assert not model.detector.detect(model.features(images), nowhere, SIZE).scores.any()


def test_windows_are_all_anchors_and_need_no_proposals():
    model = network(proposed_by="windows").eval()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"features", "detector"}
    windows = model(batch()[0]).proposals
    assert windows.boxes.shape == (4, 8 * 10 * 4, 4) and windows.are_used.all()


def test_blocks_without_a_width_are_one_line():
    told = r"model.widths: \[4\] is not allowed \(allowed: 2 of them, as of model.depths\)"
    with pytest.raises(UserError, match=told):
        faster_rcnn.model(**SMALL | {"depths": (1, 1), "widths": (4,)})
