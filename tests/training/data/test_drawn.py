"""Tests of the data sets that are drawn: glyphs, canvases, paired views, topics and MNIST-1D."""

import hashlib
import importlib.util
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.errors import UserError
from scaletrain.training.data import canvases, glyphs, mnist1d, paired_views, topics
from scaletrain.training.data.glyphs import Glyphs, Look
from tests.conftest import require


def test_a_glyph_is_a_function_of_its_number():
    """However many samples there are, whatever was drawn before, alone or beside others."""
    few, _ = glyphs.data(samples=70, test_samples=1)
    many, test = glyphs.data(samples=140, test_samples=62)
    images, targets = many.tensors
    assert torch.equal(images[:70], few.tensors[0])
    assert targets.tolist() == [index % 62 for index in range(140)]
    fonts = [name for name in glyphs.FONTS if name not in glyphs.HELD_OUT]
    lazy = Glyphs(140, fonts, Look(24, 62, 0.08, 0.04, 0.1), glyphs.seed_of(0, "train"))
    image, target = lazy[133]
    torch.testing.assert_close(image, images[133], rtol=0, atol=1e-5)
    assert target == targets[133]
    assert not torch.equal(test.tensors[0], images[:62])
    other, _ = glyphs.data(samples=70, test_samples=1, seed=1)
    assert not torch.equal(other.tensors[0], few.tensors[0])


def test_glyphs_of_any_size_are_about_normalised_and_differ_by_class():
    for size in (12, 32):
        train, _ = glyphs.data(samples=620, test_samples=62, size=size)
        images, targets = train.tensors
        assert images.shape == (620, 1, size, size) and images.dtype == torch.float32
        assert abs(images.mean()) < 0.2 and 0.8 < images.std() < 1.2
    # The mean image of a class is nearest to most of its own images.
    means = torch.stack([images[targets == each].mean(0) for each in range(62)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == targets).float().mean() > 0.6


def test_no_font_of_the_test_set_is_in_a_training_image():
    """Without noise and distortion, each image shows its font."""
    straight = Look(24, 62, 0.0, 0.0, 0.0)
    drawn = Glyphs(62 * 8, ["cmr10"], straight, 0).draw(np.arange(62 * 8))[0]
    other = Glyphs(62 * 8, ["cmtt10"], straight, 0).draw(np.arange(62 * 8))[0]
    assert (drawn - other).abs().max() > 1
    with pytest.raises(UserError, match="did you mean 'cmr10'"):
        glyphs.data(test_fonts=["cmr1"])
    with pytest.raises(UserError, match="leaves no font for training"):
        glyphs.data(test_fonts=list(glyphs.FONTS))


def test_boxes_are_exact_and_apart():
    train, test, collate = canvases.data(samples=60, test_samples=5, noise=0.0)
    for index in range(60):
        image, boxes, labels = train[index]
        assert len(boxes) == len(labels) >= 1 and labels.max() < 10
        ink = image[0] > 0
        covered = torch.zeros_like(ink)
        for left, top, right, bottom in boxes.int().tolist():
            inside = ink[top:bottom, left:right]
            assert inside.any(1)[[0, -1]].all() and inside.any(0)[[0, -1]].all(), "tight"
            assert not covered[top:bottom, left:right].any(), "apart"
            covered[top:bottom, left:right] = True
        assert not (ink & ~covered).any(), "no ink beyond the boxes"
    assert torch.equal(train[7].image, canvases.data(samples=8, noise=0.0)[0][7].image)
    batch = collate([train[0], train[1], test[0]])
    assert batch.image.shape == (3, 1, 64, 64)
    assert [len(each) for each in batch.boxes] == [len(each) for each in batch.labels]


def test_the_halves_make_the_whole_glyph():
    train, _ = paired_views.data(samples=20, test_samples=5)
    left, right, targets = train.tensors
    whole = torch.cat([left.view(20, 16, 8), right.view(20, 16, 8)], dim=2)
    images, labels = glyphs.data(samples=20, test_samples=5, size=16, classes=10, noise=0.3)[
        0
    ].tensors
    assert torch.equal(whole, images[:, 0]) and torch.equal(targets, labels)


def test_a_tone_tells_its_class():
    train, test = paired_views.data(views="tone", samples=400, test_samples=200)
    _, sounds, targets = train.tensors
    assert sounds.shape == (400, 32)
    means = torch.stack([sounds[targets == each].mean(0) for each in range(10)])
    _, heard, labels = test.tensors
    right = (torch.cdist(heard, means).argmin(1) == labels).float().mean()
    assert 0.5 < right < 0.99, "it can be heard, and not without mistakes"


def test_topics_are_a_text_in_order():
    train, test = topics.data(length=32, pinned=False)
    tokens, following = train[0]
    assert torch.equal(tokens[1:], following[:-1]) and tokens.shape == (32,)
    text = "".join(chr(31 + code) if code else "\n" for code in tokens.tolist())
    assert text.startswith('The "assert" statement')
    assert len(train) > 8 * len(test) > 0
    words, _ = topics.data(tokens="words", words=50, length=16, pinned=False)
    assert max(int(words[index][0].max()) for index in range(len(words))) == 49


def test_topics_are_pinned(monkeypatch):
    monkeypatch.setattr(topics, "_KNOWN", {"00": "3.0.0"})
    with pytest.raises(UserError, match=r"has another text than Python 3\.0\.0") as raised:
        topics.data()
    assert "--set data.pinned=false" in str(raised.value)
    text = Path(pydoc_data.topics.__file__).read_bytes()
    monkeypatch.setattr(topics, "_KNOWN", {hashlib.sha256(text).hexdigest(): "this one"})
    pinned, _ = topics.data()
    assert torch.equal(pinned[0][0], topics.data(pinned=False)[0][0][0])


def test_mnist1d_leaves_the_generators_alone():
    require("mnist1d", importlib.util.find_spec("mnist1d") is not None, "pip install mnist1d")
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    train, test = mnist1d.data(samples=100)
    assert np.random.get_state()[1].tolist() == before
    assert train.tensors[0].shape == (80, 40, 1) and test.tensors[1].shape == (20,)
    again, _ = mnist1d.data(samples=100)
    assert torch.equal(train.tensors[0], again.tensors[0])


def test_heights_of_which_none_is_allowed_are_one_line():
    with pytest.raises(UserError, match=r"data.least_height: 30 is not allowed \(allowed: 8 to 20"):
        canvases.data(samples=1, test_samples=1, least_height=30, most_height=20)
