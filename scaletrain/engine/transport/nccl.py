"""NCCL between CUDA devices, one a rank: point-to-point messages in one batch a round, ordered by CUDA streams."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.transport import Group, Pending, Receive, Reduce, Transport, apart
from scaletrain.errors import UserError

_OPERATIONS = {
    torch.add: dist.ReduceOp.SUM, torch.mul: dist.ReduceOp.PRODUCT,
    torch.minimum: dist.ReduceOp.MIN, torch.maximum: dist.ReduceOp.MAX,
}  # fmt: skip


def backend(group: Group) -> "dist.ProcessGroupNCCL":  # not there in a torch without NCCL
    """NCCL as torch has it, with the group's timeout. It connects when it is first used."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = group.timeout
    return dist.ProcessGroupNCCL(group.store, group.rank, group.size, options)


class Nccl:
    """Tensors are on this rank's current CUDA device.

    Waiting blocks the current stream, not the host: NCCL starts after what was enqueued on the stream of ``start``, and what is
    enqueued after waiting sees its result. Errors and timeouts surface when NCCL's watchdog finds them.
    """

    def __init__(self, group: Group):
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise UserError(
                "transport 'nccl': needs a CUDA device and a torch built with NCCL; use gloo or shared_memory"
            )
        self.rank, self.size = group.rank, group.size
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._nccl = backend(group)
        self._pg = dist.ProcessGroup(group.rank, group.size)
        self._pg._register_backend(self._device, dist.ProcessGroup.BackendType.NCCL, self._nccl)
        self._pg._set_default_backend(dist.ProcessGroup.BackendType.NCCL)

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        # Reductions run on the stream after the whole batch; only what is replaced could be overwritten before it is sent.
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        landings = [r.into if r.reduce is None else torch.empty_like(r.into) for r in receives]
        # One batch: NCCL progresses sends and receives together, so that no order among ranks can block.
        self._pg._start_coalescing(self._device)
        for peer, tensor in sends:
            self._pg.send([tensor], peer, 0)
        for receive, landing in zip(receives, landings, strict=True):
            self._pg.recv([landing], receive.src, 0)
        work = self._pg._end_coalescing(self._device)

        def wait() -> None:
            work.wait()
            for receive, landing in zip(receives, landings, strict=True):
                if receive.reduce is not None:
                    receive.reduce(receive.into, landing, out=receive.into)

        return wait

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """NCCL's own allreduce."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[reduce]  # type: ignore[index]
        self._pg.allreduce([tensor], options).wait()

    def close(self) -> None:
        # abort, not shutdown: shutdown waits for the other ranks, and close is not collective.
        torch.cuda.synchronize(self._device)
        self._nccl.abort()


def transport(group: Group) -> Transport:
    return Nccl(group)
