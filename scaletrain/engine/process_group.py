"""The torch.distributed backend ``scaletrain``, which serves DDP and any script unchanged.

>>> dist.init_process_group("scaletrain")  # doctest: +SKIP

Dense allreduces run on our engine, on a thread of their own, so that they overlap with backward.
So do, among ranks of one host, the other collectives of CPU tensors, and send and recv. Everything
else (sparse tensors, other wires) is forwarded to gloo, or to NCCL for CUDA tensors: nothing that
they can do is lost.

CUDA tensors: with ``auto`` and ``native``, NCCL's own allreduce runs. With an algorithm that was
chosen, its schedule runs over NCCL's point-to-point messages. Where ranks share a GPU, which NCCL
refuses, or a wire of the CPU was chosen, allreduces pass through page-locked memory, and everything
else goes to gloo.

The algorithm and the wire come from ``Options``
(``init_process_group(..., pg_options=Options(collective="ring"))``), else from the environment
(SCALETRAIN_COLLECTIVE, SCALETRAIN_TRANSPORT), else they are ``auto``.

The backend ``mpi4py`` is the same with MPI's own allreduce over mpi4py, since torch's wheels bring
no MPI. It is for scripts under mpirun.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from scaletrain.engine.choice import Options
from scaletrain.engine.group_calls import GroupCalls
from scaletrain.engine.spelling import Face, collective

BackendType = dist.ProcessGroup.BackendType


class ProcessGroup(Face, dist.ProcessGroup):
    """A group as torch 2.11 to 2.13 know it. Every rank creates one (collective).

    Scripts and torch's C++ call these methods, in all the spellings of torch's class.

    Args:
        store: the group's own part of the job's store.
        rank: this rank in the group.
        size: number of ranks in the group.
        timeout: after which waiting for a peer raises.
        options: how allreduces run.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options
    ):
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.calls = GroupCalls(store, rank, size, timeout, options)
        self._register_backend(torch.device("cpu"), BackendType.GLOO, self.calls.gloo)
        self._set_default_backend(BackendType.GLOO)
        if self.calls.nccl is not None:
            self._register_backend(torch.device("cuda"), BackendType.NCCL, self.calls.nccl)
            self._set_default_backend(BackendType.NCCL)

    _allgather_base = collective("_allgather_base")
    allgather_into_tensor_coalesced = collective("allgather_into_tensor_coalesced")
    alltoall_base = collective("alltoall_base")
    _reduce_scatter_base = collective("_reduce_scatter_base")
    reduce_scatter_tensor_coalesced = collective("reduce_scatter_tensor_coalesced")

    def get_group_store(self) -> dist.Store:
        """Return the group's own part of the job's store."""
        return self.calls.store
