"""Tests the receipts of engine/program.py and engine/execute.py.

Where a send is done before its message has left the host, large messages that should follow one
another are answered by receipts.
"""

import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain import plugins
from scaletrain.engine.execute import execute
from scaletrain.engine.program import RankProgram
from scaletrain.engine.transport import Group, Receive, Wait
from scaletrain.engine.transport.threads import Threads
from tests.engine import conformance
from tests.engine.test_transports import on_threads

LARGE = 1000  # elements


def group(store: dist.Store, rank: int, size: int) -> Group:
    return Group(store, rank, size, timedelta(seconds=20))


class Lingering(Threads):
    """Threads whose messages count as sent at once, as those in a socket do, and reach rank 2
    late.
    """

    receipts_from_bytes = 4 * LARGE

    def __init__(self, ranks: Group):
        super().__init__(ranks)
        self.sent_to: dict[int, float] = {}  # when a message of the tensor began its way to a rank
        self.arrived = 0.0  # the last one here

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        self.sent_to |= {peer: time.monotonic() for peer, tensor in sends if len(tensor) > 1}
        started = super().start(sends, receives)

        def wait() -> None:
            if (
                self.rank == 2
                and self.size == 4
                and any(len(receive.into) > 1 for receive in receives)
            ):
                time.sleep(0.1)
            started()
            if any(len(receive.into) > 1 for receive in receives):
                self.arrived = time.monotonic()

        return wait


@pytest.mark.parametrize("count", [LARGE - 1, LARGE])
def test_a_root_sends_to_one_after_another(count: int):
    def rank_of(rank: int, store: dist.Store) -> Lingering:
        transport = Lingering(group(store, rank, 4))
        tensor = conformance.contribution(rank, count, torch.float32)
        execute(
            RankProgram.of(plugins.load("collective", "tree")(4), rank),
            transport,
            tensor,
            torch.add,
        )
        assert conformance.close(tensor, conformance.reference(4, count, torch.float32, "add"))
        return transport

    root, _, inner, _ = on_threads(rank_of, 4)
    assert (root.sent_to[1] >= inner.arrived) == (
        count == LARGE
    )  # rank 2 is the first that it sends to


def test_every_algorithm_is_right_with_receipts():
    """For however small a message."""

    def rank_of(rank: int, store: dist.Store) -> int:
        transport = Lingering(group(store, rank, 6))
        transport.receipts_from_bytes = 4
        return len(list(conformance.every_allreduce(transport)))

    assert all(on_threads(rank_of, 6))
