"""Average precision of a detector over the whole test set, exact for any number of workers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scaletrain.training.boxes import overlaps
from scaletrain.training.metrics import Collected


class AveragePrecision(Collected):
    """The area under the curve of precision against recall, as a mean over classes and thresholds.

    Source: M. Everingham et al. 2010, "The PASCAL Visual Object Classes Challenge", section 4.2,
    with all points of the curve as from 2010 on. A detection is right if it overlaps the object of
    its class that it overlaps most by at least the threshold, and no better one has found that
    object. Precision at a recall is the best at this recall or above.

    Args:
        thresholds: of the intersection over the union; the figure is the mean over them.
    """

    STATES = ("detections", "objects")

    def __init__(self, thresholds: Sequence[float] = (0.5,)):
        self._thresholds = torch.tensor(thresholds)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        # (n, 2 + thresholds): class, score, and at which thresholds it is right.
        self.detections = [torch.zeros(0, 2 + len(self._thresholds), dtype=torch.float64)]
        self.objects = [torch.zeros(0, dtype=torch.float64)]  # (n,): their classes

    def update(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        true_boxes: Tensor,
        true_labels: Tensor,
    ) -> None:
        """Add an image.

        Args:
            boxes: (d, 4) float32, of the detections, in any order.
            scores: (d,) float32.
            labels: (d,) int64.
            true_boxes: (k, 4) float32, of the objects.
            true_labels: (k,) int64.
        """
        order = scores.argsort(descending=True, stable=True)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        rights = self._rights(boxes, labels, true_boxes, true_labels)
        rows = torch.cat([labels.unsqueeze(1), scores.unsqueeze(1), rights], dim=1)
        self.detections.append(rows.double().cpu())
        self.objects.append(true_labels.double().cpu())

    def compute(self) -> float:
        """Return the mean over the classes that have objects; nan without any."""
        detections, objects = torch.cat(self.detections), torch.cat(self.objects)
        areas = []
        for label in objects.unique():
            of_class = detections[detections[:, 0] == label]
            order = of_class[:, 1].argsort(descending=True, stable=True)
            rights = of_class[order, 2:].cumsum(0)  # (d, thresholds)
            precision = rights / torch.arange(1, len(rights) + 1).unsqueeze(1)
            # Each detection that is right adds a step of this width to the recall.
            steps = of_class[order, 2:] / (objects == label).sum()
            best = precision.flip(0).cummax(0).values.flip(0)
            areas.append((steps * best).sum(0).mean())
        return float(torch.stack(areas).mean()) if areas else float("nan")

    def _rights(
        self, boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor
    ) -> Tensor:
        """Return at which thresholds each detection is right, (d, thresholds) bool.

        Args:
            boxes: (d, 4) of the detections, the best first.
            labels: (d,) likewise.
            true_boxes: (k, 4) of the objects.
            true_labels: (k,) likewise.
        """
        if not len(true_labels):
            return torch.zeros(len(labels), len(self._thresholds), device=labels.device)
        is_of_class = labels.unsqueeze(1) == true_labels
        overlap, match = (overlaps(boxes, true_boxes) * is_of_class).max(1)
        finds = overlap.unsqueeze(1) >= self._thresholds.to(overlap)  # (d, thresholds)
        # [i, j]: detection j is better than i, and would find the same object.
        is_rival = (match.unsqueeze(1) == match).tril(-1)
        is_found = (is_rival.unsqueeze(2) & finds.unsqueeze(0)).any(1)
        return (finds & ~is_found).to(boxes)
