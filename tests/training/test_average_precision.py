"""Tests of training/average_precision.py: cases with known answers, loops, and several ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scaletrain.training import metrics
from scaletrain.training.average_precision import AveragePrecision
from scaletrain.training.boxes import overlaps
from tests.training.jobs import Threads

# Objects far apart, and boxes that overlap the first of them by 0.62 and not at all.
OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
NEAR = [0.0, 0.0, 10.0, 6.2]
NOWHERE = [70.0, 70.0, 80.0, 80.0]


def of_image(
    found: list[tuple[list[float], float, int]], labels: list[int], **options: Any
) -> float:
    """Return the figure of one image, whose objects are the first of ``OBJECTS``."""
    metric = AveragePrecision(**options)
    metric.update(*seen(found), OBJECTS[: len(labels)], torch.tensor(labels, dtype=torch.int64))
    return metric.compute()


def seen(found: list[tuple[list[float], float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor([box for box, _, _ in found]).view(-1, 4),
        torch.tensor([score for _, score, _ in found]),
        torch.tensor([label for _, _, label in found], dtype=torch.int64),
    )


def box(index: int) -> list[float]:
    return OBJECTS[index].tolist()


@pytest.mark.parametrize(
    ("found", "labels", "expected"),
    [
        # all, in any order, with a wrong one behind them
        ([(NOWHERE, 0.1, 0), (box(1), 0.5, 0), (box(0), 0.9, 0)], [0, 0], 1.0),
        # precision is 1 up to a recall of 1/2, and 2/3 up to 1
        ([(box(0), 0.9, 0), (NOWHERE, 0.8, 0), (box(1), 0.7, 0)], [0, 0], 1 / 2 + 1 / 2 * 2 / 3),
        # the same, since an object is found once
        ([(box(0), 0.9, 0), (NEAR, 0.8, 0), (box(1), 0.7, 0)], [0, 0], 1 / 2 + 1 / 2 * 2 / 3),
        # precision rises to 2/3, which counts for the smaller recall, too
        ([(NOWHERE, 0.9, 0), (box(0), 0.8, 0), (box(1), 0.7, 0)], [0, 0], 2 / 3),
        # one of three
        ([(box(2), 0.9, 0)], [0, 0, 0], 1 / 3),
        # the right place and the wrong class; a class without objects does not count
        ([(box(0), 0.9, 1), (box(1), 0.9, 1)], [0, 1], 1 / 2 * 1 / 2),
        ([(box(0), 0.9, 0), (box(1), 0.9, 5)], [0], 1.0),
        ([], [0], 0.0),
    ],
)
def test_cases_with_a_known_answer(
    found: list[tuple[list[float], float, int]], labels: list[int], expected: float
):
    assert of_image(found, labels) == pytest.approx(expected)


def test_a_detection_belongs_to_the_object_that_it_overlaps_most():
    """Even if that is found already, and it would do for another one."""
    metric = AveragePrecision(thresholds=(0.1,))
    true_boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
    between = [4.0, 0.0, 14.0, 10.0]  # 0.43 of the first, 0.25 of the second
    metric.update(*seen([(box(0), 0.9, 0), (between, 0.8, 0)]), true_boxes, torch.tensor([0, 0]))
    assert metric.compute() == pytest.approx(1 / 2)


def test_the_figure_is_the_mean_over_thresholds():
    found = [(NEAR, 0.9, 0)]
    assert of_image(found, [0], thresholds=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75)) == pytest.approx(0.5)
    assert of_image(found, [0], thresholds=(0.7,)) == 0


def images(number: int) -> list[tuple[Tensor, ...]]:
    """Return images with 0 to 4 objects of 3 classes, and 0 to 8 detections, many of them right."""
    random = torch.Generator().manual_seed(number)
    drawn = []
    for _ in range(number):
        count = int(torch.randint(5, (1,), generator=random))
        corners = 20 * torch.rand(count, 2, generator=random)
        true_boxes = torch.cat([corners, corners + 10], dim=1)
        true_labels = torch.randint(3, (count,), generator=random)
        near = true_boxes.repeat(2, 1) + 2 * torch.randn(2 * count, 4, generator=random)
        scores = torch.rand(2 * count, generator=random)
        labels = torch.where(scores > 0.3, true_labels.repeat(2), 0)
        drawn.append((near, scores, labels, true_boxes, true_labels))
    return drawn


def by_loops(shown: list[tuple[Tensor, ...]], threshold: float) -> float:
    """Count true and false detections one by one, as the PASCAL VOC's description says."""
    areas = []
    for label in range(3):
        detections = []
        total = 0
        for number, (boxes, scores, labels, _, true_labels) in enumerate(shown):
            total += int((true_labels == label).sum())
            for box, score in zip(boxes[labels == label], scores[labels == label], strict=True):
                detections.append((score.item(), number, box))
        found: set[tuple[int, int]] = set()
        curve = [(0.0, 1.0)]
        for rank, (_, number, box) in enumerate(sorted(detections, key=lambda each: -each[0])):
            *_, true_boxes, true_labels = shown[number]
            of_class = true_boxes[true_labels == label]
            overlap = overlaps(box.unsqueeze(0), of_class)[0].tolist()
            best = max(range(len(of_class)), key=lambda index: overlap[index], default=-1)
            if best >= 0 and overlap[best] >= threshold:
                found.add((number, best))
            curve.append((len(found) / total, len(found) / (rank + 1)))
        area = 0.0
        for index in range(1, len(curve)):
            width = curve[index][0] - curve[index - 1][0]
            area += width * max(precision for _, precision in curve[index:])
        areas.append(area)
    return sum(areas) / len(areas)


@pytest.mark.parametrize("size", [1, 2, 3, 60])
def test_ranks_have_the_figure_of_loops_over_all_images(size: int):
    """Some ranks have images without an object or a detection, and one of 60 has none at all."""
    shown = images(57)

    def judge(rank: int, exchange: Any) -> dict[str, float]:
        metric = AveragePrecision((0.5, 0.7))
        figures = []
        metrics.prepare({"ap": metric}, torch.device("cpu"))
        for _ in range(2):  # nothing of the first time is left
            metrics.reset({"ap": metric})
            for image in shown[rank::size] or shown[:1]:
                metric.update(*image)
            figures.append(metrics.joined({"ap": metric}, exchange, rank < len(shown)))
        assert figures[0] == figures[1]
        return figures[0]

    expected = (by_loops(shown, 0.5) + by_loops(shown, 0.7)) / 2
    assert 0.2 < expected < 0.9
    for figures in Threads(size).run(judge):
        assert figures == {"ap": pytest.approx(expected)}
