"""The help texts of Python itself as characters or words, pinned by their hash: no download."""

import ast
import hashlib
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray
from torch.utils.data import Dataset

from scaletrain.errors import UserError
from scaletrain.training.data.text_file import Sequences

# SHA-256 of pydoc_data/topics.py, by the version of Python that has it.
_KNOWN = {"abaa56a64551d8eead1b19cbae3c6db443f99f0cab81df07bed3cb75c0db9346": "3.11.7"}


def data(
    *,
    tokens: Literal["characters", "words"] = "characters",
    length: Annotated[int, Ge(1)] = 64,
    words: Annotated[int, Ge(2)] = 2000,
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.1,
    pinned: bool = True,
) -> tuple[Dataset, Dataset]:
    """Return (train, test): tokens (length,) int64, and those one place later (length,) int64.

    The topics of ``help()`` follow each other in alphabetical order. The test text is the end.

    Args:
        tokens: characters: those outside ASCII are one kind, so there are 97 kinds; words: the most
            frequent ones and punctuation marks; all others are one kind.
        length: of a sequence.
        words: kinds of words, with the one for all others.
        test_share: of the tokens that are for testing.
        pinned: raise an error if this version of Python has another text than figures were
            measured with.

    Raises:
        UserError: the text is another one, or too short for a sequence.
    """
    text = _text(pinned)
    middle = round(len(text) * (1 - test_share))
    parts = (text[:middle], text[middle:])
    if tokens == "characters":
        train, test = (_characters(part) for part in parts)
    else:
        # By the training text alone: the test must not shape what the model sees.
        counted = Counter(_split(parts[0]))
        ranked = sorted(counted, key=lambda word: (-counted[word], word))
        number = {word: index for index, word in enumerate(ranked[: words - 1], 1)}
        train, test = (np.array([number.get(word, 0) for word in _split(part)]) for part in parts)
    if min(len(train), len(test)) <= length:
        raise UserError(
            f"data.length: {length} is not allowed"
            f" (allowed: 1 to {max(1, min(len(train), len(test)) - 1)})"
        )
    return Sequences(train, length), Sequences(test, length)


def _text(pinned: bool) -> str:
    """Return all topics, one after the other."""
    spec = find_spec("pydoc_data")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).with_name("topics.py").read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if pinned and digest not in _KNOWN:
        raise UserError(
            f"data: topics: Python {sys.version.split()[0]} has another text than Python"
            f" {', '.join(_KNOWN.values())}, so figures would not compare (allowed: that version,"
            " or --set data.pinned=false)"
        )
    # Read, not imported: the file is nothing but a dictionary of texts.
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return "".join(topics[name] for name in sorted(topics))
    raise UserError("data: topics: pydoc_data/topics.py holds no topics")


def _characters(text: str) -> NDArray[np.int64]:
    """Return characters as numbers: 0 is a new line, 1 to 95 are ASCII, 96 is any other."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
    places = np.where((codes >= 32) & (codes < 127), codes - 31, 96)
    return np.where(codes == 10, 0, places)


def _split(text: str) -> list[str]:
    """Return words in lower case, and every other mark by itself."""
    return re.findall(r"[a-z_]+|\d+|[^\sa-z_\d]", text.lower())
