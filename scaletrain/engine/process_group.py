"""The torch.distributed backend ``scaletrain``: ``dist.init_process_group("scaletrain")`` serves DDP and any script unchanged.

Dense allreduces run on our engine, on a thread of their own, so that they overlap with backward. Everything else (other collectives, sparse
tensors, point-to-point) is forwarded to gloo, or to NCCL for CUDA tensors: what they can do is not lost.

CUDA tensors: with ``auto`` and ``native`` NCCL's own allreduce runs; with an algorithm that was chosen, its schedule over NCCL's point-to-point
messages. Where ranks share a GPU, which NCCL refuses, or a wire of the CPU was chosen, allreduces pass through page-locked memory, and
everything else goes to gloo.

The algorithm and the wire come from ``Options`` (``init_process_group(..., pg_options=Options(collective="ring"))``), else from the
environment (SCALETRAIN_COLLECTIVE, SCALETRAIN_TRANSPORT), else they are ``auto``.

The backend ``mpi4py`` is the same with MPI's own allreduce over mpi4py, since torch's wheels bring no MPI: for scripts under mpirun.
"""

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from scaletrain.engine.accelerator import AcceleratorLane, shared
from scaletrain.engine.choice import NATIVE, check
from scaletrain.engine.lane import DTYPES, OPERATIONS, Lane, Operation
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import Group, nccl
from scaletrain.engine.work import All, Forwarded
from scaletrain.errors import UserError

_LET_GO_S = 0.01


class Options(NamedTuple):
    """How allreduces run: names of files in ``collectives/`` and ``engine/transport/``, with options if need be
    (``pipelined_tree:segments=8``), or ``auto``."""

    collective: str = "auto"
    transport: str = "auto"

    @classmethod
    def from_env(cls) -> "Options":
        """Raises ``UserError`` for a name that is not there."""
        chosen = cls(
            os.environ.get("SCALETRAIN_COLLECTIVE", "auto"),
            os.environ.get("SCALETRAIN_TRANSPORT", "auto"),
        )
        check(chosen.collective, "collective", "SCALETRAIN_COLLECTIVE")
        check(chosen.transport, "transport", "SCALETRAIN_TRANSPORT")
        return chosen


