"""Draw pictures of shapes into folders, one folder a class; and a network that tells them apart.

python examples/shapes/pictures.py runs/shapes
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from torch import nn

SHAPES = ("circle", "cross", "square", "triangle")


def draw(shape: str, generator: random.Random) -> Image.Image:
    """Return a picture of a shape in any place, size and colour, with a few specks."""
    width, height = generator.randint(40, 56), generator.randint(40, 56)
    background = tuple(generator.randint(0, 100) for _ in range(3))
    colour = tuple(generator.randint(130, 255) for _ in range(3))
    picture = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(picture)
    half = generator.uniform(8, 14)
    x, y = generator.uniform(half, width - half), generator.uniform(half, height - half)
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colour)
    else:
        pen.line([(x - half, y), (x + half, y)], fill=colour, width=5)
        pen.line([(x, y - half), (x, y + half)], fill=colour, width=5)
    for _ in range(12):
        pen.point((generator.uniform(0, width), generator.uniform(0, height)), fill=colour)
    return picture


def draw_all(folder: Path, pictures: int = 200) -> None:
    """Draw so many pictures of each shape for training, and a quarter of that for testing."""
    generator = random.Random(0)
    for part, count in (("train", pictures), ("test", pictures // 4)):
        for shape in SHAPES:
            (folder / part / shape).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(shape, generator).save(folder / part / shape / f"{number:04}.png")


def network(*, width: int = 16) -> nn.Module:
    """Return a small convolutional network: (n, 3, 32, 32) -> (n, 4)."""
    layers: list[nn.Module] = []
    channels = 3
    for features in (width, 2 * width, 2 * width):
        layers += [nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = features
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, len(SHAPES)))


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
