"""Tests of data/reber.py: the grammar's strings, and what may follow each symbol."""

import itertools
import random
import re

import torch

from scaletrain.training.data import reber


def symbols(length: int, seed: int = 0) -> str:
    steps = itertools.islice(reber.stream(random.Random(seed)), length)
    return "".join(step.symbol for step in steps)


def strings(text: str) -> list[str]:
    """The whole embedded strings of a stream."""
    return re.findall(r"B[TP]B[TPSXV]*E[TP]E", text)


def test_streams_are_embedded_strings_and_nothing_else():
    text = symbols(20_000)
    found = strings(text)
    assert text.startswith("".join(found)) and len("".join(found)) > len(text) - 100
    inner = re.compile(r"B(T(S)*(X(X(T)*V(PX(T)*V)*(PS|V)|S))|P(T)*V(PX(T)*V)*(PS|V))E")
    for each in found:
        assert each[1] == each[-2], "the second symbol comes again at the end"
        assert inner.fullmatch(each[2:-2]), each
    assert {each[1] for each in found} == {"T", "P"}


def test_targets_are_what_follows_in_some_string():
    """The legal symbols after each prefix of a string, collected from many strings."""
    following: dict[str, set[str]] = {}
    for each in strings(symbols(60_000, seed=1)):
        for place in range(1, len(each)):
            following.setdefault(each[:place], set()).add(each[place])
    prefix = ""
    checked = 0
    for step in itertools.islice(reber.stream(random.Random(2)), 3000):
        prefix += step.symbol
        if step.next == "B" and prefix.endswith("E") and len(prefix) > 5:
            prefix = ""
            continue
        if len(prefix) <= 7:  # longer ones are too rare to have shown all that follows
            assert set(step.next) == following[prefix], prefix
            checked += 1
    assert checked > 1000


def test_rows_are_one_symbol_and_seeds_give_other_streams():
    train, test = reber.data(streams=3, length=50, test_streams=2, test_length=70)
    inputs, targets = train[:]
    assert inputs.shape == targets.shape == (3, 50, 7)
    assert torch.equal(inputs.sum(2), torch.ones(3, 50))
    assert (targets.sum(2) >= 1).all() and (targets.sum(2) <= 2).all()
    # Each symbol is one of those that the row before allows.
    assert ((inputs[:, 1:] * targets[:, :-1]).sum(2) == 1).all()
    assert test[:][0].shape == (2, 70, 7)
    other, _ = reber.data(streams=3, length=50, seed=1)
    assert not torch.equal(inputs, other[:][0])
