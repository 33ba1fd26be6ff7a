"""The contract that every transport must meet, as functions of one rank.

Threads, processes and mpirun run them.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain import plugins
from scaletrain.collectives import one_hop
from scaletrain.engine.execute import execute
from scaletrain.engine.program import RankProgram
from scaletrain.engine.transport import UNEVEN, Call, Ends, Group, Receive, Transport

ALGORITHMS = plugins.names("collective")
COUNTS = (1, 2, 7, 1000, 4099)
LARGE = 600_001  # TCP cuts them into pieces, and answers some by receipts
REDUCTIONS = {
    "add": torch.add,
    "mul": torch.mul,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}


def contribution(rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What only this rank could give. Uneven fractions, so that another order of additions shows in
    the last bits.
    """
    generator = torch.Generator().manual_seed(1000 * rank + count)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 3, (count,), generator=generator).to(dtype) + (rank == 0)


def reference(size: int, count: int, dtype: torch.dtype, reduce: str) -> Tensor:
    """The same by one process, in float64 where the dtype is a floating one."""
    exact = torch.float64 if dtype.is_floating_point else dtype
    total = contribution(0, count, dtype).to(exact)
    for rank in range(1, size):
        total = REDUCTIONS[reduce](total, contribution(rank, count, dtype).to(exact))
    return total


def close(found: Tensor, expected: Tensor) -> bool:
    if not found.dtype.is_floating_point:
        return torch.equal(found, expected)
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def every_allreduce(transport: Transport) -> Iterator[tuple[str, Tensor]]:
    """Runs each algorithm on each count, twice, and checks the sums; yields what must be equal, bit
    for bit, on every rank.
    """
    size, rank = transport.size, transport.rank
    for name in ALGORITHMS:
        program = RankProgram.of(plugins.load("collective", name)(size), rank)
        for count in COUNTS:
            for segments in (1, 3):
                found = [contribution(rank, count) for _ in range(2)]
                for tensor in found:
                    execute(program, transport, tensor, torch.add, segments)
                what = f"{name}, {size} ranks, {count} elements, {segments} segments"
                assert close(found[0], reference(size, count, torch.float32, "add")), (
                    f"{what}: wrong sum"
                )
                assert torch.equal(found[0], found[1]), f"{what}: another run gave other bits"
                yield what, found[0]
    for name in ("tree", "star", "direct", "recursive_doubling", "pipelined_tree"):
        tensor = contribution(rank, LARGE)
        execute(
            RankProgram.of(plugins.load("collective", name)(size), rank),
            transport,
            tensor,
            torch.add,
        )
        assert close(tensor, reference(size, LARGE, torch.float32, "add")), (
            f"{name}: {LARGE} elements: wrong sum"
        )
        yield f"{name}, {LARGE} elements", tensor
    for dtype, reduce in (
        (torch.float64, "add"),
        (torch.int64, "mul"),
        (torch.uint8, "maximum"),
        (torch.int32, "minimum"),
    ):
        program = RankProgram.of(plugins.load("collective", "ring")(size), rank)
        tensor = contribution(rank, 101, dtype)
        execute(program, transport, tensor, REDUCTIONS[reduce], 1)
        assert close(tensor, reference(size, 101, dtype, reduce)), f"{dtype} {reduce}"
        yield f"{dtype} {reduce}", tensor


def own_allreduce(transport: Any) -> Iterator[tuple[str, Tensor]]:
    """The allreduce that the wire itself brings."""
    size, rank = transport.size, transport.rank
    for count in (1, 5, 4099, 300_001):
        for dtype, reduce in (
            (torch.float32, "add"),
            (torch.float64, "maximum"),
            (torch.int32, "minimum"),
            (torch.int64, "mul"),
        ):
            if dtype == torch.int64 and count > 5000:
                continue
            found = [contribution(rank, count, dtype) for _ in range(2)]
            for tensor in found:
                transport.allreduce(tensor, REDUCTIONS[reduce])
            what = f"own allreduce, {size} ranks, {count} of {dtype}, {reduce}"
            assert close(found[0], reference(size, count, dtype, reduce)), f"{what}: wrong"
            assert torch.equal(found[0], found[1]), f"{what}: another run gave other bits"
            yield what, found[0]


def one_hop_ends(call: Call, rank: int, size: int, count: int) -> tuple[Ends, dict[int, Tensor]]:
    """A rank's ends of a collective, and what its targets must hold at the end, by one process.

    The chunk from one rank to another is what only the two of them could expect.
    """
    made = one_hop.schedule_of(call.collective, size, call.root)

    def chunk_of(owner: int, chunk: int) -> Tensor:
        length = count
        if call.num_elements == UNEVEN:
            length = (chunk * 7919) % (count + 1)
        return contribution(owner + size * chunk, length, call.dtype)

    is_pairwise = call.collective == "all_to_all"
    sources, targets, expected = {}, {}, {}
    for chunk in range(made.num_chunks):
        gives = chunk // size == rank if is_pairwise else True
        if call.collective in ("all_gather", "gather"):
            gives = chunk == rank
        if call.collective in ("broadcast", "scatter"):
            gives = rank == call.root
        if gives:
            sources[chunk] = chunk_of(rank, chunk)
    for receiver, chunk, contributors in one_hop.results(call.collective, size, call.root):
        if receiver != rank:
            continue
        owners = [owner for owner in range(size) if contributors >> owner & 1]
        total = chunk_of(owners[0], chunk)
        for owner in owners[1:]:
            total = call.reduce(total, chunk_of(owner, chunk))  # type: ignore[misc]
        expected[chunk] = total
        targets[chunk] = torch.zeros_like(total)
    if call.collective in ("broadcast", "reduce") and rank == call.root:
        targets.update({chunk: tensor for chunk, tensor in sources.items() if chunk in targets})
    return Ends(sources, targets), expected


