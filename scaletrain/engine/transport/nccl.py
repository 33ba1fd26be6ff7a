"""NCCL between CUDA devices, one a rank: one batch of messages a round."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.transport import Group, Receive, Reduce, Transport, Wait, apart
from scaletrain.errors import UserError

_OPERATIONS: dict[Reduce, Any] = {
    torch.add: dist.ReduceOp.SUM, torch.mul: dist.ReduceOp.PRODUCT,
    torch.minimum: dist.ReduceOp.MIN, torch.maximum: dist.ReduceOp.MAX,
}  # fmt: skip


def backend(group: Group) -> "dist.ProcessGroupNCCL":  # missing from a torch without NCCL
    """Return torch's own NCCL backend, with the group's timeout. It connects at its first use."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = group.timeout
    return dist.ProcessGroupNCCL(group.store, group.rank, group.size, options)


class Nccl:
    """NCCL's point-to-point messages between the current CUDA devices of the ranks.

    Waiting blocks the current stream, not the host. NCCL starts after the work that was enqueued on
    the stream of ``start`` before; work that is enqueued after waiting sees the result. Errors and
    timeouts surface when NCCL's watchdog finds them.

    Raises:
        UserError: there is no CUDA device, or this torch was built without NCCL.
    """

    def __init__(self, group: Group):
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise UserError(
                "transport 'nccl': needs a CUDA device and a torch built with NCCL;"
                " use gloo or shared_memory"
            )
        self.rank = group.rank
        self.size = group.size
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._nccl = backend(group)
        # A process group around the backend: it alone can batch messages.
        self._group: Any = dist.ProcessGroup(group.rank, group.size)  # type: ignore[call-arg]
        self._group._register_backend(self._device, dist.ProcessGroup.BackendType.NCCL, self._nccl)
        self._group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        # Reductions run on the stream after the whole batch. Only a message that replaces elements
        # could overwrite them before they are sent.
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        landings = []
        for receive in receives:
            into = receive.into
            landings.append(into if receive.reduce is None else torch.empty_like(into))
        # One batch: NCCL progresses its sends and receives together, so that no order among ranks
        # can block.
        self._group._start_coalescing(self._device)
        for peer, tensor in sends:
            self._group.send([tensor], peer, 0)
        for receive, landing in zip(receives, landings, strict=True):
            self._group.recv([landing], receive.src, 0)
        work = self._group._end_coalescing(self._device)

        def wait() -> None:
            work.wait()
            for receive, landing in zip(receives, landings, strict=True):
                if receive.reduce is not None:
                    receive.reduce(receive.into, landing, out=receive.into)

        return wait

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Run NCCL's own allreduce, in place. Collective."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[reduce]
        self._group.allreduce([tensor], options).wait()

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        self._nccl._set_default_timeout(timeout)

    def close(self) -> None:
        """End NCCL. Not collective."""
        # Not shutdown, which waits for the other ranks.
        torch.cuda.synchronize(self._device)
        self._nccl.abort()


def transport(group: Group) -> Transport:
    """Connect the current CUDA devices of the ranks. Collective.

    Raises:
        UserError: there is no CUDA device, or this torch was built without NCCL.
    """
    return Nccl(group)
