"""Chorales by Bach from the corpus of music21 as pitches that sound together: no download."""

import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError
from scaletrain.needs import Needs

NEEDS = Needs(package="music21", fix='pip install "scaletrain[data]"')

_LOWEST, PITCHES = 21, 88  # of a piano, as MIDI counts: A0 to C8
_VOICES = 4
_TEST_EVERY = 5  # each fifth chorale is for testing
_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


def data(*, length: Annotated[int, Ge(2)] = 32) -> tuple[Dataset, Dataset]:
    """Return (train, test): the pitches before each step, and those of the step.

    A step is a quarter note. Inputs are (length, 88) float32 with a 1 for each pitch that sounds
    one step earlier, and targets (88, length) float32. Each fifth chorale of four voices is for
    testing. A chorale is cut into sequences, and steps that are left over at its end are dropped.

    Source: N. Boulanger-Lewandowski, Y. Bengio, P. Vincent, "Modeling Temporal Dependencies in
    High-Dimensional Sequences", ICML 2012 (arXiv 1206.6392). Their split is another one.

    Args:
        length: steps of a sequence.

    Raises:
        UserError: the package is not installed, or no chorale is long enough.
    """
    NEEDS.check_installed("data: chorales")
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, roll in enumerate(_rolls()):
        is_test = number % _TEST_EVERY == _TEST_EVERY - 1
        steps = torch.from_numpy(roll)
        parts[is_test].extend([*steps.split(length)][: len(steps) // length])
    if not all(parts):
        raise UserError(f"data.length: {length} is not allowed (no chorale has so many quarters)")
    train, test = (_samples(torch.stack(part)) for part in parts)
    return train, test


def surprise(output: Tensor, target: Tensor) -> Tensor:
    """Return the negative log likelihood of a step, as a mean over samples and steps.

    It is a loss: pitches are independent, and each is there with the chance of its logit.

    Args:
        output: (n, 88, length) logits.
        target: (n, 88, length).
    """
    losses = functional.binary_cross_entropy_with_logits(output, target, reduction="none")
    return losses.sum(1).mean()


def _samples(sequences: Tensor) -> Dataset:
    """Return the data set of sequences (n, length, 88)."""
    before = torch.zeros_like(sequences)
    before[:, 1:] = sequences[:, :-1]
    return TensorDataset(before, sequences.transpose(1, 2).contiguous())


def _rolls() -> Iterator[NDArray[np.float32]]:
    """Yield chorales of four voices as (quarters, 88), in the order of their files' names."""
    spec = find_spec("music21")  # found, not imported: its own parser takes minutes
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "corpus" / "bach"
    seen = set()
    for path in sorted(folder.glob("*.mxl")):
        roll = _roll(_score(path))
        # Some chorales are there twice.
        if roll is not None and roll.tobytes() not in seen:
            seen.add(roll.tobytes())
            yield roll


def _score(path: Path) -> ElementTree.Element:
    """Return the score in a compressed MusicXML file."""
    with zipfile.ZipFile(path) as archive:
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        name = next(
            each.attrib["full-path"] for each in container.iter() if "full-path" in each.attrib
        )
        return ElementTree.fromstring(archive.read(name))


def _roll(score: ElementTree.Element) -> NDArray[np.float32] | None:
    """Return the pitches that sound at the beginning of each quarter; None: not of four voices."""
    voices = score.findall("part")
    if len(voices) != _VOICES:
        return None
    notes = [note for voice in voices for note in _notes(voice)]
    length = int(max((end for _, _, end in notes), default=0.0))
    roll = np.zeros((length, PITCHES), dtype=np.float32)
    for pitch, begin, end in notes:
        # The quarters q with begin <= q < end.
        roll[int(np.ceil(begin)) : int(np.ceil(end)), pitch - _LOWEST] = 1
    return roll


def _notes(voice: ElementTree.Element) -> Iterator[tuple[int, float, float]]:
    """Yield the notes of a voice: MIDI's pitch, beginning and end in quarters."""
    divisions, now, begin = 1, 0.0, 0.0
    for event in voice.iterfind("measure/*"):
        divisions = int(event.findtext("divisions") or divisions)
        duration = float(event.findtext("duration") or 0) / divisions
        if event.tag == "backup":
            now -= duration
        elif event.tag == "forward":
            now += duration
        elif event.tag == "note" and event.find("grace") is None:
            if event.find("chord") is None:  # else it begins with the note before
                begin = now
                now += duration
            pitch = event.find("pitch")
            if pitch is not None:  # else a rest
                yield _pitch(pitch), begin, begin + duration


def _pitch(pitch: ElementTree.Element) -> int:
    semitone = _SEMITONES[pitch.findtext("step") or "C"]
    alteration = round(float(pitch.findtext("alter") or 0))
    return 12 * (int(pitch.findtext("octave") or 4) + 1) + semitone + alteration
