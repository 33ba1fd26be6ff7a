"""MPI through mpi4py: the fabric's own point-to-point, zero-copy; `native` is MPI's own Allreduce."""

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaletrain.engine.transport import Group, Pending, Receive, Reduce, Transport, apart
from scaletrain.errors import UserError

_POLLS = 200  # looks before the core is offered to others
_SLEEP_S = 50e-6


class Mpi:
    """Point-to-point over a communicator of the group's ranks, which must be processes of one MPI job."""

    def __init__(self, group: Group):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UserError(f"transport 'mpi': mpi4py or an MPI library is missing ({error}); pip install scaletrain[mpi]") from None
        self._mpi = MPI
        self.rank, self.size, self._timeout_s = group.rank, group.size, group.timeout.total_seconds()
        group.store.set(f"mpi/{group.rank}", f"{MPI.COMM_WORLD.rank} {MPI.COMM_WORLD.size}")
        places = [tuple(map(int, group.store.get(f"mpi/{rank}").split())) for rank in range(group.size)]
        world = [rank for rank, _ in places]
        if len(set(world)) < group.size:
            raise UserError(
                f"transport 'mpi': {group.size} ranks, but MPI numbers them {world}: start the workers with mpirun or srun --mpi"
            )
        members = MPI.COMM_WORLD.Get_group().Incl(world)
        tag = zlib.crc32(repr(world).encode()) & 0x7FFF
        self._comm = MPI.COMM_WORLD.Create_group(members, tag)
        self._operations = {torch.add: MPI.SUM, torch.mul: MPI.PROD, torch.minimum: MPI.MIN, torch.maximum: MPI.MAX}

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        sends = apart(sends, receives)
        landings = [r.into if r.reduce is None else torch.empty_like(r.into) for r in receives]
        requests = [(r.src, self._comm.Irecv(_bytes(t), r.src)) for r, t in zip(receives, landings, strict=True)]
        requests += [(peer, self._comm.Isend(_bytes(tensor), peer)) for peer, tensor in sends]

        def wait() -> None:
            self._wait(requests)
            for receive, landing in zip(receives, landings, strict=True):
                if receive.reduce is not None:
                    receive.reduce(receive.into, landing, out=receive.into)

        return wait

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """MPI_Allreduce. Half-precision tensors, which MPI cannot add, are refused."""
        operation = self._operations[reduce]  # type: ignore[index]
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise UserError(f"collective 'native' over MPI: {tensor.dtype} is unknown to MPI; choose another algorithm")
        self._call(lambda: self._comm.Allreduce(self._mpi.IN_PLACE, tensor.numpy(), operation))

    def _call(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except self._mpi.Exception as error:
            raise ConnectionError(f"peer of rank {self.rank} is lost: MPI says {error}") from error

    def _wait(self, requests: list[tuple[int, Any]]) -> None:
        began, polls = time.monotonic(), 0
        while requests:
            try:
                requests = [(peer, request) for peer, request in requests if not request.Test()]
            except self._mpi.Exception as error:
                raise ConnectionError(f"peer of rank {self.rank} is lost: MPI says {error}") from error
            polls += 1
            if polls > _POLLS:
                time.sleep(_SLEEP_S)
                if time.monotonic() - began > self._timeout_s:
                    who = ", ".join(str(peer) for peer in sorted({peer for peer, _ in requests}))
                    raise TimeoutError(f"rank {who} did not answer: timed out after {self._timeout_s:g} s")

    def close(self) -> None:
        """Local: freeing a communicator would wait for the others."""


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


def transport(group: Group) -> Transport:
    return Mpi(group)
