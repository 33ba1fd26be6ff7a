"""Find objects on images and say what they are: proposals and detector in one training."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from scaletrain import plugins
from scaletrain.training.average_precision import AveragePrecision
from scaletrain.training.boxes import overlaps
from scaletrain.training.data.canvases import Scene
from scaletrain.training.models.faster_rcnn import Truth, model
from scaletrain.training.workload import Data, Loss, Mean, Workload

_COCO = tuple(0.5 + 0.05 * step for step in range(10))
_SEEDS = 2**60  # and twice as much still fits into 64 bits


class Sample(NamedTuple):
    """A scene, and the seed of what is drawn for it in this epoch."""

    scene: Scene
    seed: Tensor  # () int64


class Seeded(Dataset):
    """Scenes with a seed each. It comes from the generator that the sample's place has seeded."""

    def __init__(self, scenes: Any):
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._scenes[index], torch.randint(_SEEDS, ()))


def collate(samples: list[Sample]) -> tuple[Tensor, Truth]:
    """Return a batch: images, and what is on them. Images without an object are welcome."""
    scenes = [sample.scene for sample in samples]
    images = torch.stack([scene.image for scene in scenes])
    boxes = pad_sequence([scene.boxes for scene in scenes], batch_first=True)
    labels = pad_sequence([scene.labels for scene in scenes], batch_first=True, padding_value=-1)
    if not boxes.shape[1]:  # no image has an object: a place that nothing fills
        boxes, labels = boxes.new_zeros(len(scenes), 1, 4), labels.new_full((len(scenes), 1), -1)
    return images, Truth(boxes, labels, torch.stack([sample.seed for sample in samples]))


class Detection(Workload):
    """Faster R-CNN on scenes with boxes.

    The loss is the sum of four, each of them a mean over images, whatever number of objects they
    have: N workers train as one does. What is sampled for an image depends on the image and the
    epoch, not on the others of its batch.

    Its figures are ``ap50``, the average precision at an overlap of 0.5, ``ap``, the mean of those
    at 0.5, 0.55, ..., 0.95, and ``recall50`` and ``recall70``: the part of the objects that a
    region of the detector overlaps by so much.

    Args:
        network: options of ``faster_rcnn``.
        dataset: a data set's name and options, of ``canvases.Scene``.
    """

    def __init__(self, *, network: dict, dataset: dict):
        self.model = model(**network)
        options = dict(dataset)
        train, test = plugins.load("data", options.pop("name"))(**options)[:2]
        self.data = Data(Seeded(train), Seeded(test), collate)
        self.metrics = {"ap50": AveragePrecision(), "ap": AveragePrecision(_COCO)}

    def forward(self, batch: Any) -> Loss:
        """Return the sum of the four losses over images."""
        images, truth = batch
        parts = self.model(images, truth)
        return Loss(torch.stack([*parts.values()]).sum(), len(images), parts)

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return ``recall50`` and ``recall70``; show the metrics what is seen on the images."""
        images, truth = batch
        seen = self.model(images)
        for index, labels in enumerate(truth.labels):
            is_seen = seen.scores[index] > 0
            for metric in self.metrics.values():
                metric.update(
                    seen.boxes[index][is_seen],
                    seen.scores[index][is_seen],
                    seen.labels[index][is_seen],
                    truth.boxes[index][labels >= 0],
                    labels[labels >= 0],
                )
        overlap = overlaps(truth.boxes, seen.proposals.boxes)
        overlap = overlap.masked_fill(~seen.proposals.are_used.unsqueeze(1), 0.0).amax(2)
        objects = (truth.labels >= 0).sum()
        return {
            "recall50": Mean((overlap >= 0.5).sum(), objects),
            "recall70": Mean((overlap >= 0.7).sum(), objects),
        }
