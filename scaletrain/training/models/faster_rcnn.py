"""Faster R-CNN, for the workload detection: proposes boxes, and classifies what is in them."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt, MinLen
from torch import Tensor, nn
from torch.nn import functional

from scaletrain.errors import UserError
from scaletrain.training.boxes import anchors, clipped, distinct, moved, offsets, overlaps
from scaletrain.training.models import initialise

_OBJECT, _BACKGROUND = 0.7, 0.3  # overlaps from which on, and below which, anchors are these
_REGION_IS_OBJECT = 0.5  # likewise for regions
_OBJECTS_A_REGION = 1 / 4  # the most of a detector's regions that are objects
_SAME_PROPOSAL, _SAME_OBJECT = 0.7, 0.3  # overlaps from which on one of two boxes is left out
_LEAST_SIDE = 1.0  # pixels of a proposal's side
_LEAST_SCORE = 0.05  # of a detection
# The detector's offsets are divided by what they vary by, so that all count alike.
_SPREAD = (0.1, 0.1, 0.2, 0.2)
_BALANCE = 10.0  # lambda of equation 1
_IGNORED = -100  # a class that counts for nothing


@dataclasses.dataclass(frozen=True)
class FasterRCNNOptions:
    """The options of a Faster R-CNN; the defaults are the paper's with VGG-16.

    Attributes:
        classes: of objects.
        channels: of an image.
        depths: convolutions of each block of the features; a pooling lies between blocks.
        widths: channels of each block.
        scales: square roots of the anchors' areas, in pixels.
        ratios: of the anchors' height to their width.
        hidden: units of the detector's two full layers.
        pooled: cells that a region's side is divided into.
        dropout: the part of the full layers' outputs that is left out in training.
        shared: the detector sees the features that the proposals come from; else it has its own.
        proposed_by: network, or windows: then all anchors are the detector's regions.
        candidates: best boxes among which repetitions are looked for.
        proposals: boxes of an image that go to the detector.
        sampled_anchors: of an image in a training step.
        sampled_regions: likewise.
        detections: best ones of an image.
    """

    classes: Annotated[int, Ge(1)] = 20
    channels: Annotated[int, Ge(1)] = 3
    depths: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (2, 2, 3, 3, 3)
    widths: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (64, 128, 256, 512, 512)
    scales: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = (128.0, 256.0, 512.0)
    ratios: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = (0.5, 1.0, 2.0)
    hidden: Annotated[int, Ge(1)] = 4096
    pooled: Annotated[int, Ge(1)] = 7
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    shared: bool = True
    proposed_by: Literal["network", "windows"] = "network"
    candidates: Annotated[int, Ge(1)] = 2000
    proposals: Annotated[int, Ge(1)] = 300
    sampled_anchors: Annotated[int, Ge(2)] = 256
    sampled_regions: Annotated[int, Ge(4)] = 128
    detections: Annotated[int, Ge(1)] = 100

    @property
    def stride(self) -> int:
        """Pixels between features: each pooling halves the resolution."""
        return 2 ** (len(self.depths) - 1)


OPTIONS = FasterRCNNOptions  # ``plugins.options`` reads the options from this line


class Truth(NamedTuple):
    """The objects of a batch's images, filled up to the most that one of them has."""

    boxes: Tensor  # (n, most, 4) float32; boxes without a size fill up
    labels: Tensor  # (n, most) int64, from 0; -1 fills up
    # (n,) int64: all that is drawn for an image depends on its seed alone, on no neighbour.
    seeds: Tensor


class Size(NamedTuple):
    """Of images, in pixels."""

    height: int
    width: int


class Regions(NamedTuple):
    """Boxes that may hold an object, the same number for each image."""

    boxes: Tensor  # (n, r, 4) float32
    are_used: Tensor  # (n, r) bool: the others fill up


class Detections(NamedTuple):
    """What is seen on a batch of images, and where the detector looked."""

    boxes: Tensor  # (n, d, 4) float32
    scores: Tensor  # (n, d) float32, falling; 0 fills up
    labels: Tensor  # (n, d) int64
    proposals: Regions


