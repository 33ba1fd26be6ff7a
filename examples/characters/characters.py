"""Next-character prediction on lines of different lengths: a mean over characters, not over lines.

The text is the one that ``help()`` shows, so nothing is downloaded; other versions of Python have
slightly other words.
"""

from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from scaletrain import Data, Loss, Mean, Workload

ALPHABET = [chr(code) for code in range(32, 127)]  # printable ASCII; all others are left out
PAD = -100  # after the end of a line


class Network(nn.Module):
    """An LSTM over the characters of a line."""

    def __init__(self, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), 32)
        self.lstm = nn.LSTM(32, hidden, batch_first=True)
        self.output = nn.Linear(hidden, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        """(lines, length) int64 -> (lines, characters of the alphabet, length) logits."""
        states, _ = self.lstm(self.embed(characters))
        return self.output(states).transpose(1, 2)


class Characters(Workload):
    """Predict each character of a line from those before it.

    Args:
        hidden: units of the LSTM.
    """

    def __init__(self, *, hidden: int = 64):
        self.model = Network(hidden)
        lines = encoded_lines()
        held_out = lines[::10]
        rest = [line for number, line in enumerate(lines) if number % 10]
        self.data = Data(rest, held_out, collate)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["next"] != PAD).sum()

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        scores = self.model(batch["characters"])
        total = nn.functional.cross_entropy(
            scores, batch["next"], ignore_index=PAD, reduction="sum"
        )
        return Loss(total, self.count(batch))

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Mean]:
        """Return the loss, and as ``accuracy`` how often the likeliest character is right."""
        loss = self.forward(batch)
        guesses = self.model(batch["characters"]).argmax(1)
        right = (guesses == batch["next"]).sum()  # never at PAD, which is no character
        return {"loss": Mean(loss.total, loss.count), "accuracy": Mean(right, loss.count)}


def encoded_lines() -> list[Tensor]:
    """Return the text's lines of at least two characters, as indices into ``ALPHABET``."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    lines = []
    for topic in sorted(topics):
        for line in topics[topic].splitlines():
            known = [numbers[character] for character in line.strip() if character in numbers]
            if len(known) > 1:
                lines.append(torch.tensor(known[:61]))
    return lines


def collate(lines: list[Tensor]) -> dict[str, Any]:
    """Return lines as two matrices, padded to the longest one: characters, and the next of each."""
    characters = pad_sequence([line[:-1] for line in lines], batch_first=True)
    following = pad_sequence([line[1:] for line in lines], batch_first=True, padding_value=PAD)
    return {"characters": characters, "next": following}
