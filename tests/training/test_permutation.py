"""Tests of training/permutation.py.

An order that is computed place by place is a random order. Bugs it catches: a sample that comes
twice or never, a size that has no order, neighbours that stay together, orders that repeat.
"""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.training.permutation import Permutation

SAMPLES = 30_000_000


def order(size: int, *place: int | str) -> list[int]:
    return Permutation(size, *place)(np.arange(size)).tolist()


@given(size=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 1000))
def test_it_is_a_bijection(size: int, seed: int, epoch: int):
    assert sorted(order(size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [999_983, 1_000_000, 1_000_001])
def test_a_large_one_is_a_bijection(size: int):
    seen = np.zeros(size, dtype=bool)
    seen[Permutation(size, 0)(np.arange(size))] = True
    assert seen.all()


@pytest.mark.parametrize("size", range(1, 12))
def test_small_ones_are_bijections_for_every_epoch(size: int):
    for epoch in range(50):
        assert sorted(order(size, 0, epoch)) == list(range(size))


def test_orders_are_the_same_for_ever():
    # A change of these numbers changes which samples a resumed run sees twice.
    assert order(10, 0, "order", 0) == [8, 9, 1, 5, 7, 6, 3, 0, 2, 4]
    assert order(10, 1, "order", 0) == [4, 8, 5, 6, 7, 2, 9, 0, 3, 1]


def test_a_part_is_that_of_the_whole():
    permutation = Permutation(1000, 5)
    assert permutation(np.arange(300, 340)).tolist() == order(1000, 5)[300:340]
    assert permutation(np.arange(0)).tolist() == []


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_equally_likely(size: int):
    draws = 6000
    counts = Counter(tuple(order(size, 0, epoch)) for epoch in range(draws))
    expected = draws / math.factorial(size)
    chi_square = 0.0
    for possible in itertools.permutations(range(size)):
        chi_square += (counts[possible] - expected) ** 2 / expected
    freedom = math.factorial(size) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [30, 1437, 50_000, SAMPLES])
def test_places_are_uniform_and_neighbours_are_not_related(size: int):
    # The first 64 places of 400 orders: what a batch at an epoch's beginning sees.
    num_epochs, places = 400, min(64, size - 1)
    drawn = np.stack([Permutation(size, 0, e)(np.arange(places)) for e in range(num_epochs)])
    tenths = np.bincount((drawn * 10 // size).ravel(), minlength=10)
    expected = drawn.size / 10
    assert ((tenths - expected) ** 2 / expected).sum() < 45  # chi-square of 9: 1e-6
    scaled = drawn / size - drawn.mean() / size
    variance = (scaled**2).mean()
    # Without replacement, any two places of ``size`` have correlation -1 / (size - 1).
    unrelated = -1 / (size - 1)
    deviation = 1 / math.sqrt(drawn.size)
    for distance in (1, 2, 7):
        near = (scaled[:, :-distance] * scaled[:, distance:]).mean() / variance
        assert abs(near - unrelated) < 6 * deviation
    next_epoch = (scaled[:-1] * scaled[1:]).mean() / variance
    assert abs(next_epoch) < 6 * deviation


def test_neighbours_are_as_far_apart_as_by_chance():
    taken = Permutation(SAMPLES, 1)(np.arange(200_000))
    steps = np.diff(taken) % SAMPLES
    tenths = np.bincount(steps * 10 // SAMPLES, minlength=10)
    expected = steps.size / 10
    assert ((tenths - expected) ** 2 / expected).sum() < 45
    # A shuffle in blocks would put both into one of few blocks.
    assert np.unique(taken // 1000).size > 29_000


def test_thirty_million_samples_cost_a_step_milliseconds_and_no_memory():
    def seconds(epoch: int) -> float:
        began = time.perf_counter()
        Permutation(SAMPLES, 0, epoch)(np.arange(256))  # the first step of an epoch
        return time.perf_counter() - began

    # ``torch.randperm`` takes 1.5 s or more. The least of some tries: other processes run, too.
    assert min(map(seconds, range(10))) < 0.005
    tracemalloc.start()
    seconds(11)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # bytes; the whole order has 240e6
