"""Tests of data/chorales.py: a score's notes, and the package's corpus against its own parser."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from scaletrain.training.data import chorales
from tests.conftest import require


def note(step: str, octave: int, duration: int, *, chord: bool = False, alter: int = 0) -> str:
    return (
        f"<note>{'<chord/>' if chord else ''}<pitch><step>{step}</step><alter>{alter}</alter>"
        f"<octave>{octave}</octave></pitch><duration>{duration}</duration></note>"
    )


def rest(duration: int) -> str:
    return f"<note><rest/><duration>{duration}</duration></note>"


def test_a_pitch_is_there_at_each_quarter_that_begins_while_it_sounds():
    twos = "<attributes><divisions>2</divisions></attributes>"
    voices = [
        # Two eighths in the first quarter, a half note, and a rest.
        twos + note("C", 4, 1) + note("D", 4, 1) + note("E", 4, 4) + rest(2),
        # Two pitches at once, then a note that begins at the second quarter again.
        twos
        + note("C", 3, 2)
        + note("G", 3, 2, chord=True)
        + note("A", 3, 4)
        + "<backup><duration>4</duration></backup><forward><duration>2</duration></forward>"
        + note("B", 3, 2, alter=-1),
        # A grace note takes no time.
        "<note><grace/><pitch><step>F</step><octave>5</octave></pitch></note>"
        + note("F", 5, 1)
        + twos
        + note("A", 2, 4),
        # An eighth between two quarters is heard at neither.
        twos + rest(3) + note("C", 8, 1) + rest(4),
    ]
    parts = "".join(f"<part><measure>{voice}</measure></part>" for voice in voices)
    roll = chorales._roll(ElementTree.fromstring(f"<score>{parts}</score>"))
    assert roll is not None
    heard = [(np.nonzero(step)[0] + 21).tolist() for step in roll]
    assert heard == [[48, 55, 60, 77], [45, 57, 64], [45, 57, 58, 64]]


def test_a_score_of_other_than_four_voices_is_left_out():
    part = f"<part><measure>{note('C', 4, 1)}</measure></part>"
    assert chorales._roll(ElementTree.fromstring(f"<score>{part * 3}</score>")) is None


def test_the_loss_is_the_papers_sum_over_pitches_a_step():
    logits = torch.randn(3, chorales.PITCHES, 5)
    there = (torch.rand_like(logits) < 0.3).float()
    chances = logits.sigmoid()
    expected = 0.0
    for sample in range(3):
        for step in range(5):
            right = torch.where(there > 0, chances, 1 - chances)[sample, :, step]
            expected -= right.log().sum().item() / 15
    assert chorales.surprise(logits, there).item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def corpus() -> Path:
    is_there = importlib.util.find_spec("music21") is not None
    require("music21", is_there, 'pip install "scaletrain[data]"')
    spec = importlib.util.find_spec("music21")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "corpus" / "bach"


@pytest.mark.slow
def test_the_reader_agrees_with_the_packages_own(corpus: Path):
    from music21 import converter

    path = corpus / "bwv301.mxl"
    roll = chorales._roll(chorales._score(path))
    assert roll is not None
    found = {(quarter, place + 21) for quarter, place in np.argwhere(roll).tolist()}
    expected = set()
    for each in converter.parse(path).flatten().notes:
        begin, end = float(each.offset), float(each.offset + each.quarterLength)
        for quarter in range(int(np.ceil(begin)), int(np.ceil(end))):
            expected |= {(quarter, pitch.midi) for pitch in each.pitches}
    assert found == expected and len(found) > 100


@pytest.mark.slow
def test_inputs_are_the_targets_one_step_earlier(corpus: Path):
    train, test = chorales.data(length=24)
    assert len(train) > 500 and len(test) > 100
    before, now = train[7]
    assert before.shape == (24, 88) and now.shape == (88, 24)
    torch.testing.assert_close(before[1:], now.T[:-1])
    assert not before[0].any()
    # Four voices, or fewer where two sing the same pitch or one is silent.
    voices = torch.stack([target.sum(0) for _, target in test])
    assert voices.max() == 4 and voices.mean() > 3.5
