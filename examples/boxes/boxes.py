"""Find boxes: pictures with different numbers of them, and a loss that is a mean over boxes.

A picture is divided into cells. Each cell says whether the middle of a box lies in it, where that
box is, and what colour it has. The pictures are drawn here, so nothing is downloaded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from scaletrain import Data, Loss, Mean, Workload

SIZE = 32  # pixels of a picture's side
CELLS = 4  # a side
COLOURS = 3  # red, green and blue
MOST = 4  # boxes of a picture


class Pictures(Dataset):
    """Drawn pictures: each is (3, SIZE, SIZE), its boxes (n, 4) and their colours (n,).

    A box is its middle, width and height, all as parts of the picture's side. No two have their
    middle in the same cell.
    """

    def __init__(self, samples: int, seed: int):
        self._samples = samples
        self._seed = seed

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Every worker draws the same, and nothing is kept.
        random = torch.Generator().manual_seed(self._seed * self._samples + index)
        number = int(torch.randint(1, MOST + 1, (1,), generator=random))
        cells = torch.randperm(CELLS * CELLS, generator=random)[:number]
        corners = torch.stack([cells % CELLS, cells // CELLS], dim=1)
        middles = (corners + torch.rand(number, 2, generator=random)) / CELLS
        sizes = 0.2 + 0.3 * torch.rand(number, 2, generator=random)
        colours = torch.randint(COLOURS, (number,), generator=random)
        picture = 0.3 * torch.rand(3, SIZE, SIZE, generator=random)
        for middle, size, colour in zip(middles, sizes, colours.tolist(), strict=True):
            left, top = ((middle - size / 2) * SIZE).round().int().clamp(min=0).tolist()
            right, bottom = ((middle + size / 2) * SIZE).round().int().tolist()
            picture[:, top:bottom, left:right] = 0.0
            picture[colour, top:bottom, left:right] = 1.0
        return {"picture": picture, "boxes": torch.cat([middles, sizes], 1), "colours": colours}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the pictures, and put the boxes of all into one list, with their picture's place."""
    places = []
    for place, sample in enumerate(samples):
        places.append(torch.full_like(sample["colours"], place))
    return {
        "pictures": torch.stack([sample["picture"] for sample in samples]),
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
        "colours": torch.cat([sample["colours"] for sample in samples]),
        "places": torch.cat(places),
    }


class Network(nn.Module):
    """(n, 3, SIZE, SIZE) -> (n, CELLS, CELLS, 1 + 4 + COLOURS).

    A cell says whether there is a box, where it is, and its colour.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 1 + 4 + COLOURS, 1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures).permute(0, 2, 3, 1)


class Boxes(Workload):
    """A mean over boxes: pictures with many of them count for more.

    Args:
        samples: training pictures.
        width: channels of the first layer.
    """

    def __init__(self, *, samples: int = 4000, width: int = 16):
        self.model = Network(width)
        self.data = Data(Pictures(samples, seed=1), Pictures(400, seed=2), collate)

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["boxes"])

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        return self.loss_of(self.model(batch["pictures"]).float(), batch)

    def loss_of(self, said: Tensor, batch: dict[str, Tensor]) -> Loss:
        place, row, column = cells_of(batch)
        is_there = torch.zeros_like(said[..., 0])
        is_there[place, row, column] = 1.0
        at_boxes = said[place, row, column]  # (boxes, 1 + 4 + COLOURS)
        parts = {
            "there": functional.binary_cross_entropy_with_logits(
                said[..., 0], is_there, reduction="sum"
            ),
            "where": 5 * (boxes_in(at_boxes, row, column) - batch["boxes"]).abs().sum(),
            "colour": functional.cross_entropy(at_boxes[:, 5:], batch["colours"], reduction="sum"),
        }
        return Loss(torch.stack([*parts.values()]).sum(), self.count(batch), parts)

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Mean]:
        """Return the loss, and which part of the boxes is found: there, in place, of its colour."""
        said = self.model(batch["pictures"]).float()
        loss = self.loss_of(said, batch)
        place, row, column = cells_of(batch)
        at_boxes = said[place, row, column]
        is_right = (at_boxes[:, 0] > 0) & (at_boxes[:, 5:].argmax(1) == batch["colours"])
        overlaps = overlap(boxes_in(at_boxes, row, column), batch["boxes"])
        found = (is_right & (overlaps > 0.5)).sum()
        return {"loss": Mean(loss.total, loss.count), "found": Mean(found, loss.count)}


def cells_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the picture, the row and the column of each box's cell."""
    corners = (batch["boxes"][:, :2] * CELLS).long().clamp(max=CELLS - 1)
    return batch["places"], corners[:, 1], corners[:, 0]


def boxes_in(said: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return what cells say about their boxes, (n, 4), as the data set has them."""
    parts = said[:, 1:5].sigmoid()
    middles = (torch.stack([column, row], dim=1) + parts[:, :2]) / CELLS
    return torch.cat([middles, parts[:, 2:]], dim=1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over the union of boxes, (n,)."""
    begin = torch.maximum(one[:, :2] - one[:, 2:] / 2, other[:, :2] - other[:, 2:] / 2)
    end = torch.minimum(one[:, :2] + one[:, 2:] / 2, other[:, :2] + other[:, 2:] / 2)
    shared = (end - begin).clamp(min=0).prod(1)
    return shared / (one[:, 2:].prod(1) + other[:, 2:].prod(1) - shared)
