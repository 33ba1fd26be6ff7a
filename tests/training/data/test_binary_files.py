"""Tests of ``idx`` and ``cifar``: files of others, whole and damaged."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.errors import UserError
from scaletrain.training.data import cifar, idx


def idx_file(path: Path, array: np.ndarray, packed: bool = False) -> str:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 4, 5), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    return {
        "images": idx_file(tmp_path / "images", images),
        "labels": idx_file(tmp_path / "labels", labels),
        "test_images": idx_file(tmp_path / "test_images.gz", images[:2], packed=True),
        "test_labels": idx_file(tmp_path / "test_labels.gz", labels[:2], packed=True),
    }


def test_idx_files_are_read_plain_and_packed(files):
    train, test = idx.data(**files)
    images, targets = train.tensors
    assert images.shape == (6, 1, 4, 5) and targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert abs(images.mean()) < 1e-5 and abs(images.std(correction=0) - 1) < 1e-4
    assert torch.equal(test.tensors[0], images[:2])


def damage(content: bytes, how: str) -> bytes:
    return {
        "cut": content[:-1],
        "long": content + b"\0",
        "empty": b"",
        "another kind": b"\0\0\x0d\x03" + content[4:],
        "huge": content[:4] + b"\xff" * 12 + content[16:],
    }[how]


@pytest.mark.parametrize("how", ["cut", "long", "empty", "another kind", "huge"])
def test_a_damaged_idx_file_is_one_line(files, how: str):
    path = Path(files["images"])
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(UserError, match=r"data\.images: .*allowed"):
        idx.data(**files)


def test_a_cut_packed_file_and_a_wrong_number_of_labels_are_one_line(files, tmp_path):
    packed = Path(files["test_images"])
    packed.write_bytes(packed.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        idx.data(**files)
    files["labels"] = idx_file(tmp_path / "few", np.arange(5, dtype=np.uint8))
    with pytest.raises(UserError, match=r"has 5 labels, and .* has 6 images"):
        idx.data(**files)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read(tmp_path: Path, classes: int):
    random = np.random.default_rng(0)
    names = cifar._FILES[classes][0] + cifar._FILES[classes][1]
    labels = 1 if classes == 10 else 2
    for number, name in enumerate(names):
        records = random.integers(0, 256, (2, labels + 3072), dtype=np.uint8)
        records[:, labels - 1] = number
        records.tofile(tmp_path / name)
    train, test = cifar.data(folder=str(tmp_path), classes=classes)
    images, targets = train.tensors
    assert images.shape == (2 * (len(names) - 1), 3, 32, 32)
    assert targets.tolist() == [number for number in range(len(names) - 1) for _ in range(2)]
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    # ``records`` is the test file's: the first plane is red, row by row.
    planes = records[0, labels:].reshape(3, 32, 32) / 255
    assert np.corrcoef(planes[0].ravel(), test.tensors[0][0, 0].ravel())[0, 1] > 0.9999
    (tmp_path / names[0]).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="has 100 bytes"):
        cifar.data(folder=str(tmp_path), classes=classes)


def test_a_label_that_no_class_has_is_one_line(tmp_path: Path):
    for name in ("train.bin", "test.bin"):
        np.full((1, 3074), 200, dtype=np.uint8).tofile(tmp_path / name)
    with pytest.raises(UserError, match=r"has the label 200 \(allowed: 0 to 99\)"):
        cifar.data(folder=str(tmp_path), classes=100)