class ProposalNetwork(nn.Module):
    """Two scores and four offsets for each anchor, by a small network that slides over features."""

    def __init__(self, inputs: int, options: FasterRCNNOptions):
        super().__init__()
        self._options = options
        self._shapes = len(options.scales) * len(options.ratios)
        self.slide = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.scores = nn.Conv2d(inputs, 2 * self._shapes, 1)
        self.offsets = nn.Conv2d(inputs, 4 * self._shapes, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, inputs, rows, columns) -> (n, anchors, 2) and (n, anchors, 4) float32.

        Anchors are in the order of ``boxes.anchors``. The first score is that of background.
        """
        hidden = self.slide(features).relu()
        scores = self.scores(hidden).permute(0, 2, 3, 1).float()
        shifts = self.offsets(hidden).permute(0, 2, 3, 1).float()
        return scores.reshape(len(scores), -1, 2), shifts.reshape(len(shifts), -1, 4)

    @torch.no_grad()
    def propose(self, scores: Tensor, shifts: Tensor, references: Tensor, size: Size) -> Regions:
        """Return the boxes that look most like an object, none of them twice.

        Args:
            scores: (n, anchors, 2), as ``forward`` returns them.
            shifts: (n, anchors, 4), likewise.
            references: (anchors, 4), the anchors.
            size: of the images.
        """
        boxes = clipped(moved(references, shifts), size.height, size.width)
        sides = boxes[..., 2:] - boxes[..., :2]
        are_large = (sides >= _LEAST_SIDE).all(-1)
        objectness = scores[..., 1] - scores[..., 0]
        objectness = objectness.masked_fill(~are_large, -torch.inf)
        most = min(self._options.candidates, len(references))
        best = objectness.topk(most, dim=1).indices
        boxes = _rows(boxes, best)
        are_used = distinct(boxes, _SAME_PROPOSAL) & are_large.gather(1, best)
        first = _first(are_used, self._options.proposals)
        return Regions(_rows(boxes, first), are_used.gather(1, first))

    def losses(
        self, scores: Tensor, shifts: Tensor, references: Tensor, size: Size, truth: Truth
    ) -> dict[str, Tensor]:
        """Return equation 1's two terms, summed over images. Arguments are those of ``propose``."""
        sampled = self._options.sampled_anchors
        with torch.no_grad():
            are_inside = (references == clipped(references, size.height, size.width)).all(-1)
            are_objects, are_background, match = assigned(references, are_inside, truth.boxes)
            chances = _drawn(truth.seeds, 0, len(references))
            are_objects = _picked(are_objects, chances, sampled // 2)
            rest = sampled - are_objects.sum(1, keepdim=True)
            are_background = _picked(are_background, chances, rest)
            classes = are_objects.long().masked_fill(~(are_objects | are_background), _IGNORED)
            objects = _rows(truth.boxes, match)[are_objects]
            targets = offsets(objects, references.expand(len(match), -1, -1)[are_objects])
        objectness = functional.cross_entropy(
            scores.flatten(0, 1), classes.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        shift = functional.smooth_l1_loss(shifts[are_objects], targets, reduction="sum")
        locations = len(references) // self._shapes
        return {"objectness": objectness / sampled, "proposals": _BALANCE * shift / locations}


class Detector(nn.Module):
    """The class of each region, and for each class where its box lies (Fast R-CNN)."""

    def __init__(self, inputs: int, options: FasterRCNNOptions):
        super().__init__()
        self._options = options
        hidden = options.hidden
        self.layers = nn.Sequential(
            nn.Linear(inputs * options.pooled**2, hidden), nn.ReLU(), nn.Dropout(options.dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(options.dropout),
        )  # fmt: skip
        self.scores = nn.Linear(hidden, 1 + options.classes)
        self.offsets = nn.Linear(hidden, 4 * options.classes)

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (n, r, 1 + classes), background first, and offsets (n, r, classes, 4).

        Args:
            features: (n, inputs, rows, columns).
            boxes: (n, r, 4), in pixels of the image.
        """
        options = self._options
        pooled = pooled_regions(features, boxes, options.stride, options.pooled)
        hidden = self.layers(pooled.flatten(2))
        shifts = self.offsets(hidden).float()
        return self.scores(hidden).float(), shifts.view(*shifts.shape[:2], -1, 4)

    def losses(self, features: Tensor, regions: Regions, truth: Truth) -> dict[str, Tensor]:
        """Return the losses of sampled regions, summed over images."""
        sampled = self._options.sampled_regions
        with torch.no_grad():
            # True boxes are regions, too, as in the authors' code: early proposals hit none.
            boxes = torch.cat([regions.boxes, truth.boxes], dim=1)
            are_used = torch.cat([regions.are_used, truth.labels >= 0], dim=1)
            overlap, match = overlaps(boxes, truth.boxes).max(2)
            chances = _drawn(truth.seeds, 1, boxes.shape[1])
            are_objects = are_used & (overlap >= _REGION_IS_OBJECT)
            are_background = are_used & ~are_objects
            are_objects = _picked(are_objects, chances, int(_OBJECTS_A_REGION * sampled))
            rest = sampled - are_objects.sum(1, keepdim=True)
            are_background = _picked(are_background, chances, rest)
            classes = (1 + truth.labels.gather(1, match)).masked_fill(~are_objects, 0)
            classes = classes.masked_fill(~(are_objects | are_background), _IGNORED)
            # Only those that are sampled go through the network.
            first = _first(classes != _IGNORED, sampled)
            boxes, classes = _rows(boxes, first), classes.gather(1, first)
            are_objects = classes > 0
            objects = _rows(truth.boxes, match.gather(1, first))[are_objects]
            targets = offsets(objects, boxes[are_objects]) / objects.new_tensor(_SPREAD)
        scores, shifts = self(features, boxes)
        class_loss = functional.cross_entropy(
            scores.flatten(0, 1), classes.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        of_classes = shifts[are_objects]  # (objects, classes, 4)
        own = of_classes[torch.arange(len(of_classes)), classes[are_objects] - 1]
        box_loss = functional.smooth_l1_loss(own, targets, reduction="sum")
        return {"classes": class_loss / sampled, "boxes": box_loss / sampled}

    def detect(self, features: Tensor, regions: Regions, size: Size) -> Detections:
        """Return the best boxes of all classes, none of a class twice."""
        scores, shifts = self(features, regions.boxes)
        chances = scores.softmax(2)[..., 1:] * regions.are_used.unsqueeze(2)
        boxes = moved(regions.boxes.unsqueeze(2), shifts * shifts.new_tensor(_SPREAD))
        # Each class for itself: (n, classes, regions).
        chances = chances.transpose(1, 2)
        boxes = clipped(boxes, size.height, size.width).transpose(1, 2)
        most = min(self._options.detections, chances.shape[2])
        chances, best = chances.topk(most, dim=2)
        boxes = boxes.gather(2, best.unsqueeze(3).expand(-1, -1, -1, 4))
        chances = chances * (distinct(boxes, _SAME_OBJECT) & (chances >= _LEAST_SCORE))
        labels = torch.arange(chances.shape[1], device=chances.device)
        labels = labels.view(1, -1, 1).expand_as(chances).flatten(1)
        # All classes together.
        chances, best = chances.flatten(1).topk(most, dim=1)
        return Detections(
            _rows(boxes.flatten(1, 2), best), chances, labels.gather(1, best), regions
        )


def pooled_regions(features: Tensor, boxes: Tensor, stride: int, side: int) -> Tensor:
    """Return the features in the middle of each cell of regions, (n, r, inputs, side, side).

    Between features they are interpolated, as by RoIAlign (He et al. 2017, arXiv 1703.06870). The
    paper takes the largest feature in a cell, but small regions have fewer features than cells.

    Args:
        features: (n, inputs, rows, columns).
        boxes: (n, r, 4), in pixels of the image.
        stride: pixels between features.
        side: cells of each side.
    """
    n, inputs, rows, columns = features.shape
    parts = (torch.arange(side, device=boxes.device) + 0.5) / side
    sides = boxes[..., 2:] - boxes[..., :2]
    # (n, r, side), from -1 at the map's left or upper border to 1 at the other
    x = (boxes[..., :1] + sides[..., :1] * parts) * 2 / (columns * stride) - 1
    y = (boxes[..., 1:2] + sides[..., 1:] * parts) * 2 / (rows * stride) - 1
    x, y = torch.broadcast_tensors(x.unsqueeze(2), y.unsqueeze(3))
    grid = torch.stack([x, y], dim=-1).view(n, -1, side, 2).to(features.dtype)
    pooled = functional.grid_sample(features, grid, padding_mode="border", align_corners=False)
    return pooled.view(n, inputs, -1, side, side).transpose(1, 2)


class FasterRCNN(nn.Module):
    """A detector that proposes its regions itself.

    Source: S. Ren, K. He, R. Girshick, J. Sun 2015, "Faster R-CNN: Towards Real-Time Object
    Detection with Region Proposal Networks" (arXiv 1506.01497), with approximate joint training:
    proposals are constants to the detector, and both losses reach the features that they share.
    """

    def __init__(self, options: FasterRCNNOptions):
        super().__init__()
        self.options = options
        inputs = options.widths[-1]
        self.features = _features(options)
        self.detector = Detector(inputs, options)
        if options.proposed_by == "network":
            self.proposer = ProposalNetwork(inputs, options)
            if not options.shared:
                self.proposer_features = _features(options)
        initialise(self)
        for name, module in self.named_modules():
            # What no pretrained network has begins small, as in the paper.
            if name.startswith(("proposer.", "detector.scores", "detector.offsets")):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, images: Tensor, truth: Truth | None = None) -> Detections | dict[str, Tensor]:
        """Return what is seen on images, or with the truth about them the four losses.

        Args:
            images: (n, channels, height, width).
            truth: about each image.

        Returns:
            The losses are sums over images, scalars: of an image's ``objectness`` and ``proposals``
            (equation 1), and of its regions' ``classes`` and ``boxes`` (Girshick 2015, arXiv
            1504.08083, equation 1). One that no box takes part in is 0 and has the gradient 0, so
            all parameters have a gradient in every step.
        """
        options = self.options
        size = Size(*images.shape[2:])
        features = self.features(images)
        rows, columns = features.shape[2:]
        references = anchors(rows, columns, options.stride, options.scales, options.ratios)
        references = references.to(images.device)
        losses: dict[str, Tensor] = {}
        if options.proposed_by == "windows":
            regions = _windows(references, size, len(images))
        else:
            seen = features if options.shared else self.proposer_features(images)
            scores, shifts = self.proposer(seen)
            regions = self.proposer.propose(scores, shifts, references, size)
            if truth is not None:
                losses = self.proposer.losses(scores, shifts, references, size, truth)
        if truth is not None:
            return losses | self.detector.losses(features, regions, truth)
        return self.detector.detect(features, regions, size)


def _windows(references: Tensor, size: Size, images: int) -> Regions:
    """Return the parts of all anchors that lie on the image."""
    boxes = clipped(references, size.height, size.width).expand(images, -1, -1)
    return Regions(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device))


def assigned(
    references: Tensor, are_inside: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which anchors are objects, which are background, and the object of each.

    An anchor is an object if it overlaps one enough, or if none overlaps that object more. It is
    background if it overlaps none much, and otherwise neither (section 3.1.2).

    Args:
        references: (a, 4), the anchors.
        are_inside: (a,) bool: the others, which cross the border, are neither.
        boxes: (n, k, 4), the objects.

    Returns:
        (n, a) bool twice, and (n, a) int64, from 0 to k - 1.
    """
    overlap = overlaps(references, boxes).masked_fill(~are_inside.unsqueeze(1), 0.0)
    of_anchor, match = overlap.max(2)
    of_object = overlap.amax(1, keepdim=True)
    are_best = ((overlap == of_object) & (overlap > 0)).any(2)
    are_objects = (of_anchor >= _OBJECT) | are_best
    are_background = are_inside & (of_anchor < _BACKGROUND) & ~are_objects
    return are_objects, are_background, match


def _features(options: FasterRCNNOptions) -> nn.Sequential:
    """Return VGG's convolutions: (n, channels, h, w) -> (n, widths[-1], h / stride, w / stride)."""
    layers: list[nn.Module] = []
    inputs = options.channels
    for block, (depth, width) in enumerate(zip(options.depths, options.widths, strict=True)):
        if block:
            layers.append(nn.MaxPool2d(2))
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers)


def _drawn(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """Return uniform numbers, (n, count): each row by its seed, and the beginnings of longer rows.

    Args:
        seeds: (n,) int64.
        purpose: draws for different purposes are independent.
        count: numbers of each row.
    """
    rows = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(2 * seed + purpose)
        rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows).to(seeds.device)


def _picked(candidates: Tensor, chance: Tensor, most: Tensor | int) -> Tensor:
    """Return the candidates with the greatest chance, at most so many in a row: (n, a) bool."""
    order = chance.masked_fill(~candidates, -1).argsort(dim=1, descending=True)
    return candidates & (order.argsort(dim=1) < most)


def _first(are_wanted: Tensor, most: int) -> Tensor:
    """Return the places of wanted columns in their order, then those of others: (n, most) int64."""
    return (~are_wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def _rows(boxes: Tensor, places: Tensor) -> Tensor:
    """(n, k, 4), (n, r) int64 -> (n, r, 4)."""
    return boxes.gather(1, places.unsqueeze(2).expand(-1, -1, 4))


def model(**options: object) -> nn.Module:
    """Return the network.

    Args:
        options: the fields of ``OPTIONS``.

    Raises:
        UserError: depths and widths are not of the same blocks.
    """
    chosen = FasterRCNNOptions(**options)  # type: ignore[arg-type]
    if len(chosen.widths) != len(chosen.depths):
        raise UserError(
            f"model.widths: {[*chosen.widths]} is not allowed"
            f" (allowed: {len(chosen.depths)} of them, as of model.depths)"
        )
    return FasterRCNN(chosen)
