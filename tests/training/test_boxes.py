"""Tests of training/boxes.py against loops over pixels and boxes, and the paper's formulas."""

import math

import pytest
import torch
from torch import Tensor

from scaletrain.training import boxes


def whole_boxes(number: int, seed: int, side: int = 12) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corners = torch.randint(side, (2, number, 2), generator=random)
    begin, end = corners.min(0).values, corners.max(0).values + 1
    return torch.cat([begin, end], dim=1).float()


def pixels(box: Tensor) -> set[tuple[int, int]]:
    left, top, right, bottom = box.int().tolist()
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_overlaps_are_those_of_counted_pixels():
    ours, theirs = whole_boxes(20, 0), whole_boxes(30, 1)
    found = boxes.overlaps(ours, theirs)
    for row, box in zip(found, ours, strict=True):
        for overlap, other in zip(row, theirs, strict=True):
            shared, union = pixels(box) & pixels(other), pixels(box) | pixels(other)
            assert overlap.item() == pytest.approx(len(shared) / len(union))
    both = torch.stack([theirs[:20], ours])
    assert torch.equal(boxes.overlaps(both, both)[1], boxes.overlaps(ours, ours))


def test_boxes_that_fill_up_overlap_nothing():
    nothing = torch.zeros(2, 4)
    assert not boxes.overlaps(nothing, torch.cat([nothing, whole_boxes(9, 0)])).any()


def test_offsets_are_those_of_equation_2():
    references, wanted = whole_boxes(20, 2), whole_boxes(20, 3)
    found = boxes.offsets(wanted, references)
    for offset, box, reference in zip(
        found.tolist(), wanted.tolist(), references.tolist(), strict=True
    ):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        w, h = box[2] - box[0], box[3] - box[1]
        x_a, y_a = (reference[0] + reference[2]) / 2, (reference[1] + reference[3]) / 2
        w_a, h_a = reference[2] - reference[0], reference[3] - reference[1]
        assert offset == pytest.approx(
            [(x - x_a) / w_a, (y - y_a) / h_a, math.log(w / w_a), math.log(h / h_a)], abs=1e-6
        )
    torch.testing.assert_close(boxes.moved(references, found), wanted, rtol=1e-5, atol=1e-5)
    assert boxes.moved(references, torch.full((20, 4), 1e4)).isfinite().all()


def test_anchors_lie_about_each_cell_in_the_order_of_a_feature_map():
    found = boxes.anchors(2, 3, 8, scales=(4.0, 10.0), ratios=(0.5, 1.0, 2.0))
    expected = []
    for row in range(2):
        for column in range(3):
            for scale in (4.0, 10.0):
                for ratio in (0.5, 1.0, 2.0):
                    expected.append([8 * column + 4, 8 * row + 4, scale**2, ratio])
    sides = found[:, 2:] - found[:, :2]
    described = torch.cat(
        [
            (found[:, :2] + found[:, 2:]) / 2,
            sides.prod(1, keepdim=True),
            sides[:, 1:] / sides[:, :1],
        ],
        dim=1,
    )
    torch.testing.assert_close(described, torch.tensor(expected))


def test_clipped_boxes_lie_on_the_image():
    box = torch.tensor([[-3.0, -2, 30, 4], [5, 6, 7, 8]])
    assert boxes.clipped(box, height=10, width=20).tolist() == [[0, 0, 20, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7])
def test_boxes_are_suppressed_as_in_a_loop(limit: float):
    batch = torch.stack([whole_boxes(60, seed, side=6) for seed in range(5)])
    for ranked, found in zip(batch, boxes.distinct(batch, limit), strict=True):
        kept: list[int] = []
        for index, box in enumerate(ranked):
            others = ranked[kept].view(-1, 4)
            if not (boxes.overlaps(box.unsqueeze(0), others) > limit).any():
                kept.append(index)
        assert found.nonzero().flatten().tolist() == kept
        assert 1 < len(kept) < 60
