"""Tests of training/data/image_folder.py.

Bugs it catches: a crop that leaves the picture, a target that depends on the order of the file
system, augmentation of test pictures, a broken file that is not named.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaletrain.errors import UserError
from scaletrain.training.batches import Share, UnreadableSample, load
from scaletrain.training.data import image_folder
from scaletrain.training.data.image_folder import data

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def ramp(width: int, height: int) -> Image.Image:
    """A picture whose red rises from left to right and whose green rises from top to bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=2).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, ending in (("zebra", "png"), ("ant", "PNG"), ("bee", "jpg")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(8):
            ramp(60, 40).save(tmp_path / "in" / name / f"{number}.{ending}")
    (tmp_path / "in" / "ant" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def test_classes_are_numbered_in_alphabetical_order_and_split_in_a_fixed_way(folder: Path):
    train, test = data(folder=str(folder), size=16, test_share=0.25)
    assert (len(train), len(test)) == (18, 6)
    targets = [target for _, target in (*train, *test)]
    assert sorted(targets) == [0] * 8 + [1] * 8 + [2] * 8
    again, _ = data(folder=str(folder), size=16, test_share=0.25)
    assert train.indices == again.indices
    assert set(train.indices).isdisjoint(test.indices)
    _, other = data(folder=str(folder), test_folder=str(folder), size=16)
    assert [target for _, target in other] == [0] * 8 + [1] * 8 + [2] * 8


def test_a_test_picture_is_the_middle_and_a_training_picture_a_random_part(folder: Path):
    train, test = data(folder=str(folder), size=20, **PLAIN)
    image, _ = test[0]
    assert image.shape == (3, 20, 20) and image.dtype == torch.float32
    assert torch.equal(image, test[0][0])
    # The middle 40 of 60 columns, all 40 rows.
    assert image[0].min() == pytest.approx(10 / 60, abs=0.03)
    assert image[0].max() == pytest.approx(50 / 60, abs=0.03)
    assert image[1].max() - image[1].min() > 0.93
    seen = []
    for seed in range(40):
        random.seed(seed)
        seen.append(train[0][0])
    is_flipped = torch.tensor([bool(each[0, 10, 0] > each[0, 10, -1]) for each in seen])
    assert 8 < is_flipped.sum() < 32
    spread = torch.stack([each[0].max() - each[0].min() for each in seen])
    assert spread.min() > 0.3 and spread.max() - spread.min() > 0.2, "parts of different widths"
    assert all(each.min() >= 0 and each.max() <= 1 for each in seen)
    random.seed(3)
    assert torch.equal(train[0][0], seen[3]), "drawn from the generator of random alone"


@pytest.mark.parametrize(("width", "height"), [(60, 40), (500, 10), (1, 1)])
def test_a_random_part_lies_in_the_picture(width: int, height: int):
    for _ in range(200):
        left, top, right, bottom = image_folder._random_box(width, height, 0.35)
        assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9


def test_pictures_are_normalised(folder: Path):
    grey = Image.new("L", (9, 9), 51)  # 0.2; of one channel
    grey.save(folder / "ant" / "0.PNG")
    options = {"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.5]}
    _, test = data(folder=str(folder), test_folder=str(folder), size=4, **options)
    image, _ = test[0]
    for channel, value in zip(image, (1.0, 0.0, -0.2), strict=True):
        torch.testing.assert_close(channel, torch.full((4, 4), value), rtol=0, atol=1e-6)


def test_a_broken_picture_is_named(folder: Path):
    path = folder / "ant" / "0.PNG"
    path.write_bytes(path.read_bytes()[:60])
    train, _ = data(folder=str(folder), test_folder=str(folder), size=4)
    with pytest.raises(UnreadableSample, match=f"sample 0 cannot be read: OSError: {path}"):
        next(load(train, iter([Share(0, torch.tensor([0]))]), 0, 0))


def test_mistakes_are_told_in_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"data.folder: 'nowhere' is not allowed"):
        data(folder="nowhere")
    with pytest.raises(UserError, match=r"data.folder: .* has no classes"):
        data(folder=str(folder / "ant"))
    with pytest.raises(UserError, match=r"data.std: \[1, 0, 1\] is not allowed"):
        data(folder=str(folder), std=[1, 0, 1])
    with pytest.raises(UserError, match=r"data.test_share: 0.01 of 24 samples leaves none to test"):
        data(folder=str(folder), test_share=0.01)
    (tmp_path / "other" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the class 'ant' of .*other' has no pictures"):
        data(folder=str(folder), test_folder=str(tmp_path / "other"))
    ramp(4, 4).save(tmp_path / "other" / "ant" / "0.png")
    with pytest.raises(UserError, match=r"in one of the folders alone: bee, zebra"):
        data(folder=str(folder), test_folder=str(tmp_path / "other"))
