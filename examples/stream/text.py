"""Next-character prediction on a stream: text that is read piece by piece, and never as a whole.

The text is the one that ``help()`` shows, so nothing is downloaded. A stream of your own may read
files or a database instead.
"""

import random
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from scaletrain import Data

CODES = 128  # ASCII; all others are left out


class Pieces:
    """Pieces of texts, each with the same piece one character later; texts in a random order.

    Its state lets a run that goes on begin where it was. Without ``state_dict`` and
    ``load_state_dict`` it would read the pieces before that place again.

    Args:
        texts: in any number.
        length: characters of a piece.
    """

    def __init__(self, texts: list[str], length: int):
        self._texts = texts
        self._length = length
        self._order: list[int] = []  # of the texts in this pass
        self._next = (0, 0)  # place in the order, and in that text

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        text, begin = self._next
        if (text, begin) == (0, 0):
            # The global generators are seeded by the pass, so all workers draw the same order.
            self._order = random.sample(range(len(self._texts)), len(self._texts))
        while text < len(self._order):
            codes = self._texts[self._order[text]].encode("ascii", "ignore")
            piece = codes[begin : begin + self._length + 1]
            if len(piece) <= self._length:
                text, begin = text + 1, 0
                continue
            begin += self._length
            self._next = (text, begin)
            values = torch.tensor(list(piece))
            yield values[:-1], values[1:]

    def state_dict(self) -> dict:
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict) -> None:
        self._order = state["order"]
        text, begin = state["next"]
        self._next = (text, begin)


def stream(*, length: int = 48) -> Data:
    """Return pieces of nine topics of ten for training, and of the others for testing."""
    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::10]
    rest = [text for number, text in enumerate(texts) if number % 10]
    return Data(Pieces(rest, length), Pieces(held_out, length))


class Network(nn.Module):
    """A recurrent network over the characters of a piece."""

    def __init__(self, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(CODES, 32)
        self.recurrent = nn.GRU(32, hidden, batch_first=True)
        self.output = nn.Linear(hidden, CODES)

    def forward(self, characters: Tensor) -> Tensor:
        """(pieces, length) int64 -> (pieces, CODES, length) logits."""
        states, _ = self.recurrent(self.embed(characters))
        return self.output(states).transpose(1, 2)


def network(*, hidden: int = 64) -> nn.Module:
    return Network(hidden)