class ProcessGroup(dist.ProcessGroup):
    """One rank's end of a group. Made by torch.distributed, collectively."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: Options
    ):
        super().__init__(rank, size)
        self._store, self._timeout, self._options = store, timeout, options
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._nccl: Any = None
        if torch.cuda.is_available() and dist.is_nccl_available():
            self._nccl = nccl.backend(Group(dist.PrefixStore("nccl/", store), rank, size, timeout))
            self._register_backend(
                torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, self._nccl
            )
            self._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        self._roll_call = RollCall(store, rank, size, timeout)
        self._lanes: dict[str, Lane | None] = {}  # by kind of device; none: left to NCCL
        self._device_shared: bool | None = None

    def getBackendName(self) -> str:
        return "scaletrain"

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        """In place. Runs on the engine when every tensor is dense and of a plain dtype; else on gloo or NCCL."""
        options = options or dist.AllreduceOptions()
        reduce_op = options.reduceOp  # torch passes a ReduceOp or its inner enum
        operation = OPERATIONS.get(int(getattr(reduce_op, "op", reduce_op)))
        lane = (
            self._lane(tensors)
            if operation is not None and _runs_here(tensors, operation)
            else None
        )
        if operation is None or lane is None:
            return self._forward("allreduce", tensors, options)
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function("scaletrain:all_reduce"):
                return lane.allreduce(tensors, operation, at_once=not options.asyncOp)
        return lane.allreduce(tensors, operation, at_once=not options.asyncOp)

    def _lane(self, tensors: list[Tensor]) -> Lane | None:
        """Where such tensors are reduced; None: not by us."""
        kind = "cpu" if all(tensor.is_cpu for tensor in tensors) else tensors[0].device.type
        if kind not in self._lanes:
            if kind == "cpu":
                collective, transport = self._options
                if self._nccl is not None and transport.partition(":")[0] == "nccl":
                    transport = "auto"  # what was chosen is for tensors on devices
                self._lanes[kind] = Lane(self._group(kind), self._roll_call, collective, transport)
            else:
                self._lanes[kind] = self._accelerator_lane() if kind == "cuda" else None
        return self._lanes[kind]

    def _accelerator_lane(self) -> Lane | None:
        (collective, transport), over_nccl = (
            self._options,
            self._nccl is not None and not self._shares_device(),
        )
        wire = transport.partition(":")[0]
        if wire == "nccl" and not over_nccl:
            raise UserError(
                "transport 'nccl': several ranks share a GPU, which NCCL refuses, or this torch was built without it"
                " (allowed here: auto, shared_memory, gloo)"
            )
        if over_nccl and wire in ("auto", "nccl"):
            if collective in ("auto", NATIVE):
                return None
            transport, staged = "nccl", False
        else:
            staged = True
        device = torch.device("cuda", torch.cuda.current_device())
        return AcceleratorLane(
            self._group("cuda"), self._roll_call, collective, transport, device, staged
        )

    def _group(self, kind: str) -> Group:
        # A connection of its own: a thread that waits at a TCPStore keeps all others that share its connection from it.
        store = dist.PrefixStore(f"wire/{kind}/", self._store.clone())
        return Group(store, self.rank(), self.size(), self._timeout)

    def _shares_device(self) -> bool:
        if self._device_shared is None:
            self._device_shared = shared(self._group("devices"))
        return self._device_shared

    def _forward(self, name: str, *arguments: Any, **options: Any) -> dist.Work:
        """To gloo or NCCL themselves: the same method of torch's class comes back to ours, or keeps the interpreter lock while it waits for
        gloo's thread, which may wait for that lock to let go of a tensor: ranks hang for ever, now and then."""
        if name == "barrier" and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a barrier waits for what devices are doing, too
        on_cpu = all(tensor.is_cpu for tensor in _tensors(arguments))
        over_nccl = not on_cpu and self._nccl is not None and not self._shares_device()
        theirs = _BACKENDS_NAMES.get(name, name)
        work = getattr(self._nccl if over_nccl else self._gloo, theirs)(*arguments, **options)
        if over_nccl or name in _POINT_TO_POINT:
            return work
        number, plain = self._roll_call.next(), theirs.removeprefix("_").removesuffix("_base")
        return Forwarded(work, lambda error: self._roll_call.explain(plain, number, error))

    def record(self, *sizes: int) -> dict[str, Any]:
        """For the run's header: the wire and the algorithms that were chosen (for messages of these bytes); empty before the first allreduce."""
        for lane in (self._lanes.get("cuda"), self._lanes.get("cpu")):
            if lane:
                return lane.record(*sizes)
        return {}

    def shutdown(self) -> None:
        """Ends the engine's thread after what is under way."""
        for lane in filter(None, self._lanes.values()):
            lane.close()
        for backend in filter(None, (self._nccl, self._gloo)):
            backend.shutdown()
        # gloo's threads let go of the last tensors under the interpreter's lock. If the interpreter ends while one of them waits for it,
        # the C++ runtime aborts the process (under plain gloo, too): let them have it now.
        time.sleep(_LET_GO_S)

    def abort(self) -> None:
        for backend in filter(None, (self._nccl, self._gloo)):
            backend.abort()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _forwarded(name: str) -> Callable[..., dist.Work]:
    def forward(self: ProcessGroup, *arguments: Any, **options: Any) -> dist.Work:
        return self._forward(name, *arguments, **options)

    return forward


_POINT_TO_POINT = ("recv", "recv_anysource", "send")
# Methods that torch's ProcessGroup runs under the interpreter lock, and those that scripts call; gloo's and NCCL's name where it differs.
_BACKENDS_NAMES = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}
for _name in (
    *_BACKENDS_NAMES, "allgather", "_allgather_base", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather",
    *_POINT_TO_POINT, "reduce", "reduce_scatter", "_reduce_scatter_base", "scatter",
):  # fmt: skip
    setattr(ProcessGroup, _name, _forwarded(_name))


def _coalesced(name: str, options_type: type) -> Callable[..., dist.Work]:
    """A coalesced collective (functional collectives call these) as gloo's single one for each pair of tensors."""

    def forward(
        self: ProcessGroup, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        options = options or options_type()
        return All(
            [self._forward(name, o, i, options) for o, i in zip(outputs, inputs, strict=True)]
        )

    return forward


ProcessGroup.allgather_into_tensor_coalesced = _coalesced("_allgather_base", AllgatherOptions)
ProcessGroup.reduce_scatter_tensor_coalesced = _coalesced(
    "_reduce_scatter_base", ReduceScatterOptions
)


def _runs_here(tensors: list[Tensor], operation: Operation) -> bool:
    if len(tensors) != 1:  # gloo sums them over ranks and over the list; that meaning stays its own
        return False
    for tensor in tensors:
        if (
            tensor.layout != torch.strided
            or tensor.is_cpu != tensors[0].is_cpu
            or tensor.dtype not in DTYPES
        ):
            return False
        # gloo refuses the average of integers; that answer stays its own.
        if operation.average and not tensor.is_floating_point():
            return False
    return True