def every_one_hop(transport: Any) -> Iterator[str]:
    """Each collective of one hop, each root, in several sizes, some through many pieces."""
    size, rank = transport.size, transport.rank
    number = 0
    calls = []
    for collective in one_hop.COLLECTIVES:
        if collective == "barrier":
            continue
        for root in range(size if collective in one_hop.ROOTED else 1):
            reduces = collective in ("reduce", "reduce_scatter")
            calls.append((collective, root, torch.int64, torch.add if reduces else None))
            if reduces:
                calls.append((collective, root, torch.float32, torch.maximum))
                calls.append((collective, root, torch.bfloat16, torch.minimum))
            else:
                calls.append((collective, root, torch.uint8, None))
    for count in (1, 5, 3000):
        for collective, root, dtype, reduce in calls:
            # Nobody waits for a broadcast's receivers: the sets of blocks are used again before.
            for _ in range(3):
                number += 1
                is_uneven = collective == "all_to_all" and dtype == torch.uint8
                num_elements = UNEVEN if is_uneven else count
                call = Call(number, num_elements, dtype, reduce, collective, root)
                ends, expected = one_hop_ends(call, rank, size, count)
                transport.announce(call)
                transport.exchange(call, ends)
                for chunk, tensor in expected.items():
                    assert torch.equal(ends.targets[chunk], tensor), (call, chunk)
            yield f"{collective} {root} {dtype} {count}"
        number += 1
        barrier = Call(number, 0, None, None, "barrier")
        transport.announce(barrier)
        transport.exchange(barrier, Ends({}, {}))


def messages_in_order(transport: Transport) -> None:
    """Several starts are open at once, waited for in any order; what is sent is read before
    anything is written; large messages cross both ways.
    """
    size, rank = transport.size, transport.rank
    if size == 1:
        return
    right, left = (rank + 1) % size, (rank - 1) % size
    boxes = [torch.empty(3) for _ in range(4)]
    pending = [
        transport.start([(right, torch.full((3,), 10.0 * rank + i))], [Receive(left, box)])
        for i, box in enumerate(boxes)
    ]
    for wait in pending[::-1]:
        wait()
    assert [box.tolist() for box in boxes] == [[10.0 * left + i] * 3 for i in range(4)]
    swapped = torch.full((500_000,), float(rank))
    transport.start([(right, swapped)], [Receive(left, swapped)])()
    assert (swapped == left).all()
    added = torch.full((500_000,), float(rank))
    transport.start([(right, added)], [Receive(left, added, torch.add)])()
    assert (added == left + rank).all()
    # Two receives into the same elements are reduced in the order in which they are listed.
    if size == 2:
        peer, into = 1 - rank, torch.full((2,), 8.0)

        def first_divided_by_second(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
            return torch.div(a, b, out=out).add_(1)

        sends = [(peer, torch.full((2,), 2.0)), (peer, torch.full((2,), 5.0))]
        receives = [
            Receive(peer, into, first_divided_by_second),
            Receive(peer, into, first_divided_by_second),
        ]
        transport.start(sends, receives)()
        assert into.tolist() == [2.0, 2.0]  # (8 / 2 + 1) / 5 + 1


def conform(name: str, store: dist.Store, rank: int, size: int) -> dict[str, bytes]:
    """Everything, as one rank of a group: what was computed, by name, to be compared over ranks."""
    transport = plugins.load("transport", name)(
        Group(dist.PrefixStore("group/", store), rank, size, timedelta(seconds=40))
    )
    found = dict(every_allreduce(transport))
    if size > 1 and hasattr(transport, "allreduce"):
        found |= dict(own_allreduce(transport))
    messages_in_order(transport)
    # Nobody leaves while another may still want something from it.
    store.add("done", 1)
    while store.add("done", 0) < size:
        pass
    transport.close()
    return {what: tensor.numpy().tobytes() for what, tensor in found.items()}


def late(name: str, store: dist.Store, rank: int, size: int) -> str:
    """The last rank never comes to a round: what the others raise."""
    transport = plugins.load("transport", name)(
        Group(dist.PrefixStore("group/", store), rank, size, timedelta(seconds=1))
    )
    message = ""
    if rank < size - 1:
        try:
            transport.start([], [Receive(size - 1, torch.empty(3))])()
        except TimeoutError as error:
            message = str(error)
    store.add("done", 1)
    while store.add("done", 0) < size:
        pass
    return message
