"""Pictures in folders, one folder a class, with random crops and flips."""

import math
import os
import random
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from scaletrain.errors import UserError
from scaletrain.needs import IsFolder
from scaletrain.training.data import held_out

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TRIES = 10  # for a random crop that fits into the picture


def data(
    *,
    folder: Annotated[str, IsFolder()],
    test_folder: Annotated[str, IsFolder()] = "",
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.1,
    size: Annotated[int, Ge(1)] = 224,
    crop: Annotated[float, Gt(0), Le(1)] = 0.35,
    flip: bool = True,
    mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006 (never changed)
    std: list[float] = [0.229, 0.224, 0.225],  # noqa: B006 (never changed)
) -> tuple[Dataset, Dataset]:
    """Return (train, test): images (3, size, size) float32, targets int.

    A target is the number of the picture's class: of its folder, in alphabetical order.

    Args:
        folder: with a folder for each class.
        test_folder: likewise, with the same classes; empty: a share of ``folder``.
        test_share: of the pictures that are for testing, where there is no ``test_folder``.
        size: pixels of each side.
        crop: a training picture is a random part of at least this share of its area; 1: the
            middle, as for testing.
        flip: half of the training pictures are flipped, left to right.
        mean: of the red, green and blue of all pictures, 0 to 1. The default is ImageNet's.
        std: likewise, their standard deviations.

    Raises:
        UserError: a folder does not exist or has no classes, or a class has no pictures.
    """
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or (key == "std" and min(values) <= 0):
            raise UserError(f"data.{key}: {values} is not allowed (allowed: three numbers above 0)")
    pictures, classes = _pictures("data.folder", folder)
    form = Form(size, tuple(mean), tuple(std))
    shaken = ImageFolder(pictures, form, crop, flip)
    still = ImageFolder(pictures, form)
    if not test_folder:
        train, _ = held_out(shaken, len(pictures), test_share)
        _, test = held_out(still, len(pictures), test_share)
        return train, test
    test_pictures, test_classes = _pictures("data.test_folder", test_folder)
    differing = sorted(set(classes).symmetric_difference(test_classes))
    if differing:
        raise UserError(
            f"data.test_folder: {test_folder!r} is not allowed: a class is in one of the folders"
            f" alone: {', '.join(differing[:5])} (allowed: the classes of {folder})"
        )
    return shaken, ImageFolder(test_pictures, form)


class Form(NamedTuple):
    """The form that pictures are brought into."""

    size: int  # pixels of each side
    mean: tuple[float, ...]  # of red, green and blue, 0 to 1
    std: tuple[float, ...]


class ImageFolder(Dataset):
    """Pictures with their classes, read when they are asked for.

    Random crops and flips draw from the generator of ``random``, which is seeded for each sample.

    Args:
        pictures: path and class of each.
        form: that they are brought into.
        crop: the least share of the area that a random crop keeps; 1: the middle.
        flip: flip half of them, left to right.
    """

    def __init__(
        self, pictures: list[tuple[str, int]], form: Form, crop: float = 1.0, flip: bool = False
    ):
        self._pictures = pictures
        self._form = form
        self._crop = crop
        self._flip = flip
        self._mean = torch.tensor(form.mean).view(3, 1, 1)
        self._std = torch.tensor(form.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self._pictures[index]
        size = (self._form.size, self._form.size)
        try:
            with Image.open(path) as file:
                # Cameras write how they were held instead of turning the picture.
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{path}: {error}") from error  # Pillow does not always name it
        if self._crop < 1:
            box = _random_box(picture.width, picture.height, self._crop)
            picture = picture.resize(size, Image.Resampling.BILINEAR, box=box)
        else:
            picture = ImageOps.fit(picture, size, Image.Resampling.BILINEAR)
        if self._flip and random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, size, size) uint8
        return (pixels.float() / 255 - self._mean) / self._std, target


def _random_box(width: int, height: int, least: float) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a random part of a picture.

    Its share of the area is drawn evenly, its ratio of sides between 3/4 and 4/3, as by Szegedy et
    al. 2015 (arXiv 1409.4842), section 6.

    Args:
        width: of the picture.
        height: of the picture.
        least: share of the area.
    """
    for _ in range(_TRIES):
        area = width * height * random.uniform(least, 1)
        ratio = math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = random.uniform(0, width - across), random.uniform(0, height - down)
            return left, top, left + across, top + down
    side = min(width, height)  # a long picture: its middle
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _pictures(key: str, folder: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return path and class of each picture, and the names of the classes, all in order.

    Raises:
        UserError: there is no such folder, or no class, or a class without pictures.
    """
    root = IsFolder().check(key, folder)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise UserError(f"{key}: {folder!r} has no classes (allowed: a folder for each, in it)")
    pictures = []
    for target, name in enumerate(classes):
        names = sorted(os.listdir(root / name))
        paths = [str(root / name / each) for each in names if each.lower().endswith(_ENDINGS)]
        if not paths:
            raise UserError(
                f"{key}: the class {name!r} of {folder!r} has no pictures"
                f" (allowed: files that end in {' '.join(_ENDINGS)})"
            )
        pictures += [(path, target) for path in paths]
    return pictures, classes
