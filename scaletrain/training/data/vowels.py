"""Japanese vowels of nine speakers, from the files in the package aeon: no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import Needs

# Its own requirements exclude numpy 2.4; only its files are read.
NEEDS = Needs(package="aeon", fix="pip install --no-deps aeon")


def data() -> tuple[Dataset, Dataset]:
    """Return (train, test): cepstra (25, 12) float32 of two vowels, the speaker int64.

    There are 270 utterances for training and 370 for testing, stretched to 25 steps each.

    Source: M. Kudo, J. Toyama, M. Shimbo, "Multidimensional curve classification using
    passing-through regions", Pattern Recognition Letters 20 (1999), 1103-1111.

    Raises:
        UserError: the package is not installed.
    """
    NEEDS.check_installed("data: vowels")
    spec = find_spec("aeon")  # found, not imported
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data" / "JapaneseVowels"
    train, test = (_read(folder / f"JapaneseVowels_eq_{part}.ts") for part in ("TRAIN", "TEST"))
    return train, test


def _read(path: Path) -> Dataset:
    """Return the utterances of a file: a line each, cepstra by ``:``, the speaker at the end."""
    inputs, speakers = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("@", "#")):
            continue
        *cepstra, speaker = line.split(":")
        inputs.append([np.array(each.split(","), dtype=np.float32) for each in cepstra])
        speakers.append(int(speaker) - 1)
    steps = torch.from_numpy(np.array(inputs)).transpose(1, 2).contiguous()
    return TensorDataset(steps, torch.tensor(speakers))
