"""Tests of training/data/arrays.py.

Bugs it catches: rows of inputs and targets that do not belong together, an array that is loaded as
a whole, a pickle that is opened.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain.errors import UserError
from scaletrain.training.data.arrays import data


def saved(path: Path, array: Any) -> str:
    np.save(path, array)
    return str(path)


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    return saved(tmp_path / "inputs.npy", np.arange(60).reshape(20, 3))


def test_rows_belong_together_and_a_share_is_held_out(inputs: str, tmp_path: Path):
    targets = saved(tmp_path / "targets.npy", np.arange(20, dtype=np.uint8) * 3)
    train, test = data(inputs=inputs, targets=targets, test_share=0.2)
    assert (len(train), len(test)) == (16, 4)
    rows = [*train, *test]
    assert sorted(int(target) for _, target in rows) == list(range(0, 60, 3))
    for row, target in rows:
        assert row.dtype == torch.float32 and target.dtype == torch.int64
        assert row.tolist() == [target, target + 1, target + 2]
    whole, other = data(inputs=inputs, targets=targets, test_inputs=inputs, test_targets=targets)
    assert (len(whole), len(other)) == (20, 20)
    assert isinstance(whole._inputs, np.memmap), "it stays on the disk"  # type: ignore[attr-defined]


def test_real_targets_and_tokens_keep_their_kind(inputs: str, tmp_path: Path):
    targets = saved(tmp_path / "targets.npy", np.linspace(0, 1, 20))
    train, _ = data(inputs=inputs, targets=targets, input_type="int64")
    row, target = train[0]
    assert row.dtype == torch.int64 and target.dtype == torch.float32 and target.shape == ()


def test_mistakes_are_told_in_one_line(inputs: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"data.targets: 'nowhere' is not allowed"):
        data(inputs=inputs, targets="nowhere")
    with pytest.raises(UserError, match=r"data.targets: .* has 19 rows, and .* has 20"):
        data(inputs=inputs, targets=saved(tmp_path / "few.npy", np.zeros(19)))
    with pytest.raises(UserError, match=r"data.targets: .* cannot be read: .*numpy.save"):
        data(inputs=inputs, targets=saved(tmp_path / "words.npy", np.array([{}] * 20)))
    with pytest.raises(UserError, match=r"holds a <U1 array \(allowed: an array of numbers"):
        data(inputs=inputs, targets=saved(tmp_path / "text.npy", np.array(["a"] * 20)))
    (tmp_path / "text").write_text("1 2 3")
    with pytest.raises(UserError, match=r"data.targets: .*text cannot be read"):
        data(inputs=inputs, targets=str(tmp_path / "text"))
