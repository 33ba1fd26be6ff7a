"""Tests of training/fingerprint.py.

Equal data sets have equal fingerprints in every process. Bugs it catches: a false alarm because of
augmentation or an address in memory, a difference that goes unseen.
"""

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from scaletrain.training.batches import UnreadableSample
from scaletrain.training.fingerprint import fingerprint


class Listed(Dataset):
    """A data set of given samples."""

    def __init__(self, *samples: Any):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Augmented(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        return torch.rand(3), np.random.rand()


class Odd(Dataset):
    """Samples whose repr depends on the process."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return {"words": {"ab", "cd", "ef", "gh", "ij"}, "object": object(), "none": None}


def test_equal_data_has_equal_fingerprints_that_a_float64_holds():
    def made() -> TensorDataset:
        return TensorDataset(torch.arange(300.0).view(100, 3), torch.arange(100))

    value = fingerprint(made())
    assert value == fingerprint(made()) == int(float(value))
    assert 0 <= value < 2**48
    assert fingerprint(Augmented()) == fingerprint(Augmented())


ONE = torch.tensor([1.0, 2.0])
DIFFERENT: list[tuple[Any, Any]] = [
    (ONE, torch.tensor([1.0, 2.0000002])),
    (ONE, ONE.double()),
    (ONE, ONE[:, None]),
    (ONE, ONE.numpy()),
    (ONE.bfloat16(), ONE.half()),
    ({"a": ONE}, {"b": ONE}),
    ((ONE, [ONE]), ([ONE], ONE)),
    ((ONE, ONE), (ONE, ONE, ONE)),
    ((ONE, 3), (ONE, 4)),
    ((ONE, 3), (ONE, 3.0)),
    ((ONE, "cat"), (ONE, "dog")),
    (np.array([1, 2], dtype=np.int8), np.array([1, 2], dtype=np.uint8)),
    (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
    (torch.eye(2).to_sparse(), (torch.eye(2) * 2).to_sparse()),
    (torch.tensor(True), torch.tensor(False)),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_samples_have_different_fingerprints(first: Any, second: Any):
    # The last of three, so that more than the first sample is looked at.
    assert fingerprint(Listed(0, 0, first)) == fingerprint(Listed(0, 0, first))
    assert fingerprint(Listed(0, 0, first)) != fingerprint(Listed(0, 0, second))


def test_lengths_differ_and_even_no_samples_have_a_fingerprint():
    values = {fingerprint(Listed(*[0] * length)) for length in range(12)}
    assert len(values) == 12


def test_another_process_gets_the_same(tmp_path: Any):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_fingerprint import *;"
        "print(fingerprint(Odd()), fingerprint(Augmented()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12"}
    printed = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        capture_output=True, text=True, check=True, timeout=60, env=environment,
    ).stdout  # fmt: skip
    assert printed.split() == [str(fingerprint(Odd())), str(fingerprint(Augmented()))]


def test_an_unreadable_sample_is_named():
    class Broken(Listed):
        def __getitem__(self, index: int) -> Any:
            raise OSError("gone")

    with pytest.raises(UnreadableSample, match="data: sample 0 cannot be read: OSError: gone"):
        fingerprint(Broken(1, 2))


def test_images_take_milliseconds():
    images = TensorDataset(torch.zeros(100, 3, 224, 224), torch.zeros(100))

    def seconds() -> float:
        began = time.perf_counter()
        fingerprint(images)
        return time.perf_counter() - began

    # 8 ms. The least of some tries: other processes run beside this one.
    assert min(seconds() for _ in range(5)) < 0.05
