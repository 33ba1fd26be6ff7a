"""Tests collectives/cost.py against closed forms from the literature.

Bug it catches: a bound that nobody can check by hand.
"""

import math
import time

import pytest

from scaletrain import plugins
from scaletrain.collectives.cost import (
    Link,
    Network,
    crossings,
    loads_of,
    predict,
    predict_seconds,
)
from scaletrain.collectives.schedule import Schedule, Transfer

ETHERNET = Network(50e-6, 125e6)
SIZE = 25_000_000


def test_firecaffes_server_against_its_tree():
    """t_server / t_tree = p / (2 log2 p): 3.2 at 32 and 9.1 at 128 workers (a server that sends
    while it receives).
    """
    network = Network(0.0, 1e9)
    for p, ratio in ((32, 3.2), (128, 9.1)):
        server = predict(
            "star", p, SIZE, network, segments=200
        )  # answers one layer while it receives the next
        # The server is one of our p ranks: p - 1 others write to it, where FireCaffe counts p.
        assert server / predict("tree", p, SIZE, network) == pytest.approx(
            ratio * (p - 1) / p, rel=0.02
        )


@pytest.mark.parametrize("p", [2, 3, 4, 7, 8, 16])
def test_closed_forms(p: int):
    wire, a = SIZE / 125e6, 50e-6
    log = math.ceil(math.log2(p))
    assert predict("ring", p, SIZE, ETHERNET) == pytest.approx(2 * (p - 1) * (a + wire / p))
    assert predict("tree", p, SIZE, ETHERNET) == pytest.approx(2 * log * (a + wire))
    assert predict("star", p, SIZE, ETHERNET) == pytest.approx(2 * (p - 1) * (a + wire))
    if p & (p - 1) == 0:
        assert predict("halving_doubling", p, SIZE, ETHERNET) == pytest.approx(
            2 * log * a + 2 * (p - 1) / p * wire
        )
        assert predict("recursive_doubling", p, SIZE, ETHERNET) == pytest.approx(log * (a + wire))
        half = ETHERNET._replace(duplex=False)
        assert predict("recursive_doubling", p, SIZE, half) == pytest.approx(log * (a + 2 * wire))


@pytest.mark.parametrize(
    "name",
    [n for n in plugins.names("collective") if plugins.companion("collective", n, "loads")],
)
def test_stated_loads_are_those_of_the_schedule(name: str):
    factory = plugins.load("collective", name)
    network = Network(50e-6, 125e6, reduce_bytes_per_s=1e9)
    for p in range(1, 65):
        stated = predict_seconds(plugins.companion("collective", name, "loads")(p), SIZE, network)
        assert stated == pytest.approx(predict_seconds(loads_of(factory(p)), SIZE, network)), p


@pytest.mark.parametrize(
    "name",
    [n for n in plugins.names("collective") if plugins.companion("collective", n, "loads")],
)
@pytest.mark.parametrize("leaf", [3, 8])
def test_stated_loads_count_what_crosses_the_uplinks(name: str, leaf: int):
    factory = plugins.load("collective", name)
    loads = plugins.companion("collective", name, "loads")
    network = Network(0.0, 125e6, hosts_per_leaf=leaf, oversubscription=leaf)
    for p in range(1, 65):
        counted = predict_seconds(loads_of(factory(p), leaf), SIZE, network)
        stated = predict_seconds(loads(p, hosts_per_leaf=leaf), SIZE, network)
        assert stated == pytest.approx(counted), p


def test_uplinks_carry_what_is_counted_by_hand():
    """Two leaves of two: 0 -> 1 stays inside, 1 -> 2 and 0 -> 3 leave the first."""
    transfers = (Transfer(0, 1, 0, True), Transfer(1, 2, 0, True), Transfer(0, 3, 0, True))
    assert crossings(transfers, 2) == 2 and crossings(transfers, 4) == 0
    network = Network(0.0, 1e6, hosts_per_leaf=2, oversubscription=2.0)
    # Two messages of 1 MB over uplinks as wide as one port, where rank 0's port has two as well.
    assert predict_seconds(Schedule(4, 1, (transfers,)), 10**6, network) == pytest.approx(2.0)
    narrow = network._replace(oversubscription=8.0)
    assert predict_seconds(Schedule(4, 1, (transfers,)), 10**6, narrow) == pytest.approx(8.0)
    # The same with two ranks a host and one host a leaf: both messages cross the same uplink.
    hosts = narrow._replace(ranks_per_host=2, hosts_per_leaf=1)
    assert predict_seconds(Schedule(4, 1, (transfers,)), 10**6, hosts) == pytest.approx(16.0)


def test_four_thousand_ranks_are_predicted_quickly():
    began = time.monotonic()
    for name in ("ring", "halving_doubling", "direct", "tree", "star"):
        assert predict(name, 4096, SIZE, ETHERNET) > 0
    assert time.monotonic() - began < 10


def test_ranks_of_a_host_share_its_port():
    """4 hosts of 4: two levels move 2(4 - 1)/4 of the message over a port, a ring over all ranks
    2(16 - 1)/16.
    """
    network = Network(0.0, 125e6, ranks_per_host=4, local=Link(0.0, 1e15))
    wire = SIZE / 125e6
    assert predict("two_level", 16, SIZE, network, ranks_per_host=4) == pytest.approx(
        1.5 * wire, rel=1e-3
    )
    assert predict("ring", 16, SIZE, network) == pytest.approx(2 * 15 / 16 * wire, rel=1e-3)
    assert predict("halving_doubling", 16, SIZE, network) > 2 * wire


def test_pipelined_trees_approach_twice_the_message():
    network = Network(0.0, 125e6)
    wire = SIZE / 125e6
    assert predict("pipelined_tree", 8, SIZE, network, segments=256) < 1.2 * 2 * wire
    assert predict("double_tree", 8, SIZE, network, segments=128) < 1.2 * 2 * wire
