"""Tests of training/data/text_file.py.

Bugs it catches: a target that is not the next token, a token that is lost or comes twice, a test
text that training has seen.
"""

from pathlib import Path

import pytest
import torch

from scaletrain.errors import UserError
from scaletrain.training.data.text_file import data


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("tokens", ["bytes", "characters"])
def test_sequences_follow_each_other_and_targets_are_the_next_tokens(tokens: str, tmp_path: Path):
    text = "abcdefghij" * 20
    train, test = data(file=written(tmp_path / "a", text), tokens=tokens, length=7)  # type: ignore[arg-type]
    assert (len(train), len(test)) == (179 // 7, 19 // 7)
    alphabet = 97 if tokens == "bytes" else 0
    for dataset, begin in ((train, 0), (test, 180)):
        inputs = torch.cat([each for each, _ in dataset])
        targets = torch.cat([each for _, each in dataset])
        codes = torch.tensor([ord(letter) - 97 + alphabet for letter in text[begin:]])
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, codes[: len(inputs)])
        assert torch.equal(targets, codes[1 : len(inputs) + 1])


def test_characters_are_numbered_in_the_order_of_their_codes(tmp_path: Path):
    file = written(tmp_path / "a", "zäa→😀" * 4)
    train, _ = data(file=file, test_file=file, tokens="characters", length=4)
    assert train[0][0].tolist() == [1, 2, 0, 3] and train[0][1].tolist() == [2, 0, 3, 4]


def test_mistakes_are_told_in_one_line(tmp_path: Path):
    file = written(tmp_path / "a", "abcabc" * 10)
    with pytest.raises(UserError, match=r"data.file: 'nowhere' is not allowed"):
        data(file="nowhere")
    with pytest.raises(
        UserError, match=r"data.length: 54 is not allowed for a training text of 54"
    ):
        data(file=file, length=54)
    with pytest.raises(UserError, match=r"for a test text of 0 bytes"):
        data(file=file, test_file=written(tmp_path / "empty", ""), length=5)
    with pytest.raises(UserError, match=r"has the character '!', which the training text has not"):
        other = written(tmp_path / "b", "ab!")
        data(file=file, test_file=other, tokens="characters", length=2)
    (tmp_path / "c").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"is not in UTF-8: .*\(allowed: tokens: bytes\)"):
        data(file=str(tmp_path / "c"), tokens="characters")
