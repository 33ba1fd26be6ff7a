"""Runs a compiled schedule on a real tensor: one rank's end of an allreduce."""

import math
import time

from torch import Tensor

from scaletrain.engine.program import RECEIPT, RankProgram, RoundPart
from scaletrain.engine.transport import Receive, Reduce, Transport, Wait
from scaletrain.run import spans


def execute(
    program: RankProgram, transport: Transport, tensor: Tensor, reduce: Reduce, segments: int = 1
) -> None:
    """Reduce a tensor over all ranks, in place.

    Every rank of the transport calls it with its program of the same schedule (collective).

    Each segment is a part of the tensor that goes through the schedule by itself. For each part of
    a round, in the order of the program:

    1. Wait for the segment's previous part: this one sends its result.
    2. Start the messages, and go on: while one segment waits or adds, another is on the wire.

    At the end, wait for the last part of each segment.

    Args:
        program: this rank's program.
        transport: connects the ranks.
        tensor: one-dimensional and contiguous; the same dtype and number of elements on every rank.
        reduce: ``torch.add``, ``torch.maximum``, ...: associative and commutative.
        segments: how many segments the tensor is cut into.

    Raises:
        TimeoutError: a peer is late; names it.
        ConnectionError: a peer is gone; names it.
    """
    # From bytes to elements. Transports without the attribute need no receipts, whatever the size.
    receipts_from = getattr(transport, "receipts_from_bytes", math.inf) / tensor.element_size()
    slices, parts = program.parts(tensor.numel(), segments, receipts_from)
    # A view of the tensor for each slice, made when it is first needed. The last one is for
    # receipts (see ``transport.Lingering``).
    views: list[Tensor | None] = [None] * (len(slices) + 1)

    def view(place: int) -> Tensor:
        existing = views[place]
        if existing is not None:
            return existing
        new = tensor.new_zeros(1) if place == RECEIPT else tensor[slices[place]]
        views[place] = new
        return new

    waits: list[Wait | None] = [None] * segments  # for the latest part of each segment
    tracing = spans.on()
    for part in parts:
        wait_for_previous = waits[part.segment]
        if wait_for_previous is not None:
            wait_for_previous()
        sends = [(peer, view(place)) for peer, place in part.sends]
        receives = []
        for peer, place, reduced in part.receives:
            receives.append(Receive(peer, view(place), reduce if reduced else None))
        wait = transport.start(sends, receives)
        waits[part.segment] = _traced(wait, part) if tracing else wait
    for wait_for_last in waits:
        if wait_for_last is not None:
            wait_for_last()


def _traced(wait: Wait, part: RoundPart) -> Wait:
    """Return ``wait``, wrapped: it also adds two spans to the trace.

    They are the round, from its start, and the part of it that this rank spent waiting and adding.
    """
    began = time.time()

    def wait_and_trace() -> None:
        waited = time.time()
        wait()
        sends_to = [peer for peer, _ in part.sends]
        receives_from = [peer for peer, _, _ in part.receives]
        # A part that receives waits for its senders, a part that only sends for its receivers.
        peers = ", ".join(str(peer) for peer in receives_from or sends_to)
        spans.add("wait", f"wait for {peers}", waited, segment=part.segment)
        spans.add(
            "round",
            f"round {part.round}",
            began,
            segment=part.segment,
            sends_to=sends_to,
            receives_from=receives_from,
        )

    return wait_and_trace
