"""Tests of data/vowels.py: the package's utterances, and what a recurrent network makes of them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from scaletrain.training.data import vowels
from tests.conftest import require


def test_a_line_is_an_utterance_and_its_speaker(tmp_path: Path):
    path = tmp_path / "some.ts"
    path.write_text("#a comment\n@data\n1,2,3:4,5,6:2\n7,8,9:0,1,2:9\n")
    inputs, speakers = vowels._read(path).tensors  # type: ignore[attr-defined]
    expected = [[[1, 4], [2, 5], [3, 6]], [[7, 0], [8, 1], [9, 2]]]
    torch.testing.assert_close(inputs, torch.tensor(expected, dtype=torch.float32))
    assert speakers.tolist() == [1, 8]


def test_each_speaker_is_known_by_simple_means():
    is_there = importlib.util.find_spec("aeon") is not None
    require("aeon", is_there, "pip install --no-deps aeon")
    (inputs, speakers), (unseen, truth) = (part.tensors for part in vowels.data())  # type: ignore
    assert inputs.shape == (270, 25, 12) and unseen.shape == (370, 25, 12)
    assert torch.bincount(speakers).tolist() == [30] * 9
    # The nearest mean over time: far above the chance of a ninth if inputs and speakers belong.
    means = torch.stack([inputs[speakers == each].mean((0, 1)) for each in range(9)])
    nearest = torch.cdist(unseen.mean(1), means).argmin(1)
    assert (nearest == truth).float().mean() == pytest.approx(0.9, abs=0.1)
